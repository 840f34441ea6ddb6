"""The conditional logit (McFadden 1974): alternatives with features, one common weight a column, a softmax."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers

Labels = npt.NDArray[np.intp]


def softmax(utilities: Numbers) -> Numbers:
    """Probabilities over the last axis; an arm at -inf gets none."""
    odds = np.exp(utilities - utilities.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def fitted(design: Numbers, open_: npt.NDArray[np.bool_], label: Labels, start: Numbers, penalty: Numbers) -> Numbers:
    """The weights [columns] that make the labels [rows] likeliest, by Newton's method on the penalised likelihood.

    `design` is [rows, alternatives, columns]; `open_` [rows, alternatives] says which a row may choose from. Weights
    are drawn from `start` by no more than the rows outweigh `penalty`, each [columns]; every alternative's rows weigh
    the same together.
    """
    rows = np.arange(len(label))
    importance = _balanced(label)
    theta = start.copy()

    def loss(at: Numbers) -> float:
        chance = softmax(np.where(open_, design @ at, -np.inf))[rows, label]
        return float(-(importance * np.log(chance + 1e-300)).sum() + (penalty * (at - start) ** 2).sum() / 2)

    for _ in range(30):
        chance = softmax(np.where(open_, design @ theta, -np.inf))
        expected = np.einsum("ra,rap->rp", chance, design)
        gradient = importance @ (expected - design[rows, label]) + penalty * (theta - start)
        weighted = design * np.sqrt(importance[:, None] * chance)[:, :, None]
        flat = weighted.reshape(-1, len(theta))
        curvature = flat.T @ flat - (expected * importance[:, None]).T @ expected + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        size = next((s for s in (1.0, 0.5, 0.25, 0.1, 0.01) if loss(theta - s * step) < loss(theta)), 0.0)
        theta = theta - size * step
        if size * float(np.abs(step).max()) < 1e-4:
            break
    return theta


def _balanced(label: Labels) -> Numbers:
    """Every alternative's rows weigh the same together, with the number of rows as the total."""
    counts = np.bincount(label)
    present = int((counts > 0).sum())
    return len(label) / present / counts[label]
