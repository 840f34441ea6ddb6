"""A pool: inputs that nobody has labelled yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.knowledge.alike import Texts
from hybrid.training.data import Splits
from hybrid.training.formats import Item
from hybrid.training.reader import BAD_LIMIT, ROWS, parsed_rows, some

#: where an input may stand in a row of a pool; of `messages` the last one counts
_FIELDS = ("input", "text", "prompt", "question")


@dataclass(frozen=True, slots=True)
class Unlabelled:
    """An input without an answer."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Pool:
    """The usable rows of a pool, and how many were left out because the data set, or the pool itself, has them."""

    rows: tuple[Unlabelled, ...]
    known: int


def read_pool(path: Path, splits: Splits) -> Pool:
    """The inputs of a JSONL or JSON file (`input`, `text`, `prompt`, `question`, `messages`) or of a .txt, one a line.

    Inputs that stand in any split are left out, near duplicates too: an answer to a test question is a leak. Raises
    DataError naming the lines without an input.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a file of unlabelled rows, one JSON object or one text a line.")
    complaints: list[str] = []
    found: list[Unlabelled] = []
    for line, row in _lines(path):
        text = _input(row)
        if text:
            found.append(Unlabelled(str(row.get("id", f"{path.stem}-{line}")), text))
        else:
            wanted = ", ".join((*_FIELDS, "messages"))
            complaints.append(f"{path.name}, line {line}: holds no input; put one of {wanted} there.")
    if not found or len(complaints) > BAD_LIMIT * (len(found) + len(complaints)):
        raise DataError(f"{path.name} cannot be used as a pool:\n{some(complaints) or 'it holds no rows'}")
    fresh = Fresh((*splits.train, *splits.dev, *splits.test))
    rows = tuple(row for row in found if fresh.take(row.text))
    if not rows:
        raise DataError(f"Every row of {path.name} stands in the data set already; give rows that are new to it.")
    return Pool(rows, len(found) - len(rows))


class Fresh:
    """Takes inputs that are new: neither in the data set, nor taken before, nor nearly so."""

    def __init__(self, known: Iterable[Item]) -> None:
        texts = [item.bare for item in known]
        self._exact = set(texts)
        self._near = Texts(texts)

    def take(self, text: str) -> bool:
        """Whether the text is new; it is known afterwards."""
        if text in self._exact:
            return False
        self._exact.add(text)
        return not self._near.has(text)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix in ROWS:
        for line, row in parsed_rows(path):
            yield line, row if isinstance(row, Mapping) else {}
        return
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is no UTF-8 text: {error}.") from error
    yield from ((n, {"text": line.strip()}) for n, line in enumerate(lines, 1) if line.strip())


def _input(row: Mapping[str, Any]) -> str:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    values = [row.get(field) for field in _FIELDS] + [last.get("content") if isinstance(last, Mapping) else None]
    return next((value for value in values if isinstance(value, str) and value.strip()), "")
