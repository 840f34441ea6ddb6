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
    if clusters is not None and len(set(clusters)) < len(values):
        low, high = _clustered(values, clusters)
    elif is_rate(values):
        low, high = wilson(int(values.sum()), len(values))
    else:
        low, high = _interval([values])
    return Estimate(float(values.mean()), low, high, len(values))


def is_rate(values: Numbers) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a rate."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, n, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def mean_of_tasks(tasks: Sequence[Sequence[float]]) -> Estimate:
    """The mean over tasks of their mean scores; the bootstrap draws within each task."""
    strata = [np.asarray(scores, dtype=np.float64) for scores in tasks if len(scores)]
    if len(strata) == 1:
        return estimate(strata[0].tolist())
    low, high = _interval(strata)
    return Estimate(_mean(strata), low, high, sum(map(len, strata)))


def paired(tasks: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Difference:
    """How two arms differ on the same examples: one (scores of a, scores of b) a task, the mean over tasks.

    One task of rates is tested by McNemar, all else by the bootstrap. Raises ValueError for pairs of unequal length.
    """
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in tasks if len(a) or len(b)]
    if not pairs or any(len(a) != len(b) for a, b in pairs):
        raise ValueError("a paired comparison needs the scores of both arms on the same examples")
    gaps = [a - b for a, b in pairs]
    low, high = _interval(gaps)
    a, b = pairs[0]
    p = _mcnemar(a, b) if len(pairs) == 1 and is_rate(a) and is_rate(b) else _bootstrap_p(gaps)
    error = math.sqrt(sum(float(g.var(ddof=1)) / len(g) for g in gaps if len(g) > 1)) / len(gaps)
    return Difference(_mean(gaps), low, high, p, sum(map(len, gaps)), detectable(error))


def detectable(standard_error: float, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided 5 % test finds with that power, from its standard error."""
    from scipy.stats import norm

    return float((norm.ppf(1 - (1 - CONFIDENCE) / 2) + norm.ppf(power)) * standard_error)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


# --- the bootstrap -------------------------------------------------------------------------------------------------


def _interval(strata: Sequence[Numbers]) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if all(len(s) < 2 or np.ptp(s) == 0 for s in strata):
        return _mean(strata), _mean(strata)
    drawn = bootstrap(
        [s if len(s) > 1 else np.repeat(s, 2) for s in strata],
        lambda *samples, axis=-1: np.mean([s.mean(axis=axis) for s in samples], axis=0),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _clustered(values: Numbers, clusters: Sequence[Hashable]) -> tuple[float, float]:
    from scipy.stats import bootstrap

    groups: dict[Hashable, list[float]] = {}
    for cluster, value in zip(clusters, values.tolist(), strict=True):
        groups.setdefault(cluster, []).append(value)
    if len(groups) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    sums = np.array([sum(g) for g in groups.values()])
    sizes = np.array([float(len(g)) for g in groups.values()])
    drawn = bootstrap(
        (sums, sizes),
        lambda s, n, axis=-1: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def _bootstrap_p(gaps: Sequence[Numbers]) -> float:
    """Two-sided: how often means of samples drawn from centred differences are as far from 0 as the one seen."""
    rng = np.random.default_rng(0)
    seen = abs(_mean(gaps))
    means = np.zeros(RESAMPLES)
    for gap in gaps:
        centred = gap - gap.mean()
        means += centred[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(axis=1) / len(gaps)
    return float((np.sum(np.abs(means) >= seen - 1e-12) + 1) / (RESAMPLES + 1))


def _mcnemar(a: Numbers, b: Numbers) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[float(np.sum((a == x) & (b == y))) for y in (1, 0)] for x in (1, 0)]
    discordant = table[0][1] + table[1][0]
    return float(mcnemar(table, exact=discordant < _EXACT_BELOW, correction=True).pvalue) if discordant else 1.0


def _mean(strata: Sequence[Numbers]) -> float:
    return float(np.mean([s.mean() for s in strata]))


def total_variation(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Half the summed absolute difference of two sets of counts, each scaled to 1: 0 the same, 1 disjoint."""
    left, right = sum(a.values()) or 1, sum(b.values()) or 1
    return 0.5 * sum(abs(a.get(k, 0) / left - b.get(k, 0) / right) for k in {*a, *b})
