"""How well plain classifiers find a request's own task, and how well plain nearness tells strangers: what the gate must
be better than, from the same training material and the same vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hybrid.gate.features import NEAREST, Vectors, closeness
from hybrid.gate.model import Gate
from hybrid.gate.taught import TASK

#: training rows of each task
ROWS = 300
#: neighbours that vote
K = 10


def material(gate: Gate, tasks: Mapping[str, str]) -> dict[str, Vectors]:
    """Unit vectors [n, d] of the training messages of each adapter that is enrolled, by the task it was trained on."""
    return {
        tasks[name]: messages.views[0].vectors
        for arm, messages in gate.bank.messages.items()
        if (name := arm.adapter) in tasks and name and messages.views
    }


def baselines(train: Mapping[str, Vectors], vectors: Vectors) -> dict[str, list[str]]:
    """The task of each request [n, d] by the majority of the K nearest training rows, and by logistic regression.

    Both learn from at most ROWS rows of each task. {} where there are no two tasks to tell apart.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    if len(train) < 2:
        return {}
    rng = np.random.default_rng(0)
    kept = {name: rows[np.sort(rng.permutation(len(rows))[:ROWS])] for name, rows in train.items()}
    x = np.concatenate(list(kept.values()))
    y = np.concatenate([[name] * len(rows) for name, rows in kept.items()])
    knn = KNeighborsClassifier(min(K, len(x)), metric="cosine").fit(x, y)
    logistic = LogisticRegression(max_iter=2000).fit(x, y)
    return {"knn": knn.predict(vectors).tolist(), "logistic": logistic.predict(vectors).tolist()}


def nearness(gate: Gate, vectors: Vectors) -> list[float]:
    """The mean cosine of the five nearest training messages of any adapter or measured task, for each of [n, d]."""
    rows = [
        messages.views[0].vectors
        for arm, messages in gate.bank.messages.items()
        if messages.views and (arm.adapter or arm.strategy == TASK)
    ]
    if not rows:
        return [-1.0] * len(vectors)
    mean: list[float] = closeness(vectors @ np.concatenate(rows).T, NEAREST)[1].tolist()
    return mean


def auroc(strange: Sequence[float], usual: Sequence[float]) -> float | None:
    """The chance that a stranger's score lies above that of a usual request; None without both."""
    from sklearn.metrics import roc_auc_score

    if not strange or not usual:
        return None
    label = [1] * len(strange) + [0] * len(usual)
    return round(float(roc_auc_score(label, [*strange, *usual])), 4)
