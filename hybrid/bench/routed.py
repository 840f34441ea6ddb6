"""What a gate's decisions would have scored and cost on measured outcomes, beside every fixed choice.

The yardstick is the report's own (`evaluation/comparing.py`): means over tasks of means over examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.adapters.listing import MIX
from hybrid.errors import DataError
from hybrid.evaluation.measured import family
from hybrid.evaluation.statistics import estimate, mean_of_tasks, paired
from hybrid.gate.features import Numbers
from hybrid.gate.memory import Places
from hybrid.gate.outcomes import Table
from hybrid.types import JSON
from hybrid.types.arm import PROMPT, Arm

#: ways of halving the examples of a task
_HALVINGS = 100


@dataclass(frozen=True, slots=True)
class Taken:
    """What the arms taken scored and cost, each [n]; `guessed` [n] where the arm was not measured on that example."""

    score: Numbers
    cost: Numbers
    guessed: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Field:
    """Measured outcomes, and the fixed ways of choosing among their arms."""

    table: Table

    def __post_init__(self) -> None:
        if str(PROMPT) not in self.table.arms:
            raise DataError("The report does not hold the arm `prompt`, which every decision may fall back to.")

    @cached_property
    def tasks(self) -> Mapping[str, Places]:
        """The rows of each task."""
        groups = np.array(self.table.groups)
        return {name: np.flatnonzero(groups == name) for name in dict.fromkeys(self.table.groups)}

    def taken(self, arms: Sequence[Arm]) -> Taken:
        """What came of sending every example to an arm [n]. An arm that was not measured on an example counts with its
        mean on the task, and one that was not measured there at all with the mean of `prompt`."""
        place = {name: i for i, name in enumerate(self.table.arms)}
        columns = np.array([place.get(str(arm), -1) for arm in arms], dtype=np.intp)
        known = (columns >= 0) & self.table.measured[np.arange(len(columns)), columns]
        return Taken(self._picked(self.table.score, columns), self._picked(self.table.cost, columns), ~known)

    def _picked(self, values: Numbers, columns: Places) -> Numbers:
        prompt = self.table.arms.index(str(PROMPT))
        out = np.where(columns >= 0, values[np.arange(len(columns)), columns], np.nan)
        for rows in self.tasks.values():
            means = _means(values[rows])
            common = means[prompt] if not np.isnan(means[prompt]) else np.nanmean(means)
            instead = np.where(columns[rows] >= 0, means[columns[rows]], common)
            instead = np.where(np.isnan(instead), common, instead)
            out[rows] = np.where(np.isnan(out[rows]), instead, out[rows])
        return out

    @cached_property
    def singles(self) -> Mapping[str, Places]:
        """Each one arm that was measured in every task: its column for every row [n]."""
        called: dict[str, dict[str, int]] = {}
        for task, rows in self.tasks.items():
            for column in np.flatnonzero(self.table.measured[rows].any(axis=0)).tolist():
                called.setdefault(family(self.table.arms[column], task), {})[task] = column
        return {
            name: np.array([columns[task] for task in self.table.groups], dtype=np.intp)
            for name, columns in called.items()
            if len(columns) == len(self.tasks)
        }

    @cached_property
    def best_single(self) -> tuple[str, Numbers]:
        """(the arm that scores best over all tasks, its scores [n], NaN where it was not asked)."""
        rows = np.arange(len(self.table))
        scores = {name: self.table.score[rows, columns] for name, columns in self.singles.items()}
        best = max(scores, key=lambda name: self.mean(scores[name]))
        return best, scores[best]

    @cached_property
    def best_unrouted(self) -> tuple[str, float] | None:
        """The best of the single arms that the gate has no part in: those that confer, and mixes, ask it for theirs."""
        rows, alone = np.arange(len(self.table)), {}
        for name, columns in self.singles.items():
            if not (Arm.parse(name).confers or Arm.parse(name).strategy == MIX):
                alone[name] = self.mean(self.table.score[rows, columns])
        return max(alone.items(), key=lambda one: one[1], default=None)

    def best_arm(self, task: str) -> tuple[str, float]:
        """The arm with the highest mean on a task, and that mean."""
        means = _means(self.table.score[self.tasks[task]])
        best = int(np.nanargmax(means))
        return self.table.arms[best], float(means[best])

    @cached_property
    def best_elsewhere(self) -> float:
        """What the best arm of each task comes to where it is not judged on the examples that it was chosen by: chosen
        on one half of them, judged on the other, the mean over `_HALVINGS` ways of halving."""
        dice = np.random.default_rng(0)
        return float(np.mean([self._halved(rows, dice) for rows in self.tasks.values()]))

    def _halved(self, rows: Places, dice: np.random.Generator) -> float:
        """`best_elsewhere` of one task; NaN where its examples cannot be halved."""
        found = []
        for _ in range(_HALVINGS):
            mixed = dice.permutation(rows)
            one, other = mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]
            found += [self._chosen(one, other), self._chosen(other, one)]
        return float(np.mean(found))

    def _chosen(self, by: Places, on: Places) -> float:
        """The mean on some rows of the arm that is best on others, among those that were asked all of either."""
        asked = np.flatnonzero(self.table.measured[[*by, *on]].all(axis=0))
        if not len(asked) or not len(by) or not len(on):
            return float("nan")
        best = asked[self.table.score[by][:, asked].mean(axis=0).argmax()]
        return float(self.table.score[on, best].mean())

    @cached_property
    def oracle(self) -> Numbers:
        """[n]: the best score of any arm on each example."""
        return np.asarray(np.nanmax(self.table.score, axis=1))

    @cached_property
    def random(self) -> Numbers:
        """[n]: the mean over the arms that were asked."""
        return np.asarray(np.nanmean(self.table.score, axis=1))

    @cached_property
    def rag_cost(self) -> Numbers:
        """[n]: what retrieval for every request costs: over the task's own corpus, or the mean of those measured."""
        out = np.full(len(self.table), np.nan)
        for task, rows in self.tasks.items():
            plain = [i for i, arm in enumerate(self.table.arms) if arm.partition(":")[0] == "rag"]
            mine = [i for i in plain if family(self.table.arms[i], task) == "rag"]
            cost = self.table.cost[rows][:, mine or plain]
            known = ~np.isnan(cost)
            out[rows] = np.where(known, cost, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)
        return out

    def mean(self, values: Numbers, rows: npt.NDArray[np.bool_] | None = None) -> float:
        """The mean over tasks of the means of what is known [n], of some rows alone where given."""
        kept = ~np.isnan(values) if rows is None else ~np.isnan(values) & rows
        found = [float(values[mine[kept[mine]]].mean()) for mine in self.tasks.values() if kept[mine].any()]
        return float(np.mean(found)) if found else float("nan")

    # --- beside one another ------------------------------------------------------------------------------------------

    def router(self, taken: Taken) -> JSON:
        """The gate beside random, the best single arm, the best arm of each task and the oracle."""
        auto = mean_of_tasks([taken.score[rows].tolist() for rows in self.tasks.values()])
        name, single = self.best_single
        gap = paired([_pair(taken.score[rows], single[rows]) for rows in self.tasks.values()])
        each = float(np.mean([self.best_arm(task)[1] for task in self.tasks]))
        oracle, best = self.mean(self.oracle), self.mean(single)
        room = oracle - best
        plain = self.best_unrouted
        return {
            "auto": auto.wire(),
            "random": round(self.mean(self.random), 6),
            "best_single": {"arm": name, "score": round(best, 6)},
            "best_unrouted": plain
            and {
                "arm": plain[0],
                "score": round(plain[1], 6),
                "recovered": round((auto.score - plain[1]) / (oracle - plain[1]), 4) if oracle > plain[1] else None,
            },
            "best_per_task": round(each, 6),
            "best_elsewhere": round(self.best_elsewhere, 6) if not np.isnan(self.best_elsewhere) else None,
            "oracle": round(oracle, 6),
            "recovered": round((auto.score - best) / room, 4) if room > 0 else None,
            "of_best_per_task": {
                "share": round(auto.score / each, 4) if each else None,
                "ci95": [round(end / each, 4) for end in (auto.low, auto.high)] if each else None,
            },
            "over_best_single": gap.wire(),
            "not_measured": int(taken.guessed.sum()),
        }

    def costs(self, taken: Taken) -> JSON:
        """Tokens an answer of the gate, of the best single arm, and with retrieval always, on the same examples."""
        known = ~np.isnan(self.rag_cost)
        rows = np.arange(len(self.table))
        single = self.table.cost[rows, self.singles[self.best_single[0]]]
        ours, rag = self.mean(taken.cost, known), self.mean(self.rag_cost)
        return {
            "auto": round(self.mean(taken.cost), 1),
            "best_single": round(self.mean(single), 1),
            "always_rag": round(rag, 1) if known.any() else None,
            "auto_there": round(ours, 1) if known.any() else None,
            "ratio": round(ours / rag, 4) if known.any() and rag else None,
        }

    def row(self, task: str, taken: Taken, arms: Sequence[Arm]) -> dict[str, Any]:
        """One task: how the gate did there."""
        rows = self.tasks[task]
        auto = estimate(taken.score[rows].tolist()).wire()
        best, score = self.best_arm(task)
        rag = self.rag_cost[rows]
        return {
            "task": task,
            "n": len(rows),
            "auto": auto["score"],
            "ci95": auto["ci95"],
            "random": round(float(self.random[rows].mean()), 4),
            "best_single": round(float(np.nanmean(self.best_single[1][rows])), 4),
            "best_arm": best,
            "best": round(score, 4),
            "oracle": round(float(self.oracle[rows].mean()), 4),
            "tokens": round(float(np.nanmean(taken.cost[rows])), 1),
            "rag_tokens": None if np.isnan(rag).all() else round(float(np.nanmean(rag)), 1),
            "not_measured": int(taken.guessed[rows].sum()),
            "taken": dict(Counter(str(arms[row]) for row in rows).most_common()),
        }


def _means(values: Numbers) -> Numbers:
    """[arms]: the means of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    means: Numbers = np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    return means


def _pair(a: Numbers, b: Numbers) -> tuple[list[float], list[float]]:
    both = ~np.isnan(a) & ~np.isnan(b)
    return a[both].tolist(), b[both].tolist()
