"""What a score is worth: intervals, paired tests and the smallest difference that a sample could show.

Rates get Wilson's interval (1927), everything else a percentile bootstrap (Efron 1979) with a fixed seed; paired rates
are tested by McNemar (1947), other pairs by the bootstrap; many tests at once are corrected by Holm (1979).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.float64]]

CONFIDENCE = 0.95
RESAMPLES = 2000
_HITS, _MOST_DRAWS = 20, 40 * RESAMPLES
_EXACT_BELOW = 26  # McNemar's statistic is near enough to chi-squared from 25 discordant pairs on


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % interval."""

    score: float
    low: float
    high: float
    n: int

    def wire(self) -> dict[str, Any]:
        """As a report shows it."""
        return {"score": round(self.score, 6), "ci95": [round(self.low, 6), round(self.high, 6)], "n": self.n}


@dataclass(frozen=True, slots=True)
class Difference:
    """`a` minus `b` on the same examples, with its 95 % interval and the p value of no difference."""

    diff: float
    low: float
    high: float
    p: float
    n: int
    detectable: float

    def wire(self) -> dict[str, Any]:
        """As a report shows it; `detectable` is the smallest true difference found in 80 of 100 such samples."""
        interval = [round(self.low, 6), round(self.high, 6)]
        return {
            "diff": round(self.diff, 6), "ci95": interval, "p": round(self.p, 6), "n": self.n,
            "detectable": round(self.detectable, 6),
        }  # fmt: skip


def estimate(scores: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of scores in 0 to 1 with its interval. Scores that share a cluster (a document) are drawn together.

    Raises ValueError without scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise ValueError("an estimate needs at least one score")
    groups = _Groups.of(values, clusters)
    if is_rate(values) and not groups.shared:
        low, high = wilson(int(values.sum()), len(values))
    elif is_rate(values) and values.min() == values.max():  # nothing to draw from: as many trials as clusters
        low, high = wilson(int(values[0]) * len(groups.sums), len(groups.sums))
    else:
        low, high = _interval([groups])
    return Estimate(float(values.mean()), low, high, len(values))


def is_rate(values: Numbers) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a rate."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, n, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def rule_of_three(n: int) -> float:
    """The failure rate that n trials without one leave possible at 95 % (Hanley & Lippman-Hand 1983)."""
    return min(1.0, 3 / n)


def mean_of_tasks(tasks: Sequence[Sequence[float]], clusters: Sequence[Sequence[Hashable]] | None = None) -> Estimate:
    """The mean over tasks of their mean scores; the bootstrap draws within each task, whole clusters where given."""
    drawn = [(list(scores), None if clusters is None else clusters[i]) for i, scores in enumerate(tasks) if len(scores)]
    if len(drawn) == 1:
        return estimate(*drawn[0])
    strata = [_Groups.of(np.asarray(scores, np.float64), shared) for scores, shared in drawn]
    low, high = _interval(strata)
    return Estimate(_mean(strata), low, high, sum(len(scores) for scores, _ in drawn))


def paired(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]], clusters: Sequence[Sequence[Hashable]] | None = None
) -> Difference:
    """How two arms differ on the same examples: one (scores of a, scores of b) a task, the mean over tasks.

    One task of rates is tested by McNemar, all else by the bootstrap; so are rates that share `clusters` (documents),
    one sequence a task. Raises ValueError for pairs of unequal length.
    """
    if any(len(a) != len(b) for a, b in tasks) or not any(len(a) for a, _ in tasks):
        raise ValueError("a paired comparison needs the scores of both arms on the same examples")
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in tasks]
    shared: Sequence[Sequence[Hashable] | None] = clusters or [None] * len(pairs)
    gaps = [_Groups.of(a - b, c) for (a, b), c in zip(pairs, shared, strict=True) if len(a)]
    low, high = _interval(gaps)
    a, b = pairs[0]
    by_table = len(pairs) == 1 and is_rate(a) and is_rate(b) and not gaps[0].shared
    p = _mcnemar(a, b) if by_table else _bootstrap_p(gaps)
    error = math.sqrt(sum(g.standard_error**2 for g in gaps)) / len(gaps)
    return Difference(_mean(gaps), low, high, p, sum(len(a) for a, _ in pairs), detectable(error))


def detectable(standard_error: float, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided 5 % test finds with that power, from its standard error."""
    from scipy.stats import norm

    return float((norm.ppf(1 - (1 - CONFIDENCE) / 2) + norm.ppf(power)) * standard_error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


# --- the bootstrap -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Groups:
    """What is drawn together: the sum and the number of the scores of each cluster; one score each without clusters."""

    sums: Numbers
    sizes: Numbers

    @classmethod
    def of(cls, values: Numbers, clusters: Sequence[Hashable] | None) -> _Groups:
        if clusters is None or len(set(clusters)) == len(values):
            return cls(values, np.ones(len(values)))
        place = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
        member = [place[cluster] for cluster in clusters]
        sums, sizes = np.zeros(len(place)), np.zeros(len(place))
        np.add.at(sums, member, values)
        np.add.at(sizes, member, 1.0)
        return cls(sums, sizes)

    @property
    def shared(self) -> bool:
        return bool((self.sizes > 1).any())

    @property
    def mean(self) -> float:
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def standard_error(self) -> float:
        """Of the mean, between clusters; 0 for a single one."""
        n = len(self.sums)
        residuals = self.sums - self.mean * self.sizes
        return math.sqrt(n / (n - 1) * float(residuals @ residuals)) / float(self.sizes.sum()) if n > 1 else 0.0

    def draws(self, rng: np.random.Generator) -> Numbers:
        """The means of RESAMPLES samples drawn with replacement.

        How often each distinct value is drawn is multinomial: the same draws as one by one, in a fraction of the time
        where values repeat, as rates do.
        """
        values, counts = np.unique(np.stack([self.sums, self.sizes]), axis=1, return_counts=True)
        picked = rng.multinomial(len(self.sums), counts / len(self.sums), RESAMPLES)
        means: Numbers = (picked @ values[0]) / (picked @ values[1])
        return means


def _interval(strata: Sequence[_Groups]) -> tuple[float, float]:
    """Percentiles of the mean over strata of means drawn within each."""
    rng = np.random.default_rng(0)
    means = np.mean([stratum.draws(rng) for stratum in strata], axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _bootstrap_p(gaps: Sequence[_Groups]) -> float:
    """Two-sided: how often means of samples drawn from centred differences are as far from 0 as the one seen.

    Drawn until it happened often enough to tell how rare it is (Besag & Clifford 1991), or never did: a small p must be
    told from a smaller one, or no difference survives the correction of many.
    """
    rng = np.random.default_rng(0)
    centred = [_Groups(g.sums - g.mean * g.sizes, g.sizes) for g in gaps]
    seen, hits, drawn = abs(_mean(gaps)) - 1e-12, 0, 0
    while hits < _HITS and drawn < _MOST_DRAWS:
        means = np.mean([g.draws(rng) for g in centred], axis=0)
        hits, drawn = hits + int(np.sum(np.abs(means) >= seen)), drawn + RESAMPLES
    return (hits + 1) / (drawn + 1)


def _mcnemar(a: Numbers, b: Numbers) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[float(np.sum((a == x) & (b == y))) for y in (1, 0)] for x in (1, 0)]
    discordant = table[0][1] + table[1][0]
    return float(mcnemar(table, exact=discordant < _EXACT_BELOW, correction=True).pvalue) if discordant else 1.0


def _mean(strata: Sequence[_Groups]) -> float:
    return float(np.mean([stratum.mean for stratum in strata]))


def total_variation(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Half the summed absolute difference of two sets of counts, each scaled to 1: 0 the same, 1 disjoint."""
    left, right = sum(a.values()) or 1, sum(b.values()) or 1
    return 0.5 * sum(abs(a.get(k, 0) / left - b.get(k, 0) / right) for k in {*a, *b})
