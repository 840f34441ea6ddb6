"""`hybrid corpora tune`: what a task's dev questions teach about searching its corpus.

Two things: what meaning counts beside words (a grid over the weight), and which of the best candidates answers
(logistic regression over `rerank.features`). The second is kept only if it helps questions that it did not learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hybrid.errors import DataError, Refused
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.retrieval import ndcg
from hybrid.evaluation.tasks import Task, read_split, read_task
from hybrid.knowledge.ranking import CLOSER, WEIGHT, Floats, Hit, fused, reranked
from hybrid.knowledge.rerank import Reranker, features
from hybrid.knowledge.search import Library
from hybrid.knowledge.tuned import Tuned
from hybrid.strategies.followup import search_query
from hybrid.types import Message

Progress = Callable[[str, int, int], None]

FOLDS = 5
#: fewer questions teach nothing
LEAST = 10
_GRID = tuple(i / 20 for i in range(21))


@dataclass(frozen=True, eq=False, slots=True)
class Lesson:
    """One dev question: its candidates, how rare its words are, and the ids that answer it."""

    text: str
    hits: Sequence[Hit]
    rarity: dict[str, float]
    gold: tuple[str, ...]

    def right(self, hit: Hit) -> bool:
        """Whether a text answers; a piece `D#k` of a document `D` does."""
        return any(p.id == g or p.id.startswith(f"{g}#") for p in hit.passages for g in self.gold)

    def worth(self, hits: Sequence[Hit]) -> float:
        """nDCG@10 of an order."""
        return ndcg(self.gold, [self._id(hit) for hit in hits[:10]])

    def _id(self, hit: Hit) -> str:
        """The id that counts, of a text that came with several."""
        ids = [p.id for p in hit.passages]
        return next((i for i in ids if any(i == g or i.startswith(f"{g}#") for g in self.gold)), ids[0])


def question(task: Task, example: Example) -> str:
    """What the strategy `rag` would search for."""
    return search_query([Message("user", task.message(example))])


def gold(example: Example) -> tuple[str, ...]:
    """The passages that answer."""
    return tuple(str(name) for name in example.meta.get("gold_passages") or ())


def dev_examples(folder: Path) -> tuple[Task, list[Example]]:
    """A task and its dev questions that name their gold passages. Raises Refused for a test split, DataError."""
    if folder.is_file():
        raise Refused(f"{folder} is a file; name the task's folder. Its dev.jsonl teaches, a test split never does.")
    task = read_task(folder)
    test = {e.input for e in read_split(task, "test").examples} if (folder / "test.jsonl").is_file() else set()
    found = [e for e in read_split(task, "dev").examples if gold(e) and e.input not in test]
    if len(found) < LEAST:
        raise DataError(
            f"{folder / 'dev.jsonl'} holds {len(found)} questions with `meta.gold_passages` that are not in the test "
            f"split; {LEAST} at least teach something."
        )
    return task, found


def learn(
    library: Library, name: str, task: Task, examples: Sequence[Example], progress: Progress | None = None
) -> Tuned:
    """What these questions teach about one corpus; `facts` hold nDCG@10 before and after. Raises NotFound."""
    lessons: list[Lesson] = []
    for done, example in enumerate(examples, 1):
        text = question(task, example)
        found = library.candidates(name, text)
        lessons.append(Lesson(text, found.hits, dict(found.rarity), gold(example)))
        if progress:
            progress("questions", done, len(examples))
    weight = max(_GRID, key=lambda w: (round(fmean(x.worth(_fused(x, w)) for x in lessons), 6), -abs(w - WEIGHT)))
    before = fmean(x.worth(_fused(x, WEIGHT)) for x in lessons)
    mixed = fmean(x.worth(_fused(x, weight)) for x in lessons)
    unseen = _unseen(lessons, weight)
    reranker = _fit(lessons, weight) if unseen is not None and unseen > mixed else None
    facts = {"task": task.name, "questions": len(lessons), "ndcg@10": round(before, 4), "fused": round(mixed, 4)}
    return Tuned(weight, reranker, {**facts, "reranked": None if unseen is None else round(unseen, 4)})


def _fused(lesson: Lesson, weight: float) -> list[Hit]:
    return fused(lesson.hits, [weight] * len(lesson.hits), "convex")


def _unseen(lessons: Sequence[Lesson], weight: float) -> float | None:
    """nDCG@10 after the closer look, each question by a model that did not learn from it; None if none can be."""
    worth: list[float] = []
    for fold in range(FOLDS):
        model = _fit([x for i, x in enumerate(lessons) if i % FOLDS != fold], weight)
        if model is None:
            return None
        for lesson in lessons[fold::FOLDS]:
            hits = _fused(lesson, weight)
            rows = features(lesson.text, lesson.rarity, hits[:CLOSER])
            worth.append(lesson.worth(reranked(hits, model.scores(rows))))
    return fmean(worth)


def _fit(lessons: Sequence[Lesson], weight: float) -> Reranker | None:
    """The model over the first candidates of each question; None where all of them answer, or none."""
    from sklearn.linear_model import LogisticRegression

    rows, right = _table(lessons, weight)
    if len(set(right)) < 2:
        return None
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    scale[scale < 1e-9] = 1.0
    model: Any = LogisticRegression(max_iter=1000).fit((rows - mean) / scale, right)
    weights, bias = model.coef_[0], float(model.intercept_[0])
    return Reranker(tuple(mean.tolist()), tuple(scale.tolist()), tuple(weights.tolist()), bias)


def _table(lessons: Sequence[Lesson], weight: float) -> tuple[Floats, list[bool]]:
    rows: list[Floats] = []
    right: list[bool] = []
    for lesson in lessons:
        hits = _fused(lesson, weight)[:CLOSER]
        if hits:
            rows.append(features(lesson.text, lesson.rarity, hits))
            right += [lesson.right(hit) for hit in hits]
    return (np.concatenate(rows) if rows else np.empty((0, 0))), right
