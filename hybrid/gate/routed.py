"""What a way of routing would have scored on measured outcomes, beside what it could have: one yardstick for
cross-validation, for `hybrid gate eval` and for the decision whether a new gate replaces an old one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.gate.features import Numbers
from hybrid.gate.memory import Places
from hybrid.gate.outcomes import Table
from hybrid.types import JSON
from hybrid.types.arm import Arm

#: an arm measured less often than this in a group (or than on half of it) is not judged as the only arm
_ENOUGH = 10
_EXACT = 1e-12
#: strategies that take a task's own examples or corpus: one arm, whatever task they are named after
_OWN = ("few_shot", "rag", "head")


def slack_of(quality_cost: float) -> float:
    """How much of the expected score a cheaper answer may cost, for the knob of 0 (cheapest) to 1 (best)."""
    return (1 - quality_cost) ** 2


def cheapest_within(score: Numbers, cost: Numbers, slack: float) -> int:
    """The cheapest arm [arms] whose score is within `slack` of the best. An unknown cost counts as the dearest; among
    equally cheap arms the higher score wins."""
    return int(cheapest(score[None, :], cost[None, :], slack)[0])


def cheapest(score: Numbers, cost: Numbers, slack: float) -> Places:
    """`cheapest_within` for every row of [n, arms]."""
    close = score >= score.max(axis=1, keepdims=True) - slack - _EXACT
    price = np.where(np.isnan(cost), np.inf, cost)
    ranked: Places = np.lexsort((-score, price, ~close), axis=-1)
    return ranked[:, 0]


def chosen(table: Table, score: Numbers, cost: Numbers, slack: float) -> Places:
    """[n]: the arm taken in every row; the best-scored one that was measured where the one wanted was not."""
    wanted = cheapest(score, cost, slack)
    rows = np.arange(len(table))
    instead = np.where(table.measured, score, -np.inf).argmax(axis=1)
    return np.where(table.measured[rows, wanted], wanted, instead)


@dataclass(frozen=True, slots=True)
class Routed:
    """Mean scores over groups and, within them, over queries. `recovered` is (auto - best single) / (oracle - best
    single), None where the oracle is no better; costs are None where none is known."""

    auto: float
    random: float
    best_arm: str
    best_single: float
    oracle: float
    recovered: float | None
    cost: float | None
    best_cost: float | None
    n: int

    def wire(self) -> JSON:
        """As `hybrid gate eval` shows it."""
        return {
            "auto": round(self.auto, 6),
            "random": round(self.random, 6),
            "best_single": {"arm": self.best_arm, "score": round(self.best_single, 6)},
            "oracle": round(self.oracle, 6),
            "recovered": None if self.recovered is None else round(self.recovered, 6),
            "cost": {"auto": self.cost, "best_single": self.best_cost},
            "n": self.n,
        }


def judge(table: Table, taken: Places, worth: Numbers | None = None) -> Routed:
    """The yardstick for the arms taken [n], each measured on its row, unless `worth` [n] says what each is worth."""
    weights, rows = table.weights, np.arange(len(table))
    auto = float(weights @ (table.score[rows, taken] if worth is None else worth))
    oracle = float(weights @ np.nanmax(table.score, axis=1))
    arm, best, best_cost = best_single(table)
    room = oracle - best
    return Routed(
        auto=auto,
        random=float(weights @ np.nanmean(table.score, axis=1)),
        best_arm=arm,
        best_single=best,
        oracle=oracle,
        recovered=(auto - best) / room if room > _EXACT else None,
        cost=mean_cost(table.cost[rows, taken], weights),
        best_cost=best_cost,
        n=len(table),
    )


def best_single(table: Table) -> tuple[str, float, float | None]:
    """(arm, score, cost) of the one arm that scores best everywhere."""
    found = singles(table)
    best = max(found, key=lambda name: found[name][0])
    return best, *found[best]


def singles(table: Table) -> dict[str, tuple[float, float | None]]:
    """(score, cost) of every arm as the only one.

    An arm counts that was measured in every group, on more than a few of its queries; where none was, any does.
    """
    columns = _families(table)
    found: dict[str, tuple[float, float | None]] = {}
    for least in (_ENOUGH, 1, 0):
        for name, (score, cost) in columns.items():
            if _everywhere(table, score, least):
                weights = _by_group(table, table.weights * ~np.isnan(score))
                found[name] = float(weights @ np.nan_to_num(score)), mean_cost(cost, weights)
        if found:
            break
    return found


def _families(table: Table) -> dict[str, tuple[Numbers, Numbers]]:
    """Scores and costs [n] of each arm; one that is named after the task it answers is the same on every task."""
    names: dict[str, tuple[Numbers, Numbers]] = {}
    place, groups = table.places
    number = {group: n for n, group in enumerate(groups) if group}
    for a, arm in enumerate(table.arms):
        task, family = _own_task(arm)
        rows = place == number.get(task, -1)
        for name, part in ((family, rows), (arm, ~rows)):
            if not np.isnan(table.score[part, a]).all():
                score, cost = names.setdefault(name, (np.full(len(table), np.nan), np.full(len(table), np.nan)))
                score[part], cost[part] = table.score[part, a], table.cost[part, a]
    return names


def _own_task(arm: str) -> tuple[str, str]:
    """(the task that an arm is named after, its strategy), or nothing and itself."""
    try:
        parsed = Arm.parse(arm)
    except ValueError:
        return "", arm
    return (parsed.args[0], parsed.strategy) if parsed.strategy in _OWN and len(parsed.args) == 1 else ("", arm)


def _everywhere(table: Table, score: Numbers, least: int) -> bool:
    known = ~np.isnan(score)
    if least == 0:
        return bool(known.any())
    place, _ = table.places
    rows = np.bincount(place)
    return bool((np.bincount(place, known) >= np.minimum(least, -(-rows // 2))).all())


def _by_group(table: Table, weights: Numbers) -> Numbers:
    """Weights that sum to the same in every group that has any."""
    place, _ = table.places
    total = np.bincount(place, weights)
    shared: Numbers = weights / np.where(total > 0, total, 1)[place] / max(int((total > 0).sum()), 1)
    return shared


def mean_cost(cost: Numbers, weights: Numbers) -> float | None:
    """The weighted mean of the known costs, to six significant digits: they may be as small as 1e-6."""
    known = ~np.isnan(cost) & (weights > 0)
    if not known.any():
        return None
    return float(f"{float(weights[known] @ cost[known] / weights[known].sum()):.6g}")


def ahead_by(left: Numbers, right: Numbers) -> tuple[float, float]:
    """(mean difference of two ways of choosing, its standard error) from the scores of both on the same rows [n]."""
    gap = left - right
    return float(gap.mean()), float(gap.std() / np.sqrt(max(len(gap) - 1, 1)))
