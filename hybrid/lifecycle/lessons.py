"""A corpus's own dev questions as lessons: what was found for each, and which of it answers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybrid.evaluation.metrics import Example
from hybrid.evaluation.retrieval import ndcg
from hybrid.evaluation.tasks import Task, read_split
from hybrid.knowledge.ranking import Floats, Hit, convex
from hybrid.knowledge.reader import Reader
from hybrid.knowledge.rerank import Reranker, Shortlist
from hybrid.strategies.followup import search_query
from hybrid.types.request import Message

#: what learned from four parts of the questions is looked at on the fifth
FOLDS = 5
#: a shorter answer stands in passages that have nothing to do with it
_TELLING = 4


def question(task: Task, example: Example) -> str:
    """What the strategy `rag` would search for."""
    return search_query([Message("user", task.message(example))])


def gold(example: Example) -> tuple[str, ...]:
    """The passages that answer."""
    return tuple(str(name) for name in example.meta.get("gold_passages") or ())


def tested_questions(task: Task) -> set[str]:
    """What the test split asks, where there is one: nothing learns from that."""
    there = (task.folder / "test.jsonl").is_file()
    return {example.input for example in read_split(task, "test").examples} if there else set()


def says(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers stands in a text, word for word; short ones are not looked for."""
    told = [answer.strip().casefold() for answer in answers]
    return any(re.search(rf"\b{re.escape(one)}\b", text.casefold()) for one in told if len(one) >= _TELLING)


@dataclass(frozen=True, eq=False, slots=True)
class Lesson:
    """One dev question: its candidates, how rare its words are, the ids that answer it, and its right answers."""

    text: str
    hits: Sequence[Hit]
    rarity: Mapping[str, float]
    gold: tuple[str, ...]
    answers: tuple[str, ...] = ()
    #: what a reader said of the candidates, by row
    read: dict[int, Floats] = field(default_factory=dict)

    def right(self, hit: Hit) -> bool:
        """Whether a text answers; a piece `D#k` of a document `D` does."""
        return any(p.id == g or p.id.startswith(f"{g}#") for p in hit.passages for g in self.gold)

    def says(self, hit: Hit) -> bool:
        """Whether an answer stands in a text, word for word."""
        return says(self.answers, hit.passages[0].text)

    def worth(self, hits: Sequence[Hit]) -> float:
        """nDCG@10 of an order."""
        return ndcg(self.gold, [self._id(hit) for hit in hits[:10]])

    def _id(self, hit: Hit) -> str:
        """The id that counts, of a text that came with several."""
        ids = [p.id for p in hit.passages]
        return next((i for i in ids if any(i == g or i.startswith(f"{g}#") for g in self.gold)), ids[0])


@dataclass(frozen=True, eq=False, slots=True)
class Look:
    """What a question's search finds, fused and best first; and as a `Shortlist` looks at it more closely, with the
    rows [m, 12 or 16] of the first of that."""

    lesson: Lesson
    hits: Sequence[Hit]
    looked: Sequence[Hit]
    rows: Floats

    @classmethod
    def at(cls, lesson: Lesson, weight: float, reader: Reader | None, *, answerable: bool = True) -> Look:
        """With the passages that answer, or as a corpus that lacks them would have it."""
        hits = [hit for hit in lesson.hits if answerable or not (lesson.right(hit) or lesson.says(hit))]
        found = Shortlist(lesson.text, lesson.rarity, convex(hits, weight), weight, reader, lesson.read)
        return cls(lesson, found.hits, found.looked, found.rows)


def closer(looks: Sequence[Look]) -> Reranker | None:
    """Which of the first candidates answers, learned from these questions; None where all of them do, or none."""
    right = [look.lesson.right(hit) for look in looks for hit in look.looked[: len(look.rows)]]
    return Reranker.fit(np.concatenate([look.rows for look in looks]), right) if right else None


def folds(count: int) -> Iterator[tuple[list[int], list[int]]]:
    """The places of the questions that teach and of those that are looked at; each is looked at once."""
    for fold in range(FOLDS):
        yield [i for i in range(count) if i % FOLDS != fold], list(range(fold, count, FOLDS))
