"""When to say that the documents do not hold an answer, learned from a corpus's own dev questions.

Each question is seen twice: as it is searched, and as a corpus without the passages that answer it would have it. The
boundary between the two is set for few false refusals, on questions that the model did not learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.knowledge.answerable import Answerable, signals
from hybrid.knowledge.logistic import Logistic
from hybrid.knowledge.ranking import Floats
from hybrid.knowledge.rerank import Reranker
from hybrid.lifecycle.lessons import Look, closer, folds
from hybrid.types import JSON

#: the share of questions with an answer that may be refused, with one standard error kept as a margin
FALSE_REFUSALS = 0.10
#: a model that tells the two apart less often than this (AUROC) is not used
TELLS = 0.7
#: many signals say much the same: what is learned from one set of questions holds better for another with small weights
FREEDOM = 0.1


@dataclass(frozen=True, eq=False, slots=True)
class Pair:
    """One question with the passages that answer it, and without them."""

    present: Look
    absent: Look

    def rows(self, model: Reranker | None) -> Floats:
        """float64 [2, 21 or 27]: the signals of both."""
        looks = (self.present, self.absent)
        return np.stack([signals(look.rows, look.lesson.rarity, model) for look in looks])


def learn_refusal(pairs: Sequence[Pair]) -> tuple[Answerable | None, JSON]:
    """(what tells when to refuse, what it is worth on questions that it did not learn from).

    `{}` and None where the questions cannot teach it.
    """
    pairs = [pair for pair in pairs if len(pair.present.rows) and len(pair.absent.rows)]
    chances = _unseen(pairs)
    if chances is None:
        return None, {}
    present, absent = chances.T
    least = boundary(present, absent)
    told = {
        "auroc": round(auroc(present, absent), 4),
        "refused": round(float(np.mean(absent < least)), 4),
        "false_refusals": round(float(np.mean(present < least)), 4),
    }
    learned = _fit(pairs) if told["auroc"] >= TELLS else None
    return (None if learned is None else Answerable(*learned, least)), told


def _unseen(pairs: Sequence[Pair]) -> Floats | None:
    """[n, 2]: the probability that each question has an answer, with and without its passages, by a model that did
    not learn from it; None where none can be learned."""
    chances = np.zeros((len(pairs), 2))
    for taught, seen in folds(len(pairs)):
        learned = _fit([pairs[i] for i in taught])
        if learned is None:
            return None
        model, look = learned
        for i in seen:
            chances[i] = model.scores(pairs[i].rows(look))
    return chances


def _fit(pairs: Sequence[Pair]) -> tuple[Logistic, Reranker | None] | None:
    if not pairs:
        return None
    look = closer([pair.present for pair in pairs])
    rows = np.concatenate([pair.rows(look) for pair in pairs])
    model = Logistic.fit(rows, [True, False] * len(pairs), freedom=FREEDOM)
    return None if model is None else (model, look)


def boundary(present: Floats, absent: Floats) -> float:
    """The probability below which is refused: where most are told apart (Youden 1950) among those that refuse at most
    `FALSE_REFUSALS` of the questions with an answer, a standard error included. 0, which refuses none, if there is
    no better."""
    best, least = 0.0, 0.0
    for edge in np.unique(np.concatenate([present, absent])):
        wrong = float(np.mean(present < edge))
        told = float(np.mean(absent < edge)) - wrong
        if wrong + np.sqrt(wrong * (1 - wrong) / len(present)) <= FALSE_REFUSALS and told > best:
            best, least = told, float(edge)
    return least


def auroc(present: Floats, absent: Floats) -> float:
    """The chance that a question with an answer has a higher probability than one without."""
    from sklearn.metrics import roc_auc_score

    label = [1] * len(present) + [0] * len(absent)
    return float(roc_auc_score(label, np.concatenate([present, absent])))
