"""`search`: how long a search of a large corpus takes, stage by stage, and how soon a change is searched.

The corpus is synthetic and so are its vectors: embedding a hundred thousand passages would take hours and tell nothing
of searching them. A question is embedded by the real model, and the corpus in which one document of many changes too.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import SecretStr

from hybrid.bench.result import Goal, Result
from hybrid.bench.synthetic import Made, texts, write_corpus
from hybrid.knowledge.corpus import Asked, Corpus
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.index import Snapshot
from hybrid.knowledge.kinds import Near
from hybrid.knowledge.lexical import scored
from hybrid.knowledge.ranking import WEIGHT
from hybrid.knowledge.rerank import COLUMNS, Reranker
from hybrid.knowledge.room import OWNER
from hybrid.knowledge.search import POOL, Library
from hybrid.knowledge.stages import Stages
from hybrid.knowledge.store import About
from hybrid.knowledge.tuned import Tuned
from hybrid.models import ModelFiles
from hybrid.rooms import Home, write_json
from hybrid.settings import RetrievalSettings, Settings
from hybrid.types.rights import Rights

Progress = Callable[[str, int, int], None]

CORPUS = "synthetic"
CHANGING = "changing"
K = 10
#: what the spreading counts where it is measured
MMR = 0.3
#: what is not measured here is off
PLAIN = {"cross_encoder": "", "vector_engine": SecretStr(""), "weight": None, "rerank": True, "mmr": 0.0}
GUEST = Rights(caller="guest", admin=False)
GOAL_MS, GOAL_MS_P95, GOAL_CHANGE_S = 20.0, 60.0, 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of each search, or of one stage of each."""

    stage: str
    ms: Sequence[float]

    def wire(self) -> dict[str, Any]:
        """Its line of the table."""
        p50, p95 = np.percentile(self.ms, (50, 95))
        return {"stage": self.stage, "ms": round(float(p50), 2), "ms_p95": round(float(p95), 2)}


async def measure(
    settings: Settings,
    *,
    embedding: ModelFiles,
    scale: int = 100_000,
    documents: int = 1_000,
    questions: int = 300,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Searches a corpus of `scale` passages and changes one document of `documents`, in a temporary home. Writes
    `search.json` and `search.png` into `out`."""
    return await asyncio.to_thread(_measure, settings.retrieval, embedding, scale, documents, questions, out, progress)


def _measure(
    settings: RetrievalSettings,
    embedding: ModelFiles,
    scale: int,
    documents: int,
    questions: int,
    out: Path | None,
    progress: Progress | None,
) -> Result:
    with tempfile.TemporaryDirectory(prefix="hybrid-search-") as scratch:
        home = Home(Path(scratch))
        made = Made(embedding.path, embedding.name)
        settings = settings.model_copy(update=PLAIN)
        written = write_corpus(Path(scratch) / "rows", scale)
        with closing(Library(home, made, settings)) as library:
            facts = _built(library, Path(scratch) / "rows", progress)
        facts |= _kind(home, made, settings)
        rows = _searched(home, made, settings, _questions(made, written, questions))
        facts |= _added(home, made, settings)
        facts |= _changed(home, embedding, settings, documents, Path(scratch) / "documents")
    result = Result("search", tuple(row.wire() for row in rows), {"passages": scale, **facts}, _goals(rows[0], facts))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "search.json", result.wire())
        _draw(rows, out / "search.png")
    return result


def _built(library: Library, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Ingests the corpus; when it could be searched by its words first, when by meaning, and what it took."""
    began, words_s = time.perf_counter(), 0.0

    def watch(step: str, done: int, total: int) -> None:
        nonlocal words_s
        if not words_s and step.startswith("embedding"):  # the index of words stands
            words_s = time.perf_counter() - began
        if progress:
            progress(step, done, total)

    library.embedder.dim  # noqa: B018  the model is loaded
    began = time.perf_counter()
    library.ingest(CORPUS, folder, watch)
    whole_s = time.perf_counter() - began
    library.tune(CORPUS, Tuned(WEIGHT, _any_reranker()))
    return {"searched by words after, s": round(words_s, 1), "ingested after, s": round(whole_s, 1)}


def _any_reranker() -> Reranker:
    """A closer look that orders by the cosine: what it takes does not hang on what it learned."""
    columns = len(COLUMNS)
    return Reranker((0.0,) * columns, (1.0,) * columns, (1.0, *(0.0,) * (columns - 1)), 0.0)


def _kind(home: Home, made: Made, settings: RetrievalSettings) -> dict[str, Any]:
    """What a reader opens, how long that takes and what it holds in memory."""
    before = psutil.Process().memory_info().rss
    with _opened(home, made, settings) as corpus:
        began = time.perf_counter()
        near = corpus.snapshot().near
        spent = time.perf_counter() - began
        resident = psutil.Process().memory_info().rss
        kind = near.kind if isinstance(near, Near) else "none"
    memory = {"opened, MB more": round((resident - before) / 1e6), "whole process, MB": round(resident / 1e6)}
    return {"index": kind, "opened after, s": round(spent, 2), **memory}


def _questions(made: Made, written: Sequence[str], count: int) -> list[str]:
    chosen = np.random.default_rng(1).choice(len(written), count)
    return made.ask_about([written[place] for place in chosen], 2)


def _searched(home: Home, made: Made, settings: RetrievalSettings, questions: Sequence[str]) -> list[Row]:
    """Every way of searching; a question that was embedded once is remembered, so half of them are asked whole."""
    half = len(questions) // 2
    spreading = settings.model_copy(update={"mmr": MMR})
    whole = _whole(home, made, spreading, questions[:half], OWNER)
    usual = _whole(home, made, settings, questions[half:], OWNER)
    stages = _staged(home, made, settings, questions)
    _hide_half(home, made, settings)
    hidden = _whole(home, made, settings, questions, GUEST)
    return [
        Row("all stages", whole),
        Row("as by default", usual),
        Row("half of it hidden, question known", hidden),
        *stages,
    ]


def _whole(
    home: Home, made: Made, settings: RetrievalSettings, questions: Sequence[str], rights: Rights
) -> list[float]:
    with closing(Library(home, made, settings)) as library:
        library.search(CORPUS, "the first search opens the index", K, rights=rights)
        return [_timed(partial(library.search, CORPUS, question, K, rights=rights)) for question in questions]


def _staged(home: Home, made: Made, settings: RetrievalSettings, questions: Sequence[str]) -> list[Row]:
    """The stages one by one, on the same candidates that a search ranks."""
    spent: dict[str, list[float]] = {}
    with _opened(home, made, settings) as corpus:
        snapshot, stages = corpus.snapshot(), Stages(settings)
        for question in questions:
            vector = made.embed_query(question)
            asked = Asked(vector, question, said=question)
            found = corpus.candidates(asked, POOL, OWNER)
            rows = [hit.row for hit in found.hits]
            works: dict[str, Callable[[], Any]] = {
                "embedding the question": partial(made.embed_query, f"{question} ?"),
                "meaning": partial(snapshot.nearest, vector, POOL),
                "words": partial(_by_words, snapshot, question),
                "reading the candidates": partial(_read, corpus, rows),
                "fusion, closer look, copies": partial(stages.ranked, asked, [corpus], [found], K),
            }
            for stage, work in works.items():
                spent.setdefault(stage, []).append(_timed(work))
    return [Row(stage, ms) for stage, ms in spent.items()]


def _by_words(snapshot: Snapshot, question: str) -> None:
    scored(snapshot.words, question).best(POOL)


def _read(corpus: Corpus, rows: Sequence[int]) -> None:
    corpus.store.passages(rows)
    corpus.vectors(rows)


def _hide_half(home: Home, made: Made, settings: RetrievalSettings) -> None:
    """Gives every second document to somebody else."""
    with _opened(home, made, settings) as corpus:
        names = sorted(corpus.store.documents_known())
        with corpus.store.change() as change:
            for name in names[::2]:
                change.describe(name, About(owner="somebody"))


def _added(home: Home, made: Made, settings: RetrievalSettings) -> dict[str, Any]:
    """How soon one document more in the large corpus is found."""
    with closing(Library(home, made, settings)) as library:
        library.search(CORPUS, "the first search opens the index", K)
        began = time.perf_counter()
        library.add_document(CORPUS, "new", text="A document that came later.")
        library.search(CORPUS, "document that came later", K)
        return {"one document added and found, s": round(time.perf_counter() - began, 3)}


def _changed(
    home: Home, embedding: ModelFiles, settings: RetrievalSettings, count: int, folder: Path
) -> dict[str, Any]:
    """How long an ingest takes after one of `count` documents changed, embedded by the real model."""
    folder.mkdir()
    for number, text in enumerate(texts(count, seed=3)):
        (folder / f"{number}.md").write_text(f"# Document {number}\n\n{text}\n")
    with closing(Library(home, Embedder(embedding.path, embedding.name), settings)) as library:
        library.ingest(CHANGING, folder)
        spent: list[float] = []
        for turn in range(3):
            (folder / f"{turn}.md").write_text(f"# Document {turn}\n\nIt says something else now, for time {turn}.\n")
            began = time.perf_counter()
            library.ingest(CHANGING, folder)
            library.search(CHANGING, "what does it say now", K)
            spent.append(time.perf_counter() - began)
    return {"documents": count, "re-indexed after one changed, s": round(float(np.median(spent)), 2)}


@contextmanager
def _opened(home: Home, made: Made, settings: RetrievalSettings) -> Iterator[Corpus]:
    corpus = Corpus(CORPUS, home.index / CORPUS, made, settings)
    try:
        yield corpus
    finally:
        corpus.store.close()


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def _goals(whole: Row, facts: dict[str, Any]) -> tuple[Goal, ...]:
    row = whole.wire()
    return (
        Goal("all stages p50, ms", row["ms"], GOAL_MS),
        Goal("all stages p95, ms", row["ms_p95"], GOAL_MS_P95),
        Goal("re-indexed after one changed document, s", facts["re-indexed after one changed, s"], GOAL_CHANGE_S),
    )


def _draw(rows: Sequence[Row], path: Path) -> None:
    """A box for every way and stage: the middle half of the searches, and whiskers to the 5th and 95th percentile."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    shown = list(reversed(rows))
    axes.boxplot([row.ms for row in shown], orientation="horizontal", whis=(5, 95), showfliers=False)
    axes.set_yticks(range(1, len(shown) + 1), [row.stage for row in shown])
    axes.axvline(GOAL_MS, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("ms")
    figure.savefig(path, dpi=120)
