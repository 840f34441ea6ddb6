"""The nearest taught requests vote, each by its likeness: the simplest gate, and a hard one to beat
(RouterBench, Hu et al. 2024, arXiv 2403.12031; Li 2025, "Rethinking predictive modeling for LLM routing").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers
from hybrid.gate.memory import Memory, Near
from hybrid.gate.study import NEIGHBOURS, Asked, Study, Tensors, fill

#: (neighbours, the difference in cosine at which a vote weighs a third)
_SETTINGS = tuple((k, temperature) for k in (8, 24, 64, NEIGHBOURS) for temperature in (0.04, 0.15))
#: how many equal votes the arm's mean in the neighbours' groups counts as
_PRIOR = 2.0
_ROWS = 512


@dataclass(frozen=True, eq=False, slots=True)
class Knn:
    """`k` neighbours vote with weight exp((cosine - best cosine) / temperature); an arm that a neighbour was not
    measured with gets no vote of it, and every arm leans on its mean in the groups of the neighbours, `prior` [groups,
    arms]."""

    kind: ClassVar[str] = "knn"

    memory: Memory
    prior: Numbers
    k: int
    temperature: float

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        for n, (k, temperature) in enumerate(_SETTINGS):
            parts = []
            for fold in study.folds:
                prior = fold.means.mean[study.memory.group]
                parts.append((fold.tried, _votes(fold.asked.near, study.memory.score, prior, k, temperature)))
            yield float(n), fill(len(study.table), parts)

    @classmethod
    def fit(cls, study: Study, setting: float) -> Knn:
        return cls(study.memory, study.means.mean, *_SETTINGS[int(setting)])

    def raw(self, asked: Asked) -> Numbers:
        prior = self.prior[self.memory.group]
        return _votes(asked.near, self.memory.score, prior, self.k, self.temperature)

    @property
    def reach(self) -> int:
        return self.k

    def tensors(self) -> Tensors:
        return {"setting": np.array([self.k, self.temperature]), "prior": self.prior}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> Knn:
        k, temperature = tensors["setting"].tolist()
        return cls(memory, tensors["prior"], int(k), float(temperature))


def _votes(near: Near, score: Numbers, prior: Numbers, k: int, temperature: float) -> Numbers:
    """[n, arms] from scores [m, arms] and what is expected beforehand [m, arms]."""
    out = np.empty((len(near.rows), score.shape[1]))
    for start in range(0, len(out), _ROWS):
        rows = near.rows[start : start + _ROWS, :k]
        cosines = near.similarity[start : start + _ROWS, :k].astype(np.float64)
        best = np.maximum(cosines[:, :1], -1.0)  # -1 where none may vote
        weight = np.exp((cosines - best) / temperature)
        said = score[rows]
        heard = weight[:, :, None] * ~np.isnan(said)
        total = (heard * np.nan_to_num(said)).sum(axis=1)
        expected = np.einsum("nk,nka->na", weight + 1e-9, prior[rows]) / (weight + 1e-9).sum(axis=1, keepdims=True)
        out[start : start + _ROWS] = (total + _PRIOR * expected) / (heard.sum(axis=1) + _PRIOR)
    return out
