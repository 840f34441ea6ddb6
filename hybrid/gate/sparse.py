"""Sparse gating: softmax over the best k of many, and keeping the load of the many even.

The mixture of experts of Shazeer et al. 2017 (arXiv 1701.06538), here over adapters and whole requests. Pure numpy.
"""

from __future__ import annotations

import numpy as np

from hybrid.gate.features import Numbers

#: rounds in which a bias is fitted, its steps ever smaller
_ROUNDS = 60


def top_k_softmax(scores: Numbers, k: int, temperature: float = 1.0, bias: Numbers | None = None) -> Numbers:
    """Weights [n, arms] from scores [n, arms]: softmax over the `k` highest of each row, zero elsewhere.

    Equations 3 and 5 of Shazeer et al. 2017, without their noise. `bias` [arms] counts in the choice of the k and not
    in their weights (Wang et al. 2024, arXiv 2408.15664, equation 3). Of equal scores the first are taken.
    """
    kept = _chosen(scores if bias is None else scores + bias, k)
    logits = np.where(kept, scores / temperature, -np.inf)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights: Numbers = odds / odds.sum(axis=1, keepdims=True)
    return weights


def load_balance(weights: Numbers) -> float:
    """How uneven the load of weights [n, arms] is: 0 where every arm gets the same, arms − 1 where one gets all.

    The squared coefficient of variation of the importance, equations 6 and 7 of Shazeer et al. 2017 with a factor of 1.
    """
    importance = weights.sum(axis=0)
    return float(importance.var() / importance.mean() ** 2)


def balanced(scores: Numbers, k: int, strength: float) -> Numbers:
    """A bias [arms], no entry beyond ±`strength`, that evens the load over a sample of scores [n, arms].

    Balancing without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1): an arm chosen more often than
    the mean is lowered by a step, others are raised. Steps shrink, and the evenest bias is kept: it is never worse than
    none.
    """
    bias = best = np.zeros(scores.shape[1])
    least = np.inf
    for step in np.geomspace(strength / 2, strength / 50, _ROUNDS) if strength > 0 else ():
        load = _chosen(scores + bias, k).mean(axis=0)
        uneven = float(load.var())
        if uneven < least:
            least, best = uneven, bias
        bias = np.clip(bias + step * np.sign(load.mean() - load), -strength, strength)
    return best


def _chosen(scores: Numbers, k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Which of each row are among its `k` highest."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept
