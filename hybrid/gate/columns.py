"""What regressions see of a request: its vector, and its form on a scale of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers, Vectors

#: a column of the form varies as much as a few columns of a unit vector
_FORM_SCALE = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class Columns:
    """Makes the columns that regressions see: the vector, and the form standardised by `middle` and `spread`."""

    middle: Numbers
    spread: Numbers

    @classmethod
    def of(cls, form: Numbers) -> Columns:
        """Measured on the forms [n, columns] of the rows that are fitted."""
        return cls(form.mean(axis=0), np.maximum(form.std(axis=0), 1e-3))

    def __call__(self, vectors: Vectors, form: Numbers) -> Numbers:
        """[n, d + columns]."""
        form = np.clip((form - self.middle) / self.spread, -4, 4)
        return np.concatenate([vectors.astype(np.float64), _FORM_SCALE * form], axis=1)

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """What `load` needs."""
        return {"middle": self.middle, "spread": self.spread}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Columns:
        """The columns that `tensors` was taken of."""
        return cls(tensors["middle"], tensors["spread"])
