"""RAFT (Zhang et al. 2024, arXiv 2403.10131): LoRA trained on questions with the retriever's own passages before them.

The passages are those that the strategy `adapter+rag` would send: the same search, the same budget, the same words,
distractors included. Where the search missed the passage that holds the answer, it is put in for a share of the rows;
without it the rest learn to answer from what they know. Dev rows get what the search finds and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from hybrid.errors import BadRequest
from hybrid.knowledge.search import Library, Question
from hybrid.models import is_small
from hybrid.prompts import replace_last_user, with_passages, within_budget
from hybrid.strategies.followup import search_query
from hybrid.training import lora
from hybrid.training.data import Dataset, digest
from hybrid.training.formats import Example
from hybrid.training.job import Fitted, Job
from hybrid.types.passage import Passage

CORPUS = "corpus.jsonl"


def fit(job: Job) -> Fitted:
    """Retrieves for every row, then trains. Raises BadRequest where there is no corpus to retrieve from."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model.path, local_files_only=True)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    with closing(Library(job.settings.rooms, job.embedder, job.settings.retrieval)) as library:
        corpus = ready_corpus(job, library)
        many = job.recipe.passages or job.settings.retrieval.shown(small=is_small(job.model))
        data, found = Retriever(job, library, corpus, many, count).over(job.data)
    fitted = lora.fit(replace(job, data=data))
    asked = {"corpus": corpus, "passages": many}
    metrics = {**fitted.metrics, "retrieval": found, "dev_sha256": digest(data.dev)}
    return replace(fitted, metrics=metrics, save=lambda folder: {**fitted.save(folder), **asked})


def ready_corpus(job: Job, library: Library) -> str:
    """The corpus to retrieve from: `corpus`, or the adapter's name; read from the task's corpus.jsonl if it is new."""
    name = job.recipe.corpus or job.name
    if name in library.names():
        return name
    brought = [folder for folder in job.sources if (folder / CORPUS).is_file()]
    if not brought:
        raise BadRequest(
            f"There is no corpus {name!r}; make it with `hybrid index DIR --name {name}`, name another with "
            f"--set corpus=NAME, or put {CORPUS} into the task folder.", param="corpus",
        )  # fmt: skip
    library.ingest(name, brought[0])
    return name


@dataclass(frozen=True, slots=True)
class Retriever:
    """What the strategy would show before a question: as `many` passages as the served adapter will get."""

    job: Job
    library: Library
    corpus: str
    many: int
    count: Callable[[str], int]

    def over(self, data: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The data with passages before each question, and how often the passage with the answer was among them."""
        train, found, shown = self._before(data.train, self.job.recipe.gold_share)
        dev, dev_found, _ = self._before(data.dev, 0.0)
        told = {"corpus": self.corpus, "train_found": found, "train_shown": shown, "dev_found": dev_found}
        return replace(data, train=train, dev=dev), told

    def _before(self, rows: Sequence[Example], gold_share: float) -> tuple[tuple[Example, ...], float, float]:
        """(the rows as the strategy asks them, the share in which the answer was found, and in which it is shown)."""
        found, gold = self.found(rows), self._gold(rows)
        dice = random.Random(self.job.recipe.seed)
        shown = [
            self._with_gold(passages, right, dice) if dice.random() < gold_share else passages
            for passages, right in zip(found, gold, strict=True)
        ]
        return _grounded(rows, shown), _share(found, gold), _share(shown, gold)

    def found(self, rows: Sequence[Example]) -> list[tuple[Passage, ...]]:
        """What a search with each row's question finds, as far as the prompt's budget goes."""
        queries = [search_query(row.messages) for row in rows]
        vectors = self.job.embedder.embed_queries(queries)
        return [self._search(Question(*asked)) for asked in zip(queries, vectors, strict=True)]

    def _search(self, question: Question) -> tuple[Passage, ...]:
        found = self.library.search(self.corpus, question, self.many)
        return self._fit(self.library.around(found))

    def _fit(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        return within_budget(passages, self.job.settings.retrieval.passage_budget_tokens, self.count)

    def _gold(self, rows: Sequence[Example]) -> list[list[Passage]]:
        """The passages that hold each answer: of a document that was cut, the pieces with the answer's words."""
        wanted = [[str(name) for name in row.meta.get("gold_passages") or ()] for row in rows]
        known = self.library.called(self.corpus, [name for named in wanted for name in named])
        gold = [[piece for name in named for piece in known.get(name, ())] for named in wanted]
        return [
            [piece for piece in pieces if row.answer.casefold() in piece.text.casefold()] or pieces
            for row, pieces in zip(rows, gold, strict=True)
        ]

    def _with_gold(
        self, passages: Sequence[Passage], gold: Sequence[Passage], dice: random.Random
    ) -> tuple[Passage, ...]:
        """The passages, with one that holds the answer in a random one's place where none does."""
        if not gold or not passages or _holds(passages, gold):
            return tuple(passages)
        shown = list(passages)
        shown[dice.randrange(len(shown))] = dice.choice(gold)
        return self._fit(shown)


def _holds(passages: Sequence[Passage], gold: Sequence[Passage]) -> bool:
    """Whether one of them is gold: by its words, since a text that came twice is found under its first id, or by its
    id, since one that is longer than the budget is cut."""
    words, ids = ({getattr(p, part) for p in passages} & {getattr(p, part) for p in gold} for part in ("text", "id"))
    return bool(words or ids)


def _share(shown: Sequence[Sequence[Passage]], gold: Sequence[Sequence[Passage]]) -> float:
    return round(sum(map(_holds, shown, gold)) / len(gold), 4)


def _grounded(rows: Sequence[Example], shown: Sequence[Sequence[Passage]]) -> tuple[Example, ...]:
    """The rows as the strategy asks them."""
    return tuple(
        replace(row, messages=replace_last_user(row.messages, with_passages(row.question, passages)))
        for row, passages in zip(rows, shown, strict=True)
    )
