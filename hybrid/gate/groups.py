"""The tasks that outcomes were gathered on, as groups: which of them a request is like, what every arm scored there.

A few outcomes of many arms are a trap: the best of twenty noisy means is mostly the luckiest one. So a mean comes with
its standard error, and a gate can be made to doubt an arm by that much (pessimism: Jin, Yang & Wang 2021, arXiv
2012.15085, "Is pessimism provably efficient for offline RL?").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.gate.columns import Columns
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.memory import Places

#: scores of one task vary at least this much, however alike a few of them came
_VARIANCE = 0.005


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """Linear discriminants (Fisher 1936), `weight` [columns, groups] and `bias` [groups]: groups are as likely as one
    another beforehand, and spread alike."""

    columns: Columns
    weight: Numbers
    bias: Numbers

    @classmethod
    def of(cls, vectors: Vectors, form: Numbers, group: Places, groups: int) -> Groups:
        """From unit vectors [n, d], forms [n, columns] and the group of each row [n]. The common covariance is shrunk
        (Ledoit & Wolf 2004), as rows may be fewer than columns. A group without rows is never found."""
        columns = Columns.of(form)
        x = columns(vectors, form)
        count = np.bincount(group, minlength=groups)
        if (count > 0).sum() < 2:
            return cls(columns, np.zeros((x.shape[1], groups)), np.where(count > 0, 0.0, -np.inf))
        from sklearn.covariance import ledoit_wolf

        middle = np.zeros((groups, x.shape[1]))
        np.add.at(middle, group, x)
        middle /= np.maximum(count, 1)[:, None]
        covariance, _ = ledoit_wolf(x - middle[group], assume_centered=True)
        weight = np.linalg.solve(covariance * len(x) / max(len(x) - groups, 1), middle.T)
        bias = -(middle.T * weight).sum(axis=0) / 2
        return cls(columns, weight, np.where(count > 0, bias, -np.inf))

    def __call__(self, vectors: Vectors, form: Numbers) -> Numbers:
        """[n, groups]: the probability that each request is of a group, were it of one of them."""
        said = self.columns(vectors, form) @ self.weight + self.bias
        odds = np.exp(said - said.max(axis=1, keepdims=True))
        chance: Numbers = odds / odds.sum(axis=1, keepdims=True)
        return chance

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What `load` needs."""
        return {**self.columns.tensors(), "weight": self.weight, "bias": self.bias}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Groups:
        """The groups that `tensors` was taken of."""
        return cls(Columns.load(tensors), tensors["weight"], tensors["bias"])


@dataclass(frozen=True, eq=False, slots=True)
class GroupMeans:
    """The mean score of every arm in every group, `mean` [groups, arms], its standard `error` [groups, arms], and where
    it was `measured` at all.

    With few rows a mean is drawn to the arm's own over all groups. An arm that nobody measured in a group is taken to
    be no better there than the arms that were: else it would be chosen for what it can do elsewhere.
    """

    mean: Numbers
    error: Numbers
    measured: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, score: Numbers, group: Places, groups: int) -> GroupMeans:
        """From scores [n, arms] and the group of each row [n]."""
        known = ~np.isnan(score)
        filled = np.where(known, score, 0.0)
        count, total, squares = (np.zeros((groups, score.shape[1])) for _ in range(3))
        np.add.at(count, group, known)
        np.add.at(total, group, filled)
        np.add.at(squares, group, filled**2)
        overall = filled.sum() / max(known.sum(), 1)
        arm = (filled.sum(axis=0) + overall) / (known.sum(axis=0) + 1)
        usual = total.sum(axis=1) / np.maximum(count.sum(axis=1), 1)
        mean = (total + arm) / (count + 1)
        # an arm's own few scores tell little of their spread: the arms of a group share theirs
        within = (squares - total**2 / np.maximum(count, 1)).sum(axis=1)
        variance = within / np.maximum((count - (count > 0)).sum(axis=1), 1) + _VARIANCE
        error = np.sqrt(variance[:, None] / (count + 1))
        return cls(np.where(count > 0, mean, np.minimum(arm, usual[:, None])), error, count > 0)

    @property
    def arm(self) -> Numbers:
        """[arms]: the mean over groups."""
        overall: Numbers = self.mean.mean(axis=0)
        return overall

    def doubt(self, group: Numbers) -> Numbers:
        """[n, arms]: how unsure the arms' means are for requests with these probabilities of groups [n, groups]."""
        return np.sqrt(group @ self.error**2)

    def bounded(self, score: Numbers, group: Numbers) -> Numbers:
        """Scores [n, arms] where no arm beats the measured ones in groups that it was not measured in, for requests
        with these probabilities of groups [n, groups]."""
        if self.measured.all():
            return score
        cover = group @ self.measured
        usual = (cover * score).sum(axis=1, keepdims=True) / np.maximum(cover.sum(axis=1, keepdims=True), 1e-9)
        bounded: Numbers = cover * score + (1 - cover) * np.minimum(score, usual)
        return bounded
