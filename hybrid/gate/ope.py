"""What another way of routing would have been worth, from decisions that were logged and rewarded: off-policy.

With the arm a that was taken with the propensity p and got the reward r, and the probability π(a | x) that the other
way gives it, w = π(a | x) ∕ p and q̂ an estimate of every arm's reward:

    IPS    mean of w·r                                   (Horvitz & Thompson 1952)
    SNIPS  Σ w·r ∕ Σ w                                   (Swaminathan & Joachims 2015)
    DR     mean of Σ_b π(b | x)·q̂(x, b) + w·(r - q̂(x, a))  (Dudík, Langford & Li 2011, arXiv 1103.4601)

Intervals are percentile bootstraps over decisions. A difference is concluded from DR, and only where enough logged
decisions tell the two ways apart: without exploration every propensity is 1, and what the log never tried is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybrid.gate.features import Numbers
from hybrid.gate.memory import Places
from hybrid.types import JSON

DRAWS = 1000
#: effective decisions without which nothing is concluded: of each way, and of those that tell two ways apart
ENOUGH, TELLING = 30.0, 10.0
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True, eq=False, slots=True)
class Logged:
    """n rewarded decisions: the arm `taken` [n] as a column, its `propensity` [n] above 0, and its `reward` [n]."""

    taken: Places
    propensity: Numbers
    reward: Numbers

    def weight(self, policy: Numbers) -> Numbers:
        """[n]: how much more often a way of routing, its probabilities [n, arms], takes the arm that was taken."""
        weight: Numbers = policy[np.arange(len(self.taken)), self.taken] / self.propensity
        return weight


@dataclass(frozen=True, slots=True)
class Value:
    """An estimated mean reward with its 95 % interval."""

    value: float
    low: float
    high: float

    def wire(self) -> JSON:
        """As `--json` shows it."""
        return {"value": round(self.value, 4), "ci95": [round(self.low, 4), round(self.high, 4)]}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Two ways of routing compared. `gain` is new less old (DR), None where nothing can be concluded; `worse` holds if
    its whole interval lies below zero. `words` say it; `telling` counts the decisions that tell the two apart."""

    words: str
    worse: bool = False
    gain: Value | None = None
    telling: float = 0.0
    n: int = 0

    def wire(self) -> JSON:
        """As `--json` shows it."""
        gain = self.gain.wire() if self.gain else None
        return {"n": self.n, "telling": round(self.telling, 1), "gain": gain, "worse": self.worse, "words": self.words}


def effective(weight: Numbers) -> float:
    """The effective sample size of importance weights [n] (Kish 1965): (Σw)² ∕ Σw²."""
    squares = float((weight * weight).sum())
    return float(weight.sum()) ** 2 / squares if squares > 0 else 0.0


def values(logged: Logged, policy: Numbers, expected: Numbers, seed: int = 0) -> Mapping[str, Value]:
    """`ips`, `snips` and `dr` of a way of routing with the probabilities [n, arms]; `expected` [n, arms] is q̂."""
    weight = logged.weight(policy)
    counts = _draws(len(weight), seed)
    ips, dr = weight * logged.reward, _doubly_robust(logged, policy, expected)
    whole, drawn = max(float(weight.sum()), 1e-12), np.maximum(counts @ weight, 1e-12)
    return {
        "ips": _value(float(ips.mean()), counts @ ips / len(ips)),
        "snips": _value(float(ips.sum()) / whole, (counts @ ips) / drawn),
        "dr": _value(float(dr.mean()), counts @ dr / len(dr)),
    }


def compare(logged: Logged, new: Numbers, old: Numbers, expected: Numbers, seed: int = 0) -> Verdict:
    """Whether a new way of routing is worse than the old one, from their probabilities [n, arms] and q̂ [n, arms]."""
    n = len(logged.taken)
    if not n:
        return Verdict("no decision of the holdout was rewarded yet")
    mine, theirs = logged.weight(new), logged.weight(old)
    telling = effective(np.abs(mine - theirs))
    differ = int((np.abs(new - old).sum(axis=1) > 1e-9).sum())
    if not differ:
        return Verdict(f"both choose alike on all {n} rewarded decisions of the holdout", n=n)
    few = min(effective(mine), effective(theirs)) < ENOUGH or telling < TELLING
    if few or _unseen(logged, new, old) > 0.5:
        return Verdict(_too_little(logged, n, differ, telling), telling=telling, n=n)
    terms = _doubly_robust(logged, new, expected) - _doubly_robust(logged, old, expected)
    gain = _value(float(terms.mean()), _draws(n, seed) @ terms / n)
    words = f"on {n} rewarded decisions it gains {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return Verdict(words, gain.high < 0, gain, telling, n)


def _unseen(logged: Logged, new: Numbers, old: Numbers) -> float:
    """The share of what the new way would do otherwise that no logged decision of its kind has tried."""
    rows = np.arange(len(logged.taken))
    apart = np.abs(new - old).sum(axis=1) > 1e-9
    # with exploration the weights of the new way average to one where it differs; what is missing was never tried
    covered = (new[rows, logged.taken] / logged.propensity)[apart].mean()
    return float(1.0 - min(covered, 1.0))


def _too_little(logged: Logged, n: int, differ: int, telling: float) -> str:
    why = "" if (logged.propensity < 1).any() else "; exploration is off, so only what was chosen anyway is known"
    return (
        f"the two differ on {differ} of {n} rewarded decisions of the holdout, and about {telling:.0f} of them tell "
        f"which is better: too little to conclude{why}"
    )


def _doubly_robust(logged: Logged, policy: Numbers, expected: Numbers) -> Numbers:
    """[n]: the terms whose mean is the DR estimate."""
    said = expected[np.arange(len(logged.taken)), logged.taken]
    terms: Numbers = (policy * expected).sum(axis=1) + logged.weight(policy) * (logged.reward - said)
    return terms


def _draws(n: int, seed: int) -> Numbers:
    """[draws, n]: how often each row is in each bootstrap sample."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)


def _value(value: float, drawn: Numbers) -> Value:
    low, high = np.percentile(drawn, _INTERVAL)
    return Value(value, float(low), float(high))
