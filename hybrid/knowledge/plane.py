"""A corpus as a picture: its vectors seen along the two directions in which they differ most.

These are its first principal components (Pearson 1901, "On lines and planes of closest fit to systems of points in
space"), from the covariance: of a few thousand vectors they take less time than reading the vectors does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.embed import Vectors

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Plane:
    """`middle` [dim], the two orthonormal `axes` [2, dim], and the share 0..1 of all variance that each holds."""

    middle: Floats
    axes: Floats
    shares: tuple[float, float]

    @classmethod
    def of(cls, vectors: Vectors) -> Plane:
        """The plane of vectors float32 [n, dim], n >= 1, dim >= 2; the same vectors give the same picture."""
        middle = vectors.mean(axis=0, dtype=np.float64)
        centred = vectors - middle
        values, directions = np.linalg.eigh(centred.T @ centred)  # ascending
        axes = directions[:, :-3:-1].T
        # an axis has no sign of its own: its largest number is positive
        heads = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
        total = float(values.clip(0).sum())
        first, second = (float(max(value, 0.0)) / total if total > 0 else 0.0 for value in values[:-3:-1])
        return cls(middle, axes * np.where(heads < 0, -1.0, 1.0), (first, second))

    def places(self, vectors: npt.NDArray[Any]) -> Floats:
        """Where vectors [n, dim] lie on it: [n, 2]."""
        places: Floats = (vectors - self.middle) @ self.axes.T
        return places
