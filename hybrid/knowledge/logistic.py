"""Logistic regression over standardised columns: learned by scikit-learn, served as one product of a small matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from hybrid.knowledge.ranking import Floats
from hybrid.types import JSON


@dataclass(frozen=True, slots=True)
class Logistic:
    """A model of d columns: `mean`, `scale` and `weights` [d], and `bias`."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def logits(self, rows: Floats) -> Floats:
        """The log-odds [n] of rows [n, d]."""
        standard = (rows - np.array(self.mean)) / np.array(self.scale)
        return standard @ np.array(self.weights) + self.bias  # type: ignore[no-any-return]

    def scores(self, rows: Floats) -> Floats:
        """The probability [n] that each of the rows [n, d] is right."""
        return 1 / (1 + np.exp(-np.clip(self.logits(rows), -50, 50)))

    @classmethod
    def fit(cls, rows: Floats, right: Sequence[bool], *, freedom: float = 1.0) -> Self | None:
        """The model of rows [n, d] and which of them are right; None where all are, or none. The less `freedom`,
        the smaller its weights stay (scikit-learn's C)."""
        from sklearn.linear_model import LogisticRegression

        if len(set(right)) < 2:
            return None
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        scale[scale < 1e-9] = 1.0
        model: Any = LogisticRegression(C=freedom, max_iter=1000).fit((rows - mean) / scale, right)
        weights, bias = model.coef_[0], float(model.intercept_[0])
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights.tolist()), bias)

    @classmethod
    def read(cls, value: JSON) -> Self:
        """The model that `dataclasses.asdict` spelled. Raises KeyError, TypeError or ValueError for what is none."""
        columns = {key: tuple(map(float, value[key])) for key in ("mean", "scale", "weights")}
        return cls(columns["mean"], columns["scale"], columns["weights"], float(value["bias"]))
