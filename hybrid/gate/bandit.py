"""Rewards of people adjust the gate's scores, a little: one Bayesian linear regression an arm.

What an arm's reward is expected to be above the mean of all rewards, for a request with the vector x:

    r(a, x) - r̄  ~  N(w_a · z, 1/α),   z = [1, P(x - m)],   w_a ~ N(0, I/λ)

P holds the leading directions in which the rewarded requests differ; α and λ are found by maximising the evidence
(MacKay 1992; scikit-learn's BayesianRidge). The decision depends on the request alone, so that no weighting by
propensities is needed to fit what a request's reward is (the direct method of Dudík, Langford & Li 2011, arXiv
1103.4601). An adjustment is the mean drawn to nought by one standard deviation, within bounds: what few have said, or
what they say differently, changes nothing. Predicting is numpy alone, a few microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import Refused
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.feedback import Rewards

#: rewards that may teach before anything is adjusted, and of one arm before its score is
ENOUGH, ENOUGH_OF_ARM = 50, 8
#: directions in which rewarded requests are told apart
_DIRECTIONS = 6
#: rewards that a direction needs
_PER_DIRECTION = 10


@dataclass(frozen=True, eq=False, slots=True)
class Bandit:
    """What rewards taught. `mean` float64 [arms, k + 1] and `spread` [arms, k + 1, k + 1] are the posterior of each
    arm's weights; `centre` [d] and `basis` [k, d] say how a request is seen; `usual` is the mean reward."""

    arms: tuple[str, ...]
    centre: Vectors
    basis: Vectors
    mean: Numbers
    spread: Numbers
    usual: float

    def expected(self, vectors: Vectors) -> tuple[Numbers, Numbers]:
        """What is expected above the usual reward, and its standard deviation: [n, arms] each, of unit vectors."""
        seen = np.hstack([np.ones((len(vectors), 1)), (vectors - self.centre) @ self.basis.T])
        variance = np.einsum("ni,aij,nj->na", seen, self.spread, seen)
        return seen @ self.mean.T, np.sqrt(np.maximum(variance, 0.0))

    def adjust(self, vector: Vectors, within: float) -> dict[str, float]:
        """How far each arm's score moves for a request with the unit vector [d]: between -within and within."""
        mean, deviation = self.expected(vector[None, :])
        sure = np.sign(mean[0]) * np.maximum(np.abs(mean[0]) - deviation[0], 0.0)
        return dict(zip(self.arms, np.clip(sure, -within, within).tolist(), strict=True))

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """As it is kept on disk."""
        words = json.dumps({"arms": list(self.arms), "usual": self.usual}).encode()
        return {
            "words": np.frombuffer(words, dtype=np.uint8),
            "centre": self.centre,
            "basis": self.basis,
            "mean": self.mean,
            "spread": self.spread,
        }

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Bandit:
        """What `tensors` was taken of. Raises Refused for what this version cannot read."""
        try:
            words = json.loads(tensors["words"].tobytes())
            found = cls(
                tuple(words["arms"]),
                tensors["centre"].astype(np.float32),
                tensors["basis"].astype(np.float32),
                tensors["mean"].astype(np.float64),
                tensors["spread"].astype(np.float64),
                float(words["usual"]),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise Refused(f"What feedback taught cannot be read ({error}); run `hybrid loop`.", param="gate") from error
        size = len(found.basis) + 1
        whole = (len(found.arms), size), (len(found.arms), size, size), found.centre.shape
        if (found.mean.shape, found.spread.shape, found.basis.shape[1:]) != whole:
            raise Refused("What feedback taught is not whole; run `hybrid loop`.", param="gate")
        return found


def fit(rewards: Rewards) -> Bandit | None:
    """What rewards teach; None where there are too few. The same rewards teach the same."""
    if len(rewards) < ENOUGH:
        return None
    arms = tuple(sorted({arm for arm in rewards.arms if rewards.arms.count(arm) >= ENOUGH_OF_ARM}))
    if not arms:
        return None
    centre = rewards.vectors.mean(axis=0)
    basis = _basis(rewards.vectors - centre)
    seen = np.hstack([np.ones((len(rewards), 1)), (rewards.vectors - centre) @ basis.T])
    usual = float(rewards.reward.mean())
    of = np.array(rewards.arms)
    fitted = [_posterior(seen[of == arm], rewards.reward[of == arm] - usual) for arm in arms]
    return Bandit(
        arms, centre, basis, np.stack([mean for mean, _ in fitted]), np.stack([spread for _, spread in fitted]), usual
    )


def _basis(away: Vectors) -> Vectors:
    """[k, d]: the leading directions, each scaled so that requests differ by about one in it."""
    k = min(_DIRECTIONS, len(away) // _PER_DIRECTION)
    _, sizes, directions = np.linalg.svd(away, full_matrices=False)
    kept = sizes[:k] > 1e-6 * max(float(sizes[0]), 1e-9)
    scale = np.sqrt(len(away)) / np.maximum(sizes[:k][kept], 1e-9)
    basis: Vectors = (directions[:k][kept] * scale[:, None]).astype(np.float32)
    return basis


def _posterior(seen: Numbers, reward: Numbers) -> tuple[Numbers, Numbers]:
    """(mean [k + 1], covariance [k + 1, k + 1]) of an arm's weights."""
    from sklearn.linear_model import BayesianRidge

    # rewards lie in 0 to 1: what is sure of noise and weights begins there, for few and equal thumbs too
    model = BayesianRidge(fit_intercept=False, alpha_1=1.0, alpha_2=0.1, lambda_1=1.0, lambda_2=0.05)
    model.fit(seen, reward)
    return np.asarray(model.coef_, dtype=np.float64), np.asarray(model.sigma_, dtype=np.float64)
