"""What every benchmark returns: rows, a summary, and the goals beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Goal:
    """A promise about one number: at most `limit`, or at least."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise was kept this time."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign, verdict = "≥" if self.at_least else "≤", "met" if self.met else "MISSED"
        return f"{self.what}: {self.value:g}, goal {sign} {self.limit:g}: {verdict}"


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a benchmark. The rows share their keys; what concerns all of them is in the summary."""

    benchmark: str
    rows: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    goals: tuple[Goal, ...]

    def wire(self) -> dict[str, Any]:
        """The JSON object."""
        goals = [asdict(goal) | {"met": goal.met} for goal in self.goals]
        return {"benchmark": self.benchmark, "rows": list(self.rows), "summary": self.summary, "goals": goals}

    def table(self) -> str:
        """The rows in columns, then the summary, then the goals."""
        cells = [list(self.rows[0]), *([_cell(value) for value in row.values()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        facts = [f"{key}: {_cell(value)}" for key, value in self.summary.items()]
        return "\n".join([*lines, "", *facts, *map(str, self.goals)])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)


def ratio(ours: Sequence[float], other: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """The median over rounds of ours by the other, with its 95 % percentile bootstrap interval (Efron 1979)."""
    paired = np.divide(ours, other)
    drawn = np.random.default_rng(0).choice(paired, (DRAWS, len(paired)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return {
        "median": round(float(np.median(paired)), digits),
        "ci95": [round(float(low), digits), round(float(high), digits)],
    }
