"""What a corpus's own questions taught about searching it: a small file beside the corpus, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid.knowledge.ranking import WEIGHT
from hybrid.knowledge.rerank import COLUMNS, Reranker
from hybrid.rooms import write_json
from hybrid.types import JSON

log = logging.getLogger("hybrid.knowledge")

FILE = "tuned.json"


@dataclass(frozen=True, slots=True)
class Tuned:
    """`weight` in 0..1 is what the cosine counts beside the words; `facts` say from what it was learned."""

    weight: float = WEIGHT
    reranker: Reranker | None = None
    facts: JSON = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes it beside the corpus, in one step."""
        value: JSON = {"columns": list(COLUMNS), **asdict(self)}
        write_json(folder / FILE, {"sha256": _sum(value), "tuned": value})

    @classmethod
    def load(cls, folder: Path) -> Tuned:
        """What was learned, or the defaults; a damaged file counts as none, and the log says so."""
        path = folder / FILE
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            value = read["tuned"]
            if read["sha256"] != _sum(value) or value["columns"] != list(COLUMNS):
                raise ValueError("its sum or its columns differ")
            kept = value["reranker"]
            return cls(float(value["weight"]), None if kept is None else _reranker(kept), value["facts"])
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be used (%s); run `hybrid corpora tune` again.", path, error)
            return cls()


def _reranker(value: JSON) -> Reranker:
    columns = {key: tuple(map(float, value[key])) for key in ("mean", "scale", "weights")}
    return Reranker(columns["mean"], columns["scale"], columns["weights"], float(value["bias"]))


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
