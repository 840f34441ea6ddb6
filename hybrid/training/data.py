"""Data in: a task folder or one file, read, checked, made disjoint. Every complaint names file, line, field, remedy."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.training.formats import Example, RowError, examples_of

BAD_LIMIT = 0.05
DEV_SHARE, DEV_LIMIT = 0.1, 500
SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True, slots=True)
class Counts:
    """What reading did to the rows: nothing is dropped without a number here and a line in `complaints`."""

    rows: int
    bad: int
    duplicates: int
    leaked: int
    complaints: tuple[str, ...] = ()

    def wire(self) -> dict[str, int]:
        """The numbers alone."""
        return {"rows": self.rows, "bad": self.bad, "duplicates": self.duplicates, "leaked": self.leaked}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training and dev examples, disjoint from one another and from the test split, which is never kept."""

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    counts: Counts
    instruction: str = ""
    metric: str = ""
    labels: tuple[str, ...] = ()
    license: str = ""
    source: str = ""

    @property
    def train_sha256(self) -> str:
        """Names the training examples."""
        return digest(self.train)

    @property
    def dev_sha256(self) -> str:
        """Names the dev examples: dev losses compare where this is equal."""
        return digest(self.dev)


def digest(examples: Iterable[Example]) -> str:
    """The hex SHA-256 of what the examples say, in their order."""
    total = hashlib.sha256()
    for example in examples:
        total.update(json.dumps([example.key, example.answer], ensure_ascii=False).encode())
    return total.hexdigest()


def read_dataset(source: Path, *, seed: int = 0) -> Dataset:
    """The data set at `source`: a task folder (`task.json`, `train.jsonl`, …) or one JSONL or JSON file.

    A missing dev split is drawn with `seed`: 10 % of the training rows, at most 500. Raises DataError.
    """
    if source.is_dir():
        train = source / "train.jsonl"
        if not train.is_file():
            raise DataError(f"{source} holds no train.jsonl; point at a task folder, or at the data file itself.")
        return _assemble(source.name, _task_json(source), train, source / "dev.jsonl", source / "test.jsonl", seed)
    if not source.is_file():
        raise DataError(f"{source} does not exist; give a task folder or a .jsonl file.")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{source.name} is no data file; give one that ends in {' or '.join(SUFFIXES)}.")
    return _assemble(source.stem, {}, source, None, None, seed)


def _task_json(folder: Path) -> dict[str, Any]:
    path = folder / "task.json"
    if not path.is_file():
        return {}
    try:
        task = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Correct that place.") from error
    if not isinstance(task, dict):
        raise DataError(f"{path} holds {type(task).__name__}; write one object with name, instruction, metric.")
    for field, kind in {"name": str, "instruction": str, "metric": str, "labels": list}.items():
        if field in task and not isinstance(task[field], kind):
            raise DataError(f"{path}, field {field!r}: is {type(task[field]).__name__}; make it a {kind.__name__}.")
    return task


def _assemble(name: str, task: dict[str, Any], train: Path, dev: Path | None, test: Path | None, seed: int) -> Dataset:
    reader = _Reader(task.get("instruction", ""), frozenset(task.get("labels") or ()))
    rows = reader.read(train)
    held = [reader.read(path) if path and path.is_file() else [] for path in (dev, test)]
    reader.verdict()
    kept = _unique(rows)
    duplicates = len(rows) - len(kept)
    dev_rows = _unique(held[0])
    if not dev_rows:
        kept, dev_rows = _split(kept, seed)
    seen = {example.key for example in (*dev_rows, *held[1])}
    clean = [example for example in kept if example.key not in seen]
    leaked = len(kept) - len(clean)
    if not clean:
        raise DataError(f"{train} leaves no training row that is not in the dev or test split; add rows of its own.")
    return Dataset(
        name=task.get("name") or name,
        train=tuple(clean),
        dev=tuple(dev_rows),
        counts=Counts(reader.rows, len(reader.complaints), duplicates, leaked, tuple(reader.complaints)),
        instruction=task.get("instruction", ""),
        metric=task.get("metric", ""),
        labels=tuple(task.get("labels") or ()),
        license=str(task.get("license", "")),
        source=str(task.get("source", "")),
    )


def _unique(examples: Sequence[Example]) -> list[Example]:
    return list({(example.key, example.answer): example for example in reversed(examples)}.values())[::-1]


def _split(rows: list[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Draws a dev split by question, so that the same question never stands on both sides."""
    keys = sorted({example.key for example in rows})
    if len(keys) < 2:
        raise DataError(
            "The data hold fewer than two different rows; one to learn from and one to measure on are needed."
        )
    random.Random(seed).shuffle(keys)
    drawn = set(keys[: max(1, min(DEV_LIMIT, round(len(keys) * DEV_SHARE)))])
    return [e for e in rows if e.key not in drawn], [e for e in rows if e.key in drawn]


class _Reader:
    """Reads files, collecting complaints until there are too many."""

    def __init__(self, instruction: str, labels: frozenset[str]) -> None:
        self._instruction = instruction
        self._labels = labels
        self.rows = 0
        self.complaints: list[str] = []

    def read(self, path: Path) -> list[Example]:
        """The examples of one file, in order."""
        found: list[Example] = []
        for line, row in _rows(path):
            self.rows += 1
            try:
                if isinstance(row, ValueError):
                    raise RowError("(line)", f"is no JSON ({row}); write one JSON object a line")
                found += self._checked(row, f"{path.stem}-{line}")
            except RowError as error:
                self.complaints.append(f"{path.name}, line {line}, {error}.")
        return found

    def _checked(self, row: object, identity: str) -> list[Example]:
        examples = examples_of(row, identity, self._instruction)
        for example in examples:
            if self._labels and example.answer not in self._labels:
                raise RowError(
                    "reference", f"{example.answer!r:.60} is not among the labels of task.json; add it there"
                )
        return examples

    def verdict(self) -> None:
        """Raises DataError when nothing was read, or more than 5 % of the rows cannot be used."""
        if not self.rows:
            raise DataError("The data hold no rows; put one JSON object on each line.")
        if len(self.complaints) > BAD_LIMIT * self.rows:
            shown = "\n".join(self.complaints[:20])
            more = len(self.complaints) - 20
            rest = f"\n… and {more} more" if more > 0 else ""
            raise DataError(
                f"{len(self.complaints)} of {self.rows} rows cannot be used, more than {BAD_LIMIT:.0%}; "
                f"mend them first:\n{shown}{rest}"
            )


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, parsed row, or the ValueError that parsing raised). A JSON array counts its items as lines."""
    with path.open("rb") as file:
        if path.suffix == ".json" and file.read(4096).lstrip().startswith(b"["):
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
