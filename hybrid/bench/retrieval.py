"""`retrieval`: each stage of a search alone and together, on the questions of a task that name their passages.

What is learned is learned from dev questions: all of them where the test split is measured, the first half of them
where the other half is. The corpus is the task's own or a copy of one of this home's, in a temporary home.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from hybrid.bench.result import Goal, Result
from hybrid.errors import DataError
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.retrieval import ndcg
from hybrid.evaluation.statistics import estimate, paired
from hybrid.evaluation.tasks import Task, read_split
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.lessons import gold, question
from hybrid.lifecycle.teach_reader import reader_for
from hybrid.lifecycle.tune_search import dev_examples, learn
from hybrid.models import ModelFiles
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings, Settings
from hybrid.types.passage import Passage

Progress = Callable[[str, int, int], None]

CORPUS = "task"
CUTS = (1, 3, 5, 10)
DEEP = max(CUTS)
#: what the spreading counts where it is measured
MMR = 0.3
WORDS, MEANING, BOTH, CLOSER = "words", "meaning", "both", "both, closer look"
STAGES: Mapping[str, dict[str, Any]] = {
    WORDS: {"search": "lexical", "rerank": False},
    MEANING: {"search": "dense", "rerank": False},
    BOTH: {"search": "hybrid", "rerank": False},
    CLOSER: {"search": "hybrid", "rerank": True},
}
GOAL_MS, GOAL_MS_P95 = 20.0, 60.0


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A question as it is searched for, and the ids that answer it."""

    text: str
    gold: tuple[str, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Measured:
    """One way of searching: recall at each cut and nDCG@10 of every question, and the milliseconds of each search."""

    recall: Mapping[int, list[float]]
    ndcg: list[float]
    ms: list[float]

    def row(self, name: str) -> dict[str, Any]:
        """The numbers of the table, with their 95 % intervals."""
        found = {f"recall@{k}": _told(self.recall[k]) for k in CUTS}
        p50, p95 = np.percentile(self.ms, (50, 95))
        return {"stages": name, **found, f"ndcg@{DEEP}": _told(self.ndcg), "ms": round(p50, 2), "ms_p95": round(p95, 2)}


async def measure(
    settings: Settings,
    folder: Path,
    *,
    embedding: ModelFiles,
    split: Literal["dev", "test"] = "dev",
    limit: int | None = None,
    corpus: str | None = None,
    reader: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Recall, nDCG and latency of each stage on `limit` questions; the closer look with a `reader` that the training
    questions teach. Raises DataError, Refused, NotFound."""
    return await asyncio.to_thread(_measure, settings, folder, embedding, split, limit, corpus, reader, progress)


def _measure(
    settings: Settings,
    folder: Path,
    embedding: ModelFiles,
    split: Literal["dev", "test"],
    limit: int | None,
    corpus: str | None,
    reader: bool,
    progress: Progress | None,
) -> Result:
    task, dev = dev_examples(folder)
    taught, examples = _material(task, dev, split)
    asked = [Asked(question(task, example), gold(example)) for example in examples[:limit]]
    embedder = Embedder(embedding.path, embedding.name)
    with tempfile.TemporaryDirectory(prefix="hybrid-retrieval-") as scratch:
        home = Home(Path(scratch))
        with closing(Library(home, embedder, settings.retrieval)) as library:
            if corpus is None:
                library.ingest(CORPUS, folder, progress)
            else:
                _copy(settings, embedder, corpus, library, Path(scratch) / "copy")
            reads = reader_for(library, CORPUS, folder, settings.cache, progress) if reader else None
            learned = learn(library, CORPUS, task, taught, progress, reader=reads)
            passages = library.corpus(CORPUS).passages
            library.tune(CORPUS, learned, reads)
        embed_ms = _embedded(embedder, asked)
        found = _all(home, embedder, settings.retrieval, CORPUS, asked, progress)
    facts = {"task": task.name, "split": split, "questions": len(asked), "passages": passages}
    told = {
        "weight": learned.weight,
        "closer look": learned.reranker is not None,
        "learned from": len(taught),
        "reader": reader,
    }
    return _result(found, {**facts, **told, "embedding a question, ms": embed_ms})


def _material(task: Task, dev: Sequence[Example], split: str) -> tuple[Sequence[Example], Sequence[Example]]:
    """(what teaches, what is measured): never the same question."""
    if split == "dev":
        half = len(dev) // 2
        return dev[:half], dev[half:]
    measured = [example for example in read_split(task, "test").examples if gold(example)]
    if not measured:
        raise DataError(f"{task.folder / 'test.jsonl'} names no `meta.gold_passages`, so nothing can be measured.")
    return dev, measured


def _copy(settings: Settings, embedder: Embedder, corpus: str, library: Library, file: Path) -> None:
    """A corpus of this home in the temporary one, where it can be tuned."""
    with closing(Library(settings.rooms, embedder, settings.retrieval)) as own:
        own.backup(corpus, file)
    library.restore(file, CORPUS)


def _embedded(embedder: Embedder, asked: Sequence[Asked]) -> float:
    """The median milliseconds of a question's vector, which is kept: the searches after it do not pay for it."""
    spent = [_timed(lambda text=one.text: embedder.embed_query(text))[1] for one in asked]  # type: ignore[misc]
    return round(float(np.median(spent)), 2)


def _all(
    home: Home,
    embedder: Embedder,
    settings: RetrievalSettings,
    corpus: str,
    asked: Sequence[Asked],
    progress: Progress | None,
) -> dict[str, Measured]:
    ways = {name: {**stages, "mmr": 0.0} for name, stages in STAGES.items()}
    ways |= {f"{name}, spread": {**stages, "mmr": MMR} for name, stages in STAGES.items()}
    found: dict[str, Measured] = {}
    for done, (name, stages) in enumerate(ways.items(), 1):
        own = settings.model_copy(update={**stages, "weight": None, "cross_encoder": ""})
        with closing(Library(home, embedder, own)) as library:
            library.search(corpus, asked[0].text, DEEP)  # the first search opens the index
            found[name] = _one(library, corpus, asked)
        if progress:
            progress("stages", done, len(ways))
    return found


def _one(library: Library, corpus: str, asked: Sequence[Asked]) -> Measured:
    recall: dict[int, list[float]] = {k: [] for k in CUTS}
    worth: list[float] = []
    spent: list[float] = []
    for one in asked:
        passages, ms = _timed(lambda q=one: library.search(corpus, q.text, DEEP, every_id=True))  # type: ignore[misc]
        ids = _ids(passages, one.gold)
        for k in CUTS:
            recall[k].append(fmean(float(any(_is(i, g) for i in ids[:k])) for g in one.gold))
        worth.append(ndcg(one.gold, ids))
        spent.append(ms)
    return Measured(recall, worth, spent)


def _ids(passages: Sequence[Passage], answers: Sequence[str]) -> list[str]:
    """One id a text, in order: the one that answers, of a text that came with several."""
    groups: dict[str, list[str]] = {}
    for passage in passages:
        groups.setdefault(passage.text, []).append(passage.id)
    return [next((i for i in ids if any(_is(i, g) for g in answers)), ids[0]) for ids in groups.values()]


def _is(passage: str, answer: str) -> bool:
    return passage == answer or passage.startswith(f"{answer}#")


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    out = call()
    return out, (time.perf_counter() - began) * 1000


def _told(scores: Sequence[float]) -> str:
    one = estimate(scores)
    return f"{one.score:.4f} [{one.low:.4f}, {one.high:.4f}]"


def _result(found: Mapping[str, Measured], facts: Mapping[str, Any]) -> Result:
    """The rows, the whole search beside the better single one on the same questions, and the goals."""
    whole = found[CLOSER]
    beside: dict[str, Any] = {}
    goals: list[Goal] = []
    for what, scores in _measures().items():
        single = max((WORDS, MEANING), key=lambda name: fmean(scores(found[name])))
        difference = paired([(scores(whole), scores(found[single]))])
        beside[f"{what}: all stages less {single}"] = difference.wire()
        goals.append(Goal(f"{what} above {single}, lower end", round(difference.low, 4), 0.0, at_least=True))
    # a reader is a cross-encoder, whose time the goals leave out
    p50, p95 = np.percentile((found[BOTH] if facts["reader"] else whole).ms, (50, 95))
    goals += [
        Goal("search p50, ms", round(float(p50), 2), GOAL_MS),
        Goal("search p95, ms", round(float(p95), 2), GOAL_MS_P95),
    ]
    rows = tuple(measured.row(name) for name, measured in found.items())
    return Result("retrieval", rows, {**facts, **beside}, tuple(goals))


def _measures() -> dict[str, Callable[[Measured], list[float]]]:
    return {"recall@5": lambda m: m.recall[5], f"ndcg@{DEEP}": lambda m: m.ndcg}
