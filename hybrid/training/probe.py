"""A quick measure of what rows are worth: a linear head on the embedder's vectors, trained in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.embed import Vectors

Probabilities = npt.NDArray[np.float64]

#: inverse strength of the penalty on unit vectors, whose entries are small
_C = 20.0
_TEMPERATURES = np.geomspace(0.1, 5.0, 60)


class Probe:
    """Logistic regression from unit vectors [n, dim] to answers; probabilities are softened by a temperature."""

    def __init__(self, vectors: Vectors, answers: Sequence[str]) -> None:
        from sklearn.linear_model import LogisticRegression

        self._only = answers[0] if len(set(answers)) == 1 else None
        self._temperature = 1.0
        self._model: Any = None
        if self._only is None:
            self._model = LogisticRegression(C=_C, max_iter=300, tol=1e-3).fit(vectors, list(answers))

    @property
    def classes(self) -> list[str]:
        """The answers it knows, in the order of the columns."""
        return [self._only] if self._only is not None else [str(name) for name in self._model.classes_]

    def probabilities(self, vectors: Vectors) -> Probabilities:
        """[n, classes], each row summing to 1."""
        if self._only is not None:
            return np.ones((len(vectors), 1))
        scores = np.asarray(self._model.decision_function(vectors), np.float64)
        if scores.ndim == 1:  # two classes: one column, the second one's
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        return _softmax(scores / self._temperature)

    def calibrate(self, vectors: Vectors, answers: Sequence[str]) -> Probe:
        """Sets the temperature by likelihood on held-out rows (Guo et al. 2017, arXiv 1706.04599); returns itself.

        The rows count as right with Platt's (1999) (n + 1) / (n + 2), so that a few that are all right do not make the
        head certain.
        """
        column = {name: n for n, name in enumerate(self.classes)}
        known = [n for n, answer in enumerate(answers) if answer in column]
        if self._only is not None or not known:
            return self
        self._temperature = 1.0
        logs = np.log(self.probabilities(vectors[known]) + 1e-300)
        doubt = 1 / (len(known) + 2)
        target = np.full(logs.shape, doubt / (logs.shape[1] - 1))
        target[range(len(known)), [column[answers[n]] for n in known]] = 1 - doubt
        losses = [-(target * np.log(_softmax(logs / t) + 1e-300)).sum() for t in _TEMPERATURES]
        self._temperature = float(_TEMPERATURES[int(np.argmin(losses))])
        return self

    def answers(self, vectors: Vectors) -> list[tuple[str, float]]:
        """The likeliest answer to each, and its probability."""
        chances = self.probabilities(vectors)
        best = chances.argmax(axis=1)
        classes = self.classes
        return [(classes[n], float(chances[row, n])) for row, n in enumerate(best)]

    def accuracy(self, vectors: Vectors, answers: Sequence[str]) -> float:
        """The share of rows answered as given."""
        found = self.answers(vectors)
        return sum(one == other for (one, _), other in zip(found, answers, strict=True)) / max(1, len(answers))


def _softmax(scores: Probabilities) -> Probabilities:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    total: Probabilities = powers / powers.sum(axis=1, keepdims=True)
    return total
