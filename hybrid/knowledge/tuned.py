"""What a corpus's own questions taught about searching it: a small file beside the corpus, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid.knowledge.answerable import SIGNALS, Answerable, Found
from hybrid.knowledge.ranking import WEIGHT
from hybrid.knowledge.reader import FILE as READER
from hybrid.knowledge.rerank import COLUMNS, Reranker, Shortlist
from hybrid.rooms import sha256_file, write_json
from hybrid.types import JSON
from hybrid.types.passage import Passage

log = logging.getLogger("hybrid.knowledge")

FILE = "tuned.json"


@dataclass(frozen=True, slots=True)
class Tuned:
    """`weight` in 0..1 is what the cosine counts beside the words; `answerable` tells when nothing that was found
    answers; `facts` say from what it was learned; `reader` is the SHA-256 of the reader's file, where one was taught:
    the rest was learned with it and is of no use without."""

    weight: float = WEIGHT
    reranker: Reranker | None = None
    facts: JSON = field(default_factory=dict)
    answerable: Answerable | None = None
    reader: str = ""

    def judged(self, passages: tuple[Passage, ...], found: Shortlist) -> Found:
        """The passages that a search shows, and how likely its candidates hold an answer, where that was learned."""
        if self.answerable is None:
            return Found(passages)
        return Found(passages, self.answerable.chance(found.by(self.weight)), self.answerable.least)

    @property
    def digest(self) -> str:
        """Names it among all that could have been learned; "" where nothing was."""
        return "" if self == Tuned() else _sum(self._value())[:16]

    def save(self, folder: Path) -> None:
        """Writes it beside the corpus, in one step."""
        value = self._value()
        write_json(folder / FILE, {"sha256": _sum(value), "tuned": value})

    def _value(self) -> JSON:
        return {"columns": list(COLUMNS), "signals": list(SIGNALS), **asdict(self)}

    @classmethod
    def load(cls, folder: Path) -> Tuned:
        """What was learned, or the defaults; a damaged file counts as none, and the log says so."""
        path = folder / FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            value = read["tuned"]
            if read["sha256"] != _sum(value) or value["columns"] != list(COLUMNS):
                raise ValueError("its sum or its columns differ")
            kept, told = value["reranker"], value.get("answerable")
            reranker = None if kept is None else Reranker.read(kept)
            # an older file knows nothing of when to refuse, or learned it from other signals
            answerable = Answerable.read(told) if told and value["signals"] == list(SIGNALS) else None
            tuned = cls(float(value["weight"]), reranker, value["facts"], answerable, str(value.get("reader", "")))
            if tuned.reader and not _is(folder / READER, tuned.reader):
                raise ValueError(f"{READER} is another one, or damaged")
            return tuned
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be used (%s); run `hybrid corpora tune` again.", path, error)
            return cls()


def _is(file: Path, sha256: str) -> bool:
    return file.is_file() and sha256_file(file) == sha256


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
