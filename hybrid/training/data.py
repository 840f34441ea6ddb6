"""Data in: a task folder, a file or documents, read, checked, made disjoint.

Every complaint names file, line, field and remedy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.training.duplicates import near_duplicates
from hybrid.training.formats import Example, Item, Pair, Text
from hybrid.training.reader import BAD_LIMIT, DOCUMENTS, ROWS, Kind, Reader, some
from hybrid.training.splits import GROUP, draw

__all__ = ["BAD_LIMIT", "DEV_LIMIT", "Counts", "Dataset", "Splits", "digest", "read_dataset", "read_splits"]

DEV_SHARE, DEV_LIMIT = 0.1, 500
_TASK_FIELDS = {"name": str, "instruction": str, "metric": str, "labels": list}


@dataclass(frozen=True, slots=True)
class Counts:
    """What reading did to the rows: nothing is dropped without a number here.

    `complaints` name the rows that cannot be used; `removed` the near duplicates and the leaked rows.
    """

    rows: int
    bad: int
    duplicates: int
    leaked: int
    complaints: tuple[str, ...] = ()
    near_duplicates: int = 0
    removed: tuple[str, ...] = ()

    def wire(self) -> dict[str, int]:
        """The numbers alone."""
        names = ("rows", "bad", "duplicates", "near_duplicates", "leaked")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training and dev items, disjoint from one another and from the test split, which is never kept.

    `kind` says which are filled: `train` for chat, `pairs` and `train` (the chosen answers) for preference, `texts`
    for text; and the dev ones likewise.
    """

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    counts: Counts
    kind: Kind = "chat"
    pairs: tuple[Pair, ...] = ()
    dev_pairs: tuple[Pair, ...] = ()
    texts: tuple[Text, ...] = ()
    dev_texts: tuple[Text, ...] = ()
    instruction: str = ""
    metric: str = ""
    labels: tuple[str, ...] = ()
    license: str = ""
    source: str = ""

    @property
    def train_items(self) -> tuple[Item, ...]:
        """The training rows in the shape they came in."""
        return self.pairs or self.texts or self.train

    @property
    def dev_items(self) -> tuple[Item, ...]:
        """The dev rows in the shape they came in."""
        return self.dev_pairs or self.dev_texts or self.dev

    @property
    def train_sha256(self) -> str:
        """Names the training examples."""
        return digest(self.train_items)

    @property
    def dev_sha256(self) -> str:
        """Names the dev examples: dev losses compare where this is equal."""
        return digest(self.dev_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """All the usable rows of a source, test split included: for tools that compare with it, never for training."""

    name: str
    task: dict[str, Any]
    kind: Kind
    train: list[Item]
    dev: list[Item]
    test: list[Item]
    counts: Counts

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of a closed task, where task.json lists them."""
        return tuple(self.task.get("labels") or ())

    @property
    def instruction(self) -> str:
        """What the model is told before each input; may be empty."""
        return str(self.task.get("instruction", ""))

    @property
    def bad_share(self) -> float:
        """The share of all rows that cannot be used."""
        return self.counts.bad / max(1, self.counts.rows)

    @property
    def leaked_share(self) -> float:
        """The share of the training rows that stood in the dev or test split too."""
        return self.counts.leaked / max(1, self.counts.leaked + len(self.train))


def digest(items: Iterable[Item]) -> str:
    """The hex SHA-256 of what the items say, in their order."""
    total = hashlib.sha256()
    for item in items:
        total.update(json.dumps([item.key, item.reply], ensure_ascii=False).encode())
    return total.hexdigest()


def read_dataset(source: Path, *, seed: int = 0, group: str = "") -> Dataset:
    """The data set at `source`: a task folder (`task.json`, `train.jsonl`, …), one JSONL or JSON file, or documents.

    A missing dev split is drawn with `seed`: 10 % of the training rows, at most 500, labels in their shares, rows of
    equal `meta[group]` (default: task.json's `group`, else "group") together. Raises DataError, also where more than
    5 % of the training rows stand in the dev or test split.
    """
    splits = read_splits(source, seed=seed, group=group)
    _refuse_leaks(source, splits)
    train, dev = splits.train, splits.dev
    task = splits.task
    return Dataset(
        name=splits.name,
        kind=splits.kind,
        train=_examples(train),
        dev=_examples(dev),
        pairs=tuple(item for item in train if isinstance(item, Pair)),
        dev_pairs=tuple(item for item in dev if isinstance(item, Pair)),
        texts=tuple(item for item in train if isinstance(item, Text)),
        dev_texts=tuple(item for item in dev if isinstance(item, Text)),
        counts=splits.counts,
        instruction=splits.instruction,
        metric=task.get("metric", ""),
        labels=splits.labels,
        license=str(task.get("license", "")),
        source=str(task.get("source", "")),
    )


def read_splits(
    source: Path, *, seed: int = 0, group: str = "", dev_share: float = DEV_SHARE, bad_limit: float = BAD_LIMIT
) -> Splits:
    """The rows of a source without duplicates, training rows that stand in dev or test taken out, dev drawn if missing.

    Raises DataError where more than `bad_limit` of the rows cannot be used.
    """
    task = _task_json(source) if source.is_dir() else {}
    reader = Reader(task.get("instruction", ""), frozenset(task.get("labels") or ()))
    rows, dev, test = _files(source, reader)
    reader.verdict(bad_limit)
    kept = _unique(rows)
    dev = _unique(dev)
    if not dev:
        size = max(1, min(DEV_LIMIT, round(len(kept) * dev_share)))
        named = group or str(task.get("group") or GROUP)
        kept, dev = draw(kept, size, seed=seed, group=named, labels=task.get("labels") or ())
    clean, near, leaks = _disjoint(kept, [*dev, *test])
    return Splits(
        name=task.get("name") or (source.name if source.is_dir() else source.stem),
        task=task,
        kind=reader.kind or "chat",
        train=clean,
        dev=dev,
        test=test,
        counts=Counts(
            rows=reader.rows,
            bad=len(reader.complaints),
            duplicates=len(rows) - len(_unique(rows)),
            leaked=len(leaks),
            complaints=tuple(reader.complaints),
            near_duplicates=len(near),
            removed=(*near, *leaks),
        ),
    )


def _files(source: Path, reader: Reader) -> tuple[list[Item], list[Item], list[Item]]:
    """The items of the train, dev and test files; documents and single files have no dev and test."""
    if source.is_dir():
        train, dev, test = (source / f"{split}.jsonl" for split in ("train", "dev", "test"))
        if train.is_file():
            first = reader.read(train)
            return first, reader.read(dev) if dev.is_file() else [], reader.read(test) if test.is_file() else []
        if any(path.suffix.lower() in DOCUMENTS for path in source.rglob("*")):
            return reader.documents(source), [], []
        raise DataError(f"{source} holds no train.jsonl and no documents; point at a task folder, or at the data file.")
    if not source.is_file():
        raise DataError(f"{source} does not exist; give a task folder, a .jsonl file or a folder of documents.")
    if source.suffix.lower() in DOCUMENTS:
        return reader.documents(source), [], []
    if source.suffix not in ROWS:
        usual = ", ".join((*ROWS, *sorted(DOCUMENTS)))
        raise DataError(f"{source.name} is no data file; give one that ends in one of {usual}.")
    return reader.read(source), [], []


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
    for field, kind in _TASK_FIELDS.items():
        if field in task and not isinstance(task[field], kind):
            raise DataError(f"{path}, field {field!r}: is {type(task[field]).__name__}; make it a {kind.__name__}.")
    return task


def _disjoint(rows: Sequence[Item], held: Sequence[Item]) -> tuple[list[Item], list[str], list[str]]:
    """(rows that repeat neither one another nor a held-out row, what was near, what was leaked: a line each)."""
    seen = {item.key: item for item in held}
    repeated, alike = near_duplicates(rows, held)
    near = [f"{rows[n].place}: says almost the same as {other.place}." for n, other in repeated.items()]
    leaks = [
        f"{row.place}: is also {seen[row.key].place if row.key in seen else alike[n].place}."
        for n, row in enumerate(rows)
        if row.key in seen or n in alike
    ]
    clean = [row for n, row in enumerate(rows) if row.key not in seen and n not in alike and n not in repeated]
    return clean, near, leaks


def _refuse_leaks(source: Path, splits: Splits) -> None:
    """Raises DataError where so much of the training split is held out elsewhere that the splits cannot be meant."""
    leaked = splits.counts.leaked
    if not splits.train:
        raise DataError(f"{source} leaves no training row that is not in the dev or test split; add rows of its own.")
    if splits.leaked_share > BAD_LIMIT:
        lines = [line for line in splits.counts.removed if ": is also " in line]
        raise DataError(
            f"{leaked} of {leaked + len(splits.train)} training rows stand in the dev or test split too, more than "
            f"{BAD_LIMIT:.0%}. `hybrid data split {source} --out DIR` writes splits without them:\n{some(lines)}"
        )


def _examples(items: Sequence[Item]) -> tuple[Example, ...]:
    """What supervised training learns from: examples, and the chosen answers of pairs."""
    found = [item.preferred if isinstance(item, Pair) else item for item in items if not isinstance(item, Text)]
    return tuple(example for example in _unique(found) if isinstance(example, Example))


def _unique(items: Sequence[Item]) -> list[Item]:
    """The first of each (question, reply)."""
    return list({(item.key, item.reply): item for item in reversed(items)}.values())[::-1]
