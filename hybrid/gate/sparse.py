"""Sparse gating: softmax over the best k of many, and keeping the load of the many even.

The mixture of experts of Shazeer et al. 2017 (arXiv 1701.06538), here over adapters and whole requests. Two terms say
how uneven a load is: the importance of Shazeer et al., which sees the weights, and the loss of Switch Transformers
(Fedus et al. 2021, arXiv 2101.03961), which sees what was dispatched, too. Pure numpy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers
from hybrid.gate.logit import softmax

#: rounds in which a bias is fitted, its steps ever smaller
_ROUNDS = 60


def top_k_softmax(scores: Numbers, k: int, temperature: float = 1.0, bias: Numbers | None = None) -> Numbers:
    """Weights [n, arms] from scores [n, arms]: softmax over the `k` highest of each row, zero elsewhere.

    Equations 3 and 5 of Shazeer et al. 2017, without their noise. `bias` [arms] counts in the choice of the k and not
    in their weights (Wang et al. 2024, arXiv 2408.15664, equation 3). Of equal scores the first are taken.
    """
    kept = _chosen(scores if bias is None else scores + bias, k)
    return softmax(np.where(kept, scores / temperature, -np.inf))


def load_balance(weights: Numbers) -> float:
    """How uneven the load of weights [n, arms] is: 0 where every arm gets the same, arms − 1 where one gets all.

    The squared coefficient of variation of the importance, equations 6 and 7 of Shazeer et al. 2017 with a factor of 1.
    """
    importance = weights.sum(axis=0)
    return float(importance.var() / importance.mean() ** 2)


def switch_balance(scores: Numbers, k: int = 1) -> float:
    """How uneven a choice of `k` by scores [n, arms] is: 1 where it is even, arms where one gets all and is sure of it.

        arms · Σᵢ fᵢ · Pᵢ          fᵢ: the share of the choices that fell on arm i (equation 5)
                                   Pᵢ: its mean probability, by a softmax over all arms (equation 6)

    The loss of Switch Transformers, equation 4 of Fedus et al. 2021 with a factor of 1. An arm that is chosen often and
    narrowly costs less than one that is chosen often and surely, which the importance alone would not tell at k = 1.
    """
    chosen = _chosen(scores, k).mean(axis=0)
    probability = softmax(scores).mean(axis=0)
    return float(len(chosen) * (chosen / chosen.sum()) @ probability)


def balanced(scores: Numbers, k: int, strength: float) -> Numbers:
    """A bias [arms], no entry beyond ±`strength`, that evens the load over a sample of scores [n, arms].

    It walks as in balancing without an auxiliary loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1): an arm chosen
    more often than the mean is lowered by a step, others are raised, and steps shrink. Of all biases on the way that
    make the load no less even than none does, the one with the least `balance_loss` is kept.
    """
    bias = best = np.zeros(scores.shape[1])
    none, least = float(_chosen(scores, k).mean(axis=0).var()), np.inf
    for step in strength * np.geomspace(1 / 2, 1 / 50, _ROUNDS):
        load = _chosen(scores + bias, k).mean(axis=0)
        if load.var() <= none and (found := balance_loss(scores, k, bias)) < least:
            least, best = found, bias
        bias = np.clip(bias + step * np.sign(load.mean() - load), -strength, strength)
    return best


def balance_loss(scores: Numbers, k: int, bias: Numbers) -> float:
    """Both terms of the load under a bias [arms], the importance's and Switch's; 0 where it is even by both."""
    return load_balance(top_k_softmax(scores, k, bias=bias)) + switch_balance(scores + bias, k) - 1


def _chosen(scores: Numbers, k: int) -> npt.NDArray[np.bool_]:
    """Which of each row are among its `k` highest."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order, True, axis=1)
    return kept
