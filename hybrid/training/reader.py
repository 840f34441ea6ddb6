"""Reads rows and documents into items, collecting complaints until there are too many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from hybrid.errors import DataError
from hybrid.knowledge.chunk import Chunker
from hybrid.knowledge.read import MARKDOWN, TEXT, read
from hybrid.training.formats import Example, Item, Pair, RowError, Text, items_of

Kind = Literal["chat", "preference", "text"]

#: the share of rows that may be unusable, or leaked, before the job fails
BAD_LIMIT = 0.05
ROWS = (".jsonl", ".json")
DOCUMENTS = MARKDOWN | TEXT
#: tokens of a piece that a document is cut into, as about four characters each: fits the default `max_length`
PIECE_TOKENS = 512
_KINDS: dict[type[Item], Kind] = {Example: "chat", Pair: "preference", Text: "text"}
_SHOWN = 20


class Reader:
    """Reads the files of one data set. All its rows must be of one kind; the first usable one says which."""

    def __init__(self, instruction: str = "", labels: frozenset[str] = frozenset()) -> None:
        self._instruction = instruction
        self._labels = labels
        self.kind: Kind | None = None
        self.rows = 0
        self.complaints: list[str] = []

    def read(self, path: Path) -> list[Item]:
        """The items of one file of rows, in order."""
        found: list[Item] = []
        for line, row in parsed_rows(path):
            self.rows += 1
            place = f"{path.name}, line {line}"
            try:
                if isinstance(row, ValueError):
                    raise RowError("(line)", f"is no JSON ({row}); write one JSON object a line")
                items = self._checked(row, f"{path.stem}-{line}")
                found += [replace(item, place=place) for item in items]
            except RowError as error:
                self.complaints.append(f"{place}, {error}.")
        return found

    def documents(self, path: Path) -> list[Item]:
        """The pieces of a document, or of all documents in a folder; `meta.group` is then the document's name."""
        documents, problems = read(path)
        self.kind = "text"
        self.rows += len(documents) + len(problems)
        self.complaints += [str(problem) for problem in problems]
        several = len(documents) > 1  # a single one must be cut to leave something to measure on
        chunker = Chunker(lambda texts: [len(text) // 4 for text in texts], PIECE_TOKENS)
        return [
            Text(f"{document.id}#{n}", piece.text, {"group": document.id} if several else {}, document.id)
            for document in documents
            for n, piece in enumerate(chunker.cut(document.title, document.text, markdown=document.markdown))
            if piece.text.strip()
        ]

    def verdict(self, limit: float = BAD_LIMIT) -> None:
        """Raises DataError when nothing was read, or more than `limit` of the rows (or all) cannot be used."""
        if not self.rows:
            raise DataError("The data hold no rows; put one JSON object on each line.")
        if self.kind is None or len(self.complaints) > limit * self.rows:
            share = f", more than {limit:.0%}" if limit < 1 else ""
            raise DataError(
                f"{len(self.complaints)} of {self.rows} rows cannot be used{share}; "
                f"mend them first:\n{some(self.complaints)}"
            )

    def _checked(self, row: object, identity: str) -> Sequence[Item]:
        items = items_of(row, identity, self._instruction)
        for item in items:
            kind = _KINDS[type(item)]
            if kind != (self.kind or kind):
                raise RowError("(row)", f"is a {kind} row among {self.kind} rows; put each kind in a file of its own")
            if self._labels and isinstance(item, Example) and item.answer not in self._labels:
                raise RowError("reference", f"{item.answer!r:.60} is not among the labels of task.json; add it there")
        self.kind = _KINDS[type(items[0])]
        return items


def some(lines: Sequence[str]) -> str:
    """The first of many lines, and how many more there are."""
    more = len(lines) - _SHOWN
    return "\n".join(lines[:_SHOWN]) + (f"\n… and {more} more" if more > 0 else "")


def parsed_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, parsed row, or the ValueError that parsing raised). The items of a JSON array,
    whatever the file is called, count as lines."""
    with path.open("rb") as file:
        if file.read(4096).lstrip().startswith(b"["):
            file.seek(0)
            try:
                yield from enumerate(json.loads(file.read()), 1)
            except ValueError as error:
                raise DataError(f"{path} is not valid JSON: {error}.") from error
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:  # UnicodeDecodeError is one too
        return error
