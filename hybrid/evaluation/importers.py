"""A task folder from somebody else's data: a Hugging Face data set of the local cache, or a table in a file.

What has splits keeps them; what has none is divided, the same way every time, labels in their shares. Rows that say
nothing, or ask what another row asks already, are left out and counted.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest, Conflict, DataError
from hybrid.evaluation.metrics import METRICS
from hybrid.evaluation.tasks import check_task
from hybrid.rooms import publish, write_json
from hybrid.settings import offline_environment
from hybrid.types import JSON

#: file name's end → the builder of `datasets`
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
#: what others call our splits
_CALLED = {
    "train": "train", "training": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev",
    "test": "test",
}  # fmt: skip
#: the share of dev and of test where a data set has none
SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which columns make a task. A name with dots goes into nested fields (`answers.text`).

    `reference` may hold a list: the first is the reference, all are alternatives. `labels` names the column by which
    the splits are balanced; where it is the reference too, the task is closed and its values are the labels.
    """

    input: str
    reference: str
    metric: str
    labels: str = ""
    name: str = ""
    instruction: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote: rows by split, and how many were left out."""

    name: str
    rows: Mapping[str, int]
    empty: int
    repeated: int


@dataclass(slots=True)
class _Sieve:
    """Takes what can be a row, once."""

    wanted: Wanted
    seen: set[str] = field(default_factory=set)
    empty: int = 0
    repeated: int = 0

    def rows(self, split: str, table: Iterable[JSON]) -> list[tuple[str, JSON]]:
        """(stratum, row) of what a table holds."""
        found = []
        for number, raw in enumerate(table):
            asked, answers = _text(_at(raw, self.wanted.input)), _texts(_at(raw, self.wanted.reference))
            if not asked.strip() or (not answers and self.wanted.metric != "ifeval"):
                self.empty += 1
                continue
            key = " ".join(asked.split()).casefold()
            if key in self.seen:
                self.repeated += 1
                continue
            self.seen.add(key)
            meta = {"references": answers} if len(answers) > 1 else {}
            reference = answers[0] if answers else ""
            row = {"id": f"{split}-{number}", "input": asked, "reference": reference, "meta": meta}
            found.append((_text(_at(raw, self.wanted.labels)) if self.wanted.labels else "", row))
        return found


def import_task(source: str, out: Path, wanted: Wanted, *, split: str = "", config: str = "") -> Imported:
    """Writes the task folder `out` from a file or a data set's id; `split` takes only one of its splits.

    Raises BadRequest for a column or metric that there is not, DataError where nothing can be read or the task that
    comes of it is out of order, Conflict when `out` exists.
    """
    if wanted.metric not in METRICS:
        raise BadRequest(f"The metric {wanted.metric!r} is unknown; use one of {', '.join(METRICS)}.", param="metric")
    if out.exists():
        raise Conflict(f"{out} exists already; name another folder, or remove that one.")
    sieve = _Sieve(wanted)
    tables = _tables(source, split, config)
    for called, table in tables.items():
        _look_at_columns(called, table, wanted)
    parts = {name: sieve.rows(name, table) for name, table in _ours(tables).items()}
    rows = _divided(parts, wanted.seed)
    name = wanted.name or out.resolve().name
    with publish(out) as folder:
        _write(folder, name, rows, wanted, source)
        complaints = check_task(folder).complaints
        if complaints:
            raise DataError(f"What {source} makes is no sound task: {complaints[0]} ({len(complaints)} complaints).")
    return Imported(name, {part: len(found) for part, found in rows.items()}, sieve.empty, sieve.repeated)


def _tables(source: str, split: str, config: str) -> dict[str, list[JSON]]:
    """The rows of every split, or of the one named. Raises DataError."""
    offline_environment()
    import datasets

    path = Path(source)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # a file needs no place in the user's cache
            if path.is_file():
                found = datasets.load_dataset(_builder(path), cache_dir=scratch, **_file(path))
            else:
                found = datasets.load_dataset(source, config or None)
            tables = {name: list(_plain(table)) for name, table in found.items()}
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "cannot be read" if path.exists() else "is no file, and no data set in the local Hugging Face cache"
        raise DataError(f"{source} {where}: {_first_line(error)}") from error
    if split and split not in tables:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(tables)}.")
    return {split: tables[split]} if split else tables


def _builder(path: Path) -> str:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"{path}: files end in {', '.join(BUILDERS)}; give one of those, or the id of a data set.")
    return builder


def _file(path: Path) -> dict[str, Any]:
    return {"data_files": str(path.resolve()), **({"sep": "\t"} if path.suffix.lower() == ".tsv" else {})}


def _plain(table: Any) -> Iterator[JSON]:
    """The rows of a table, class numbers as the names they stand for."""
    names = {column: kind.int2str for column, kind in table.features.items() if hasattr(kind, "int2str")}
    for row in table:
        named = {c: to_name(row[c]) for c, to_name in names.items() if isinstance(row[c], int) and row[c] >= 0}
        yield {**row, **named}


def _look_at_columns(called: str, table: Sequence[JSON], wanted: Wanted) -> None:
    for option in ("input", "reference", "labels"):
        column = getattr(wanted, option)
        if column and table and column not in table[0] and column.partition(".")[0] not in table[0]:
            known = ", ".join(table[0])
            raise BadRequest(f"--{option} {column!r}: {called} has no such column. It has {known}.", param=option)


def _ours(tables: Mapping[str, list[JSON]]) -> dict[str, list[JSON]]:
    """The tables under our names; the one that there is is the training split, whatever it is called.

    Held-out rows come first, so that of two equal questions the training one goes.
    """
    if len(tables) == 1:
        return {"train": next(iter(tables.values()))}
    found: dict[str, list[JSON]] = {}
    for called, table in tables.items():
        name = _CALLED.get(called.casefold())
        if name:
            found.setdefault(name, table)
    if "train" not in found:
        raise DataError(f"Its splits are {', '.join(tables)} and none is `train`; name the one to divide with --split.")
    return {name: found[name] for name in ("test", "dev", "train") if name in found}


def _divided(parts: Mapping[str, list[tuple[str, JSON]]], seed: int) -> dict[str, list[JSON]]:
    """Three splits: those that are missing are drawn from the training rows, every stratum giving its share."""
    train, dice = list(parts["train"]), random.Random(seed)
    out = {name: [row for _, row in parts[name]] for name in ("dev", "test") if name in parts}
    total = len(train)
    for name in ("test", "dev"):
        if name not in out:
            drawn = _drawn(train, max(1, round(total * SHARE)), dice)
            out[name] = [row for place, (_, row) in enumerate(train) if place in drawn]
            train = [pair for place, pair in enumerate(train) if place not in drawn]
    if not train:
        raise DataError("There are too few rows for three splits; a task needs dozens at least.")
    return {"train": [row for _, row in train], "dev": out["dev"], "test": out["test"]}


def _drawn(rows: Sequence[tuple[str, JSON]], wanted: int, dice: random.Random) -> set[int]:
    """The places of about `wanted` rows: every stratum's share, the remainders going to the largest fractions."""
    strata: dict[str, list[int]] = {}
    for place, (stratum, _) in enumerate(rows):
        strata.setdefault(stratum, []).append(place)
    exact = {name: wanted * len(places) / max(1, len(rows)) for name, places in strata.items()}
    taken = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: (taken[n] - exact[n], n))[: wanted - sum(taken.values())]:
        taken[name] += 1
    return {place for name, places in strata.items() for place in dice.sample(places, min(taken[name], len(places)))}


def _write(folder: Path, name: str, rows: Mapping[str, list[JSON]], wanted: Wanted, source: str) -> None:
    known = [row["reference"] for part in rows.values() for row in part]
    closed = bool(wanted.labels) and wanted.labels == wanted.reference
    facts = {"name": name, "instruction": wanted.instruction, "metric": wanted.metric, "source": Path(source).name}
    for part, found in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    write_json(folder / "task.json", {**facts, **({"labels": sorted(set(known))} if closed else {})})


def _at(row: Any, column: str) -> Any:
    """The value of a column, `a.b` within `a`; None where there is none."""
    if isinstance(row, Mapping) and column in row:
        return row[column]
    first, dot, rest = column.partition(".")
    return _at(row[first], rest) if dot and isinstance(row, Mapping) and first in row else None


def _text(value: Any) -> str:
    """A value as a model would be shown it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in dict.fromkeys(map(_text, values)) if text.strip()]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
