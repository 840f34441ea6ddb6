"""Makes scores mean what they say, and says how unusual a request is, from predictions for rows that were held out.

Calibration: isotonic regression (Zadrozny & Elkan 2002) on bins of equal size, joined by straight lines so that it
never makes two different scores equal. Conformal prediction (Vovk, Gammerman & Shafer 2005; split conformal as in
Angelopoulos & Bates 2021, arXiv 2107.07511): a p-value for "as usual as what taught", and the gap below the best score
within which the truly best arm lies for nine requests in ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers
from hybrid.gate.memory import USUAL_OF, Near
from hybrid.gate.outcomes import Table

#: bins of an expected calibration error (Naeini et al. 2015)
_BINS = 10
_STEPS, _LEAST = 40, 15
#: what of a calibrated score is the score before: it keeps apart what a bin would make equal
_KEPT = 1e-3
_COVERAGE = 0.9
#: held-out values kept to compare with: a p-value needs no finer steps than a two-thousandth
_VALUES = 2000


@dataclass(frozen=True, eq=False, slots=True)
class Isotonic:
    """A rising table: raw scores `x` and what they are worth, `y`."""

    x: Numbers
    y: Numbers

    @classmethod
    def of(cls, predicted: Numbers, true: Numbers) -> Isotonic:
        """Fitted to predictions and what came of them, each [n]."""
        from sklearn.isotonic import isotonic_regression

        order = np.argsort(predicted, kind="stable")
        bins = np.array_split(order, max(1, min(_STEPS, len(order) // _LEAST)))
        x = np.array([predicted[b].mean() for b in bins])
        worth = np.array([true[b].mean() for b in bins])
        y = isotonic_regression(worth, sample_weight=np.array([float(len(b)) for b in bins]), y_min=0.0, y_max=1.0)
        return cls(x, np.asarray(y, dtype=np.float64))

    def __call__(self, raw: Numbers) -> Numbers:
        """Calibrated scores in 0..1, in the order of the raw ones."""
        apart = (np.clip(raw, -1.0, 2.0) + 1.0) / 3.0
        return (1 - _KEPT) * np.interp(raw, self.x, self.y) + _KEPT * apart


def calibration_error(predicted: Numbers, true: Numbers) -> float:
    """The mean distance of ten bins' predictions from what came of them, weighted by their rows."""
    place = np.clip((predicted * _BINS).astype(int), 0, _BINS - 1)
    gaps = np.bincount(place, predicted - true, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(len(true), 1))


@dataclass(frozen=True, eq=False, slots=True)
class Conformal:
    """`usual` [m], rising: how near held-out requests came to those that taught. `gap`: how far below the best score
    an arm may be and still be the best, at 90 %."""

    usual: Numbers
    gap: float

    @classmethod
    def of(cls, near: Near, table: Table, score: Numbers) -> Conformal:
        """From the neighbours and the calibrated scores [n, arms] of held-out rows."""
        usual = np.sort(nearness(near))
        kept = np.linspace(0, len(usual) - 1, min(len(usual), _VALUES)).astype(np.intp)
        seen = np.where(table.measured, score, -np.inf)
        best = table.score >= np.nanmax(table.score, axis=1, keepdims=True)
        gaps = np.sort(seen.max(axis=1) - np.where(best, seen, -np.inf).max(axis=1))
        rank = int(np.ceil(_COVERAGE * (len(gaps) + 1))) - 1
        return cls(usual[kept], float(gaps[rank]) if rank < len(gaps) else 1.0)

    def typical(self, near: Near) -> Numbers:
        """[n]: the share of held-out requests that were no nearer (the conformal p-value)."""
        less = np.searchsorted(self.usual, nearness(near), side="right")
        return (1 + less) / (1 + len(self.usual))

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        return {"usual": self.usual, "gap": np.array([self.gap])}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Conformal:
        return cls(tensors["usual"], float(tensors["gap"][0]))


def nearness(near: Near) -> Numbers:
    """[n]: the mean cosine of the nearest five."""
    cosines = near.similarity[:, :USUAL_OF].astype(np.float64)
    known = np.isfinite(cosines)
    total = np.where(known, cosines, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), -1.0)
