"""Task folders: read, checked line by line, and split so that a test split cannot be learned from by accident.

    task.json · train.jsonl · dev.jsonl · test.jsonl · corpus.jsonl (knowledge tasks)

`read_task` raises at the first thing that makes a folder unusable; `check_task` lists everything that is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from hybrid.errors import DataError
from hybrid.evaluation.ifeval import complaints_of
from hybrid.evaluation.metrics import METRICS, Example, number_in
from hybrid.prompts import task_message

SPLITS = ("train", "dev", "test")
CORPUS = "corpus.jsonl"
_FACTS: Mapping[str, type] = {"name": str, "instruction": str, "metric": str, "labels": list, "license": str}
#: metrics that score against words of the row itself; `ifeval` looks at `meta` alone
_NEED_REFERENCE = frozenset(METRICS) - {"ifeval"}


@dataclass(frozen=True, slots=True)
class Task:
    """What `task.json` says. `labels` is empty for open tasks; `folder` is where the rows lie."""

    name: str
    metric: str
    instruction: str = ""
    labels: tuple[str, ...] = ()
    license: str = ""
    source: str = ""
    folder: Path = field(default_factory=Path)

    def message(self, example: Example) -> str:
        """The user message of an example, as in training and as a client sends it."""
        return task_message(self.instruction, example.input)

    @property
    def has_corpus(self) -> bool:
        """Whether the task brings the passages that its answers stand in."""
        return (self.folder / CORPUS).is_file()


@dataclass(frozen=True, slots=True)
class Split:
    """The examples of one split of a task, in file order."""

    task: Task
    examples: tuple[Example, ...]


class TrainSplit(Split):
    """Examples to learn from."""


class DevSplit(Split):
    """Examples to choose by: gates, limits and promotions may look at them."""


class TestSplit(Split):
    """Examples that nothing may learn from or choose by; only a report reads them."""


Learnable = TrainSplit | DevSplit
AnySplit = TypeVar("AnySplit", bound=Split)


def learnable(split: Learnable) -> tuple[Example, ...]:
    """The examples of a split that may be learned from. Raises DataError for a test split that got past the types."""
    if isinstance(split, TestSplit) or not isinstance(split, TrainSplit | DevSplit):
        raise DataError(f"The test split of {split.task.name} is not learned from; use its dev split.")
    return split.examples


def first(split: AnySplit, limit: int | None) -> AnySplit:
    """The same kind of split with its first `limit` examples."""
    return split if limit is None else type(split)(split.task, split.examples[:limit])


def read_task(folder: Path) -> Task:
    """The task in a folder. Raises DataError naming file and field."""
    found = list(_fact_complaints(folder))
    if found:
        raise DataError(f"{found[0]}")
    facts = json.loads((folder / "task.json").read_bytes())
    return Task(
        name=facts.get("name") or folder.resolve().name,
        metric=facts["metric"],
        instruction=facts.get("instruction", ""),
        labels=tuple(facts.get("labels") or ()),
        license=facts.get("license", ""),
        source=str(facts.get("source", "")),
        folder=folder,
    )


@overload
def read_split(task: Task, split: Literal["train"]) -> TrainSplit: ...
@overload
def read_split(task: Task, split: Literal["dev"]) -> DevSplit: ...
@overload
def read_split(task: Task, split: Literal["test"]) -> TestSplit: ...
def read_split(task: Task, split: Literal["train", "dev", "test"]) -> Split:
    """One split of a task. Raises DataError naming file and line of the first row that cannot be scored."""
    path = task.folder / f"{split}.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; `hybrid tasks check {task.folder}` says what the folder needs.")
    kind = {"train": TrainSplit, "dev": DevSplit, "test": TestSplit}[split]
    return kind(task, tuple(read_examples(path, task)))


def read_examples(path: Path, task: Task) -> Iterator[Example]:
    """The rows of a file as examples of `task`. Raises DataError at the first that is none."""
    for line, row in _rows(path):
        if isinstance(row, str):
            raise DataError(f"{path}:{line}: {row}")
        wrong = next(_row_complaints(row, task), None)
        if wrong:
            raise DataError(f"{path}:{line}: {wrong}")
        yield Example(row["id"], row["input"], row.get("reference", ""), row.get("meta") or {})


# --- checking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Complaint:
    """What is wrong and where. `line` counts from 1; 0 speaks of the file as a whole."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"

    def wire(self) -> dict[str, Any]:
        """As `--json` shows it."""
        return {"file": self.file, "line": self.line, "message": self.message}


@dataclass(frozen=True, slots=True)
class Check:
    """What looking at a folder found: how many rows each file has, and everything that is wrong."""

    task: str
    rows: Mapping[str, int]
    complaints: tuple[Complaint, ...]


def check_task(folder: Path) -> Check:
    """Looks at every line of a task folder. Raises DataError only when there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; point at a task folder that holds a task.json.")
    complaints = list(_fact_complaints(folder))
    task = _lenient(folder)
    counts: dict[str, int] = {}
    passages: set[str] | None = None
    if (folder / CORPUS).is_file():
        passages, found = _check_corpus(folder / CORPUS)
        counts[CORPUS] = len(passages)
        complaints += found
    ids: dict[str, str] = {}
    inputs: dict[str, str] = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        if not path.is_file():
            complaints.append(Complaint(path.name, 0, "is missing; a task has train.jsonl, dev.jsonl and test.jsonl"))
            continue
        rows = list(_rows(path))
        counts[path.name] = len(rows)
        if not rows:
            complaints.append(Complaint(path.name, 0, "holds no rows"))
        complaints += _check_rows(path.name, rows, task, ids, inputs, passages)
    return Check(task.name, counts, tuple(complaints))


def _check_rows(
    file: str,
    rows: Sequence[tuple[int, Any]],
    task: Task,
    ids: dict[str, str],
    inputs: dict[str, str],
    passages: set[str] | None,
) -> Iterator[Complaint]:
    """The complaints of one split. `ids` and `inputs` say where each was first seen, over all splits."""
    for line, row in rows:
        if isinstance(row, str):
            yield Complaint(file, line, row)
            continue
        for message in _row_complaints(row, task):
            yield Complaint(file, line, message)
        if isinstance(row.get("id"), str) and row["id"].strip():
            seen = ids.setdefault(row["id"], f"{file}:{line}")
            if seen != f"{file}:{line}":
                yield Complaint(file, line, f"the id {row['id']!r} is that of {seen} already; ids are unique")
        if isinstance(row.get("input"), str) and row["input"].strip():
            seen = inputs.setdefault(" ".join(row["input"].split()).casefold(), f"{file}:{line}")
            if seen.split(":")[0] != file:
                yield Complaint(file, line, f"the input is that of {seen} too; splits must not overlap")
        for message in _gold_complaints(row, passages):
            yield Complaint(file, line, message)


def _gold_complaints(row: Mapping[str, Any], passages: set[str] | None) -> Iterator[str]:
    meta = row.get("meta")
    gold = meta.get("gold_passages") if isinstance(meta, dict) else None
    if gold is None:
        return
    if not isinstance(gold, list) or not all(isinstance(g, str) for g in gold):
        yield "`meta.gold_passages` is a list of passage ids"
    elif passages is None:
        yield f"`meta.gold_passages` names passages, and there is no {CORPUS}"
    else:
        yield from (f"the gold passage {g!r} is not in {CORPUS}" for g in gold if g not in passages)


def _check_corpus(path: Path) -> tuple[set[str], list[Complaint]]:
    """The ids of a corpus and what is wrong with its rows."""
    seen: dict[str, int] = {}
    found: list[Complaint] = []
    for line, row in _rows(path):
        if isinstance(row, str):
            found.append(Complaint(path.name, line, row))
            continue
        name, text = row.get("id"), row.get("text")
        if not isinstance(name, str) or not name.strip():
            found.append(Complaint(path.name, line, "a passage needs an `id`, a string that is not empty"))
        elif name in seen:
            found.append(Complaint(path.name, line, f"the id {name!r} is that of line {seen[name]} already"))
        else:
            seen[name] = line
        if not isinstance(text, str) or not text.strip():
            found.append(Complaint(path.name, line, "a passage needs a `text`, a string that is not empty"))
        if not isinstance(row.get("title", ""), str):
            found.append(Complaint(path.name, line, "`title` is a string"))
    return set(seen), found


def _row_complaints(row: Mapping[str, Any], task: Task) -> Iterator[str]:
    """What keeps one row from being asked and scored."""
    for name in ("id", "input"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            yield f"`{name}` is missing or empty; it is a string"
    meta = row.get("meta", {})
    if not isinstance(meta, dict | None):
        yield "`meta` is an object"
        return
    others = (meta or {}).get("references", [])
    if not isinstance(others, list) or not all(isinstance(r, str) for r in others):
        yield "`meta.references` is a list of strings"
    reference = row.get("reference", "")
    if not isinstance(reference, str):
        yield "`reference` is a string; write JSON answers as text"
    elif task.metric in _NEED_REFERENCE:
        yield from _reference_complaints(reference, task)
    elif task.metric == "ifeval":
        yield from complaints_of(meta or {})


def _reference_complaints(reference: str, task: Task) -> Iterator[str]:
    if not reference.strip():
        yield f"`reference` is missing or empty; the metric {task.metric} needs one"
    elif task.labels and reference not in task.labels:
        yield f"the reference {reference!r} is not among the labels of task.json"
    elif task.metric == "numeric" and number_in(reference) is None:
        yield f"the reference {reference[:60]!r} holds no number, and the metric is numeric"
    elif task.metric == "json_f1" and not _is_object(reference):
        yield f"the reference {reference[:60]!r} is no JSON object, and the metric is json_f1"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _fact_complaints(folder: Path) -> Iterator[Complaint]:
    """What is wrong with `task.json`."""
    path = folder / "task.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Complaint(str(path), 0, "does not exist; a task folder holds a task.json with name, instruction, metric")
        return
    except ValueError as error:
        yield Complaint(path.name, getattr(error, "lineno", 1), f"is not valid JSON: {error}")
        return
    if not isinstance(facts, dict):
        yield Complaint(path.name, 1, "is one object with name, instruction, metric")
        return
    for name, kind in _FACTS.items():
        if name in facts and not isinstance(facts[name], kind):
            yield Complaint(path.name, _line_of(path, name), f"`{name}` is a {kind.__name__}")
    metric = facts.get("metric")
    if metric not in METRICS:
        known = ", ".join(METRICS)
        yield Complaint(path.name, _line_of(path, "metric"), f"the metric {metric!r} is unknown; use one of {known}")
    labels = facts.get("labels")
    if isinstance(labels, list):
        if not all(isinstance(label, str) and label.strip() for label in labels):
            yield Complaint(path.name, _line_of(path, "labels"), "`labels` are strings that are not empty")
        elif len(set(labels)) < len(labels):
            yield Complaint(path.name, _line_of(path, "labels"), "`labels` holds one label twice")


def _lenient(folder: Path) -> Task:
    """The task as far as `task.json` can be read, so that the rows can be looked at anyway."""
    try:
        facts = json.loads((folder / "task.json").read_bytes())
    except (OSError, ValueError):
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    labels = facts.get("labels")
    kept = tuple(x for x in labels if isinstance(x, str)) if isinstance(labels, list) else ()
    return Task(str(facts.get("name") or folder.resolve().name), str(facts.get("metric", "")), labels=kept)


def _line_of(path: Path, name: str) -> int:
    """The line on which a field of `task.json` stands, 1 where it does not."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return next((n for n, line in enumerate(lines, 1) if f'"{name}"' in line), 1)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row) of every line that is not blank; a row that is no JSON object is the sentence that says so."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except ValueError as error:
            yield number, f"is not valid JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else f"is {type(row).__name__}; a row is a JSON object"
