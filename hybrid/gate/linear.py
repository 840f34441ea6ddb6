"""One ridge regression an arm (Hoerl & Kennard 1970) on the request's vector and its form, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybrid.gate.columns import Columns
from hybrid.gate.features import Numbers
from hybrid.gate.memory import AROUND, Memory, Places
from hybrid.gate.study import Asked, Study, Tensors, fill

PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """`weight` [columns, arms] and `bias` [arms]."""

    kind: ClassVar[str] = "linear"

    columns: Columns
    weight: Numbers
    bias: Numbers

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        tried: list[list[tuple[Places, Numbers]]] = [[] for _ in PENALTIES]
        for fold in study.folds:
            found = cls.ridge(study.asked.part(fold.fitted), study.table.score[fold.fitted], PENALTIES)
            for parts, linear in zip(tried, found, strict=True):
                parts.append((fold.tried, linear.raw(fold.asked)))
        for penalty, parts in zip(PENALTIES, tried, strict=True):
            yield penalty, fill(len(study.table), parts)

    @classmethod
    def fit(cls, study: Study, setting: float) -> Linear:
        return cls.ridge(study.asked, study.table.score, (setting,))[0]

    @classmethod
    def ridge(cls, asked: Asked, score: Numbers, penalties: Sequence[float]) -> list[Linear]:
        """One for every penalty, fitted to scores [n, arms] with NaN where nothing is known."""
        columns = Columns.of(asked.form)
        found = _ridge(columns(asked.vectors, asked.form), score, penalties)
        return [cls(columns, weight, bias) for weight, bias in found]

    def raw(self, asked: Asked) -> Numbers:
        return self.columns(asked.vectors, asked.form) @ self.weight + self.bias

    @property
    def reach(self) -> int:
        return AROUND

    def tensors(self) -> Tensors:
        return {**self.columns.tensors(), "weight": self.weight, "bias": self.bias}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> Linear:
        return cls(Columns.load(tensors), tensors["weight"], tensors["bias"])


def _ridge(x: Numbers, score: Numbers, penalties: Sequence[float]) -> list[tuple[Numbers, Numbers]]:
    """(weight [columns, arms], bias [arms]) of every penalty. Arms measured on the same rows share the one costly
    step; an arm without rows is expected to be as good as the mean of all."""
    out = [(np.zeros((x.shape[1], score.shape[1])), np.full(score.shape[1], np.nanmean(score))) for _ in penalties]
    measured = ~np.isnan(score)
    patterns, which = np.unique(measured, axis=1, return_inverse=True)
    for p in range(patterns.shape[1]):
        rows, arms = patterns[:, p], np.flatnonzero(which == p)
        if not rows.any():
            continue
        known, values = (x, score[:, arms]) if rows.all() else (x[rows], score[np.ix_(rows, arms)])
        middle, mean = known.mean(axis=0), values.mean(axis=0)
        centred = known - middle
        size, basis = np.linalg.eigh(centred.T @ centred)
        seen = basis.T @ (centred.T @ (values - mean))
        for (weight, bias), penalty in zip(out, penalties, strict=True):
            weight[:, arms] = basis @ (seen / (np.maximum(size, 0.0) + penalty)[:, None])
            bias[arms] = mean - middle @ weight[:, arms]
    return out
