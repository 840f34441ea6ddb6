"""Outcomes as the gate learns from them: one table of queries by arms, read from reports and from outcome tables.

A report folder holds `report.json`, `outcomes.jsonl` and `examples.jsonl`; an outcome table is JSONL or CSV of
`id, input, model, score, cost`, the form that router benchmarks come in. What was measured on a test split can be
looked at and never learned from: `Lessons` is the type that teaches.
"""

from __future__ import annotations

import csv
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import numpy.typing as npt

from hybrid.errors import DataError, Refused
from hybrid.prompts import task_message

Numbers = npt.NDArray[np.float64]

#: the arm of a report that is the gate itself
_AUTO = "auto"
_TEACHING_SPLITS = ("train", "dev")
_TABLES = (".jsonl", ".csv")
#: how a CSV file spells what JSON has literals for
_SPELLED: Mapping[str, float | None] = {"": None, "null": None, "none": None, "na": None, "true": 1.0, "false": 0.0}
#: means of many answers may lie this far outside 0 to 1
_SLIP = 1e-6


@dataclass(frozen=True, eq=False)
class Table:
    """Queries by arms. `queries` are what the gate sees, `groups` the tasks they belong to ("" in plain tables).

    `score` float64 [n, arms] in 0..1 and `cost` float64 [n, arms] (tokens in reports, whatever an outcome table says
    otherwise) are NaN where nothing was measured.
    """

    ids: tuple[str, ...]
    queries: tuple[str, ...]
    groups: tuple[str, ...]
    arms: tuple[str, ...]
    score: Numbers
    cost: Numbers

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def measured(self) -> npt.NDArray[np.bool_]:
        """[n, arms]: which arm was asked which query."""
        return ~np.isnan(self.score)

    @cached_property
    def places(self) -> tuple[npt.NDArray[np.intp], tuple[str, ...]]:
        """([n] which of the different groups each row is of, those groups in the order they come in)."""
        names = {name: place for place, name in enumerate(dict.fromkeys(self.groups))}
        return np.fromiter((names[group] for group in self.groups), dtype=np.intp, count=len(self)), tuple(names)

    @cached_property
    def weights(self) -> Numbers:
        """[n], summing to one: every group weighs the same, as in a report's overall score."""
        place, groups = self.places
        weights: Numbers = 1.0 / (np.bincount(place)[place] * len(groups))
        return weights

    def rows(self, index: npt.NDArray[np.intp]) -> Self:
        """The same kind of table with some of the rows."""
        keep = index.tolist()
        return type(self)(
            tuple(self.ids[i] for i in keep),
            tuple(self.queries[i] for i in keep),
            tuple(self.groups[i] for i in keep),
            self.arms,
            self.score[index],
            self.cost[index],
        )


class Lessons(Table):
    """Outcomes that a gate may be taught with."""


class Seen(Table):
    """Outcomes to judge a gate on; some may be of a test split."""


def lessons(table: Table) -> Lessons:
    """The table, if it may teach. Raises Refused for one that got past the types."""
    if not isinstance(table, Lessons):
        raise Refused("These outcomes are there to judge a gate, not to teach it; read outcomes of a dev split.")
    return table


@overload
def read_outcomes(paths: Sequence[Path], *, teach: Literal[True]) -> Lessons: ...
@overload
def read_outcomes(paths: Sequence[Path], *, teach: Literal[False]) -> Seen: ...
def read_outcomes(paths: Sequence[Path], *, teach: bool) -> Table:
    """The outcomes of report folders and outcome tables, one below another, with all their arms.

    Rows of one id and one query are one row; an arm that was asked it twice gets the mean. To `teach`, a report of a
    test split is refused. Raises DataError naming file and line, Refused.
    """
    cells = _Cells()
    for path in paths:
        if path.is_dir():
            _read_report(path, teach, cells)
        else:
            _read_table(path, cells)
    table = cells.table(Lessons if teach else Seen)
    where = ", ".join(map(str, paths))
    if not len(table):
        raise DataError(f"{where} holds no scores; give report folders or outcome tables with scores in them.")
    if teach and len(table.arms) < 2:
        raise DataError(f"{where} measures one arm only, {table.arms[0]}; a gate needs two to choose between.")
    return table


def joined(first: Lessons, second: Lessons) -> Lessons:
    """The rows of both, with all their arms; of a query of a group that both hold, the row of the first alone."""
    held = set(zip(first.groups, first.queries, strict=True))
    asked = zip(second.groups, second.queries, strict=True)
    second = second.rows(np.flatnonzero([row not in held for row in asked]))
    arms = tuple(dict.fromkeys((*first.arms, *second.arms)))

    def wide(table: Lessons, cells: Numbers) -> Numbers:
        out = np.full((len(table), len(arms)), np.nan)
        out[:, [arms.index(arm) for arm in table.arms]] = cells
        return out

    return Lessons(
        first.ids + second.ids,
        first.queries + second.queries,
        first.groups + second.groups,
        arms,
        np.concatenate([wide(t, t.score) for t in (first, second)]),
        np.concatenate([wide(t, t.cost) for t in (first, second)]),
    )


@dataclass(slots=True)
class _Cells:
    """Scores and costs as they are read, each beside its row and its arm: numbers alone, however long the queries."""

    rows: dict[tuple[str, str, str], int] = field(default_factory=dict)
    arms: dict[str, int] = field(default_factory=dict)
    row: array[int] = field(default_factory=lambda: array("q"))
    arm: array[int] = field(default_factory=lambda: array("q"))
    score: array[float] = field(default_factory=lambda: array("d"))
    cost: array[float] = field(default_factory=lambda: array("d"))

    def add(self, group: str, id: str, query: str, arm: str, score: float, cost: float) -> None:
        self.row.append(self.rows.setdefault((group, id, query), len(self.rows)))
        self.arm.append(self.arms.setdefault(arm, len(self.arms)))
        self.score.append(score)
        self.cost.append(cost)

    def table(self, kind: type[Table]) -> Table:
        keys, place = self._queries()
        cell = np.array(place, dtype=np.intp)[np.array(self.row, dtype=np.intp)] * len(self.arms)
        cell += np.array(self.arm, dtype=np.intp)
        shape = (len(keys), len(self.arms))
        score, cost = (_means(cell, np.array(values), shape) for values in (self.score, self.cost))
        groups, ids, queries = zip(*keys, strict=True) if keys else ((), (), ())
        return kind(ids, queries, groups, tuple(self.arms), score, cost)

    def _queries(self) -> tuple[list[tuple[str, str, str]], list[int]]:
        """The different queries, and which of them each row is.

        Where no id stands for two arms, ids number the lines of a table, and a query is known by its words.
        """
        if len(self.arms) < 2 or len(self.row) > len(self.rows):
            return list(self.rows), list(range(len(self.rows)))
        first: dict[tuple[str, str], tuple[str, str, str]] = {}
        for key in self.rows:
            first.setdefault((key[0], key[2]), key)
        number = {words: n for n, words in enumerate(first)}
        return list(first.values()), [number[group, query] for group, _, query in self.rows]


def _means(cell: npt.NDArray[np.intp], values: Numbers, shape: tuple[int, int]) -> Numbers:
    """The mean of the values of every cell of a table, NaN where there are none."""
    known, cells = ~np.isnan(values), shape[0] * shape[1]
    count = np.bincount(cell[known], minlength=cells)
    total = np.bincount(cell[known], values[known], minlength=cells)
    means: Numbers = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(shape)
    return means


# --- report folders --------------------------------------------------------------------------------------------------


def _read_report(folder: Path, teach: bool, cells: _Cells) -> None:
    try:
        split = json.loads((folder / "report.json").read_bytes()).get("split")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder} holds no report.json that can be read; `hybrid eval` writes one.") from error
    if teach and split not in _TEACHING_SPLITS:
        raise Refused(
            f"{folder} is a report of the {split} split, which nothing may learn from. "
            "Run `hybrid eval … --split dev` and teach the gate with that report."
        )
    asked = {
        (str(row["task"]), str(row["id"])): task_message(row.get("instruction") or "", row["input"])
        for _, row in _lines(folder / "examples.jsonl", ("task", "id", "input"))
    }
    if not asked:
        raise DataError(
            f"{folder} was written without texts, so the gate cannot see what was asked; "
            "run the same `hybrid eval` again without --no-texts."
        )
    path = folder / "outcomes.jsonl"
    for line, row in _lines(path, ("task", "id", "arm", "score")):
        key = (str(row["task"]), str(row["id"]))
        if row["arm"] == _AUTO:
            continue
        if key not in asked:
            raise DataError(f"{path}:{line}: examples.jsonl holds no example {key[1]!r} of {key[0]!r}.")
        cost = float((row.get("prompt_tokens") or 0) + (row.get("completion_tokens") or 0))
        score = _score(row["score"], path, line)
        if score is not None:
            cells.add(*key, asked[key], str(row["arm"]), score, cost)


def _lines(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of a JSONL file, each with what is needed; nothing where there is no file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, path, number, needed)


def _object(line: str, path: Path, number: int, needed: Iterable[str]) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: this is no JSON ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: a row is an object with id, input, model, score and cost.")
    _complete(row, path, number, needed)
    return row


def _complete(row: Mapping[str, Any], path: Path, number: int, needed: Iterable[str]) -> None:
    missing = [name for name in needed if name not in row]
    if missing:
        raise DataError(f"{path}:{number}: the row lacks {', '.join(missing)}.")


# --- outcome tables --------------------------------------------------------------------------------------------------


def _read_table(path: Path, cells: _Cells) -> None:
    if path.suffix.lower() not in _TABLES or not path.is_file():
        raise DataError(f"{path} is neither a report folder nor an outcome table (.jsonl or .csv).")
    rows = _csv_rows(path) if path.suffix.lower() == ".csv" else _lines(path, ("id", "input", "model", "score"))
    inputs: dict[str, str] = {}
    try:
        for line, row in rows:
            _add_row(row, path, line, inputs, cells)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from error


def _add_row(row: Mapping[str, Any], path: Path, line: int, inputs: dict[str, str], cells: _Cells) -> None:
    id, query, model = (_text(row[name], name, path, line) for name in ("id", "input", "model"))
    if inputs.setdefault(id, query) != query:
        raise DataError(f"{path}:{line}: the id {id[:40]!r} stands for another input above; give each query its own.")
    score = _score(row["score"], path, line)
    if score is not None:
        cells.add("", id, query, model, score, _cost(row.get("cost"), path, line))


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(1 << 30)  # a prompt may be longer than the library expects of a field
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _complete(dict.fromkeys(reader.fieldnames or ()), path, 1, ("id", "input", "model", "score"))
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: the row has not as many fields as the first line.")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: this is no CSV ({error}).") from error


def _text(value: Any, name: str, path: Path, line: int) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
        return str(value).encode(errors="replace").decode()  # half a surrogate pair is no text that can be kept
    raise DataError(f"{path}:{line}: `{name}` is {value!r}; give a text{' or a number' if name == 'id' else ''}.")


def _number(value: Any, name: str, path: Path, line: int) -> float | None:
    """The number in a cell; None for an empty one, which means not measured."""
    if isinstance(value, str):
        value = _SPELLED.get(value.strip().casefold(), value)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}:{line}: `{name}` is {str(value)[:40]!r}, which is no number.") from error
    return None if math.isnan(number) else number


def _score(value: Any, path: Path, line: int) -> float | None:
    score = _number(value, "score", path, line)
    if score is not None and not -_SLIP <= score <= 1 + _SLIP:
        raise DataError(f"{path}:{line}: the score {score:g} is not in 0 to 1; divide the scores by their maximum.")
    return score if score is None else min(max(score, 0.0), 1.0)


def _cost(value: Any, path: Path, line: int) -> float:
    cost = _number(value, "cost", path, line)
    if cost is not None and not 0 <= cost < math.inf:
        raise DataError(f"{path}:{line}: the cost {cost:g} is no cost; give 0 or more, or leave it out.")
    return math.nan if cost is None else cost
