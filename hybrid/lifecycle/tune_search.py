"""`hybrid corpora tune`: what a task's dev questions teach about searching its corpus.

Three things: what meaning counts beside words (a grid over the weight), which of the best candidates answers
(logistic regression over what a `Shortlist` tells of them), and when none does (`tune_refusal`). The second is kept
only if it helps questions that it did not learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from hybrid.errors import DataError, Refused
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.tasks import Task, read_split, read_task
from hybrid.knowledge.ranking import WEIGHT, convex, reranked
from hybrid.knowledge.reader import Reader
from hybrid.knowledge.search import Library
from hybrid.knowledge.tuned import Tuned
from hybrid.lifecycle.lessons import Lesson, Look, closer, folds, gold, question, tested_questions
from hybrid.lifecycle.tune_refusal import Pair, learn_refusal

Progress = Callable[[str, int, int], None]

#: fewer questions teach nothing
LEAST = 10
_GRID = tuple(i / 20 for i in range(21))


def dev_examples(folder: Path) -> tuple[Task, list[Example]]:
    """A task and its dev questions that name their gold passages. Raises Refused for a test split, DataError."""
    if folder.is_file():
        raise Refused(f"{folder} is a file; name the task's folder. Its dev.jsonl teaches, a test split never does.")
    task = read_task(folder)
    test = tested_questions(task)
    found = [e for e in read_split(task, "dev").examples if gold(e) and e.input not in test]
    if len(found) < LEAST:
        raise DataError(
            f"{folder / 'dev.jsonl'} holds {len(found)} questions with `meta.gold_passages` that are not in the test "
            f"split; {LEAST} at least teach something."
        )
    return task, found


def learn(
    library: Library,
    name: str,
    task: Task,
    examples: Sequence[Example],
    progress: Progress | None = None,
    *,
    reader: Reader | None = None,
) -> Tuned:
    """What these questions teach about one corpus, where a `reader` that they did not teach reads too. Raises NotFound.

    `facts` hold nDCG@10 before and after, and of refusals AUROC, the share `refused` of the questions whose passages
    were taken away, and that of `false_refusals`.
    """
    lessons: list[Lesson] = []
    for done, example in enumerate(examples, 1):
        text = question(task, example)
        found = library.candidates(name, text)
        lessons.append(Lesson(text, found.hits, found.rarity, gold(example), example.references))
        if progress:
            progress("questions", done, len(examples))
    weight = max(_GRID, key=lambda w: (round(_worth(lessons, w), 6), -abs(w - WEIGHT)))
    looks = [Look.at(lesson, weight, reader) for lesson in lessons]
    mixed, unseen = fmean(look.lesson.worth(look.hits) for look in looks), _unseen(looks)
    reranker = closer(looks) if unseen is not None and unseen > mixed else None
    pairs = [Pair(look, Look.at(look.lesson, weight, reader, answerable=False)) for look in looks]
    answerable, refusals = learn_refusal(pairs)
    facts = {
        "task": task.name,
        "questions": len(lessons),
        "ndcg@10": round(_worth(lessons, WEIGHT), 4),
        "fused": round(mixed, 4),
        "reranked": None if unseen is None else round(unseen, 4),
        "refusals": refusals,
    }
    return Tuned(weight, reranker, facts, answerable)


def _worth(lessons: Sequence[Lesson], weight: float) -> float:
    return fmean(lesson.worth(convex(lesson.hits, weight)) for lesson in lessons)


def _unseen(looks: Sequence[Look]) -> float | None:
    """nDCG@10 after the closer look, each question by a model that did not learn from it; None if none can be."""
    worth: list[float] = []
    for taught, seen in folds(len(looks)):
        model = closer([looks[i] for i in taught])
        if model is None:
            return None
        worth += [looks[i].lesson.worth(reranked(looks[i].looked, model.scores(looks[i].rows))) for i in seen]
    return fmean(worth)
