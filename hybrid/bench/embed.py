"""`embed`: our embedder and sentence-transformers read the same passages and questions, taking turns.

The rival is `SentenceTransformer.encode` as it comes: float32, its own batches, all cores.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hybrid.bench.result import Goal, Result, ratio
from hybrid.errors import DataError
from hybrid.knowledge.chunk import Chunker
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.read import read
from hybrid.models import ModelFiles
from hybrid.settings import RetrievalSettings

OURS, RIVAL = "hybrid", "sentence-transformers"
QUESTIONS = "dev.jsonl"
SEED, CUT, WARM_UP = 0, 5, 16
GOAL_TIMES, GOAL_MS, GOAL_DISTANCE, GOAL_RECALL = 5.0, 5.0, 1e-3, 0.005

Embed = Callable[[Sequence[str]], Vectors]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the documents that answer it; none are known where only passages were given."""

    text: str
    gold: frozenset[str]


@dataclass(frozen=True, slots=True)
class Material:
    """Passages with the documents they are of, as an index holds them, and questions to find them by."""

    passages: Sequence[str]
    documents: Sequence[str]
    questions: Sequence[Question]

    @classmethod
    def read(cls, source: Path, embedder: Embedder, passages: int, questions: int) -> Material:
        """A seeded sample of a folder cut as `hybrid index` cuts it; what answers a question is always in it."""
        rng = Random(SEED)
        asked = _questions(source / QUESTIONS)
        asked = rng.sample(asked, min(questions, len(asked)))
        gold = frozenset[str]().union(*(question.gold for question in asked))
        documents, _ = read(source)
        rng.shuffle(documents)
        chunker = Chunker(embedder.count_tokens, RetrievalSettings().chunk_tokens)
        found: list[tuple[str, str]] = []
        for document in sorted(documents, key=lambda d: d.id not in gold):
            if len(found) >= passages:
                break
            pieces = chunker.cut(document.title, document.text, markdown=document.markdown)
            found += [(f"{p.title}\n{p.text}" if p.title else p.text, document.id) for p in pieces]
        rng.shuffle(found)
        lines, owners = zip(*found[:passages], strict=True)
        # without questions any words of a passage do for a time, and for what both find nearest; each is asked once
        words = dict.fromkeys(" ".join(line.split()[-12:]) for line in lines[:questions])
        return cls(lines, owners, asked or [Question(text, frozenset()) for text in words])


class Contestant:
    """One of the two, what it made, and how long it took: seconds a slice, milliseconds a question."""

    def __init__(self, who: str, embed: Embed, ask: Embed) -> None:
        self.who = who
        self._embed, self._ask = embed, ask
        self.passages: list[Vectors] = []
        self.questions: list[Vectors] = []
        self.speeds: list[float] = []
        self.waits: list[float] = []

    def slice(self, texts: Sequence[str]) -> None:
        """Embeds passages in bulk."""
        began = time.perf_counter()
        self.passages.append(self._embed(texts))
        self.speeds.append(len(texts) / (time.perf_counter() - began))

    def question(self, text: str) -> None:
        """Embeds one question."""
        began = time.perf_counter()
        self.questions.append(self._ask([text]))
        self.waits.append((time.perf_counter() - began) * 1000)

    def row(self, material: Material) -> dict[str, Any]:
        """The numbers of the table."""
        row = {
            "embedder": self.who,
            "passages_per_s": round(statistics.median(self.speeds), 1),
            "question_ms": round(statistics.median(self.waits), 2),
            "question_ms_p95": round(float(np.percentile(self.waits, 95)), 2),
        }
        recall = self.recall(material)
        return row if recall is None else {**row, f"recall@{CUT}": round(recall, 4)}

    def recall(self, material: Material) -> float | None:
        """The share of questions with a passage that answers among the five nearest; None where none is known."""
        known = [(near, q.gold) for near, q in zip(self.nearest(), material.questions, strict=True) if q.gold]
        if not known:
            return None
        return statistics.fmean(any(material.documents[i] in gold for i in near) for near, gold in known)

    def nearest(self) -> list[list[int]]:
        """For each question the five nearest passages."""
        cosines = np.concatenate(self.questions) @ np.concatenate(self.passages).T
        found: list[list[int]] = np.argsort(-cosines, axis=1, kind="stable")[:, :CUT].tolist()
        return found


async def measure(
    source: Path,
    *,
    embedding: ModelFiles,
    passages: int,
    questions: int,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Both embed `passages` of `source` in `rounds` slices, then `questions` one by one, the first to begin changing.

    `source` is what `hybrid index` reads; a task folder's dev questions that name their `gold_passages` are asked, so
    that recall can be told. Raises DataError when nothing can be read.
    """
    return await asyncio.to_thread(_measure, source, embedding, passages, questions, rounds, progress)


def _measure(
    source: Path,
    embedding: ModelFiles,
    passages: int,
    questions: int,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> Result:
    embedder = Embedder(embedding.path, embedding.name)
    progress("reading", 0, rounds + 1)
    material = Material.read(source, embedder, passages, questions)
    if len(material.passages) < rounds:
        raise DataError(f"{source} gives {len(material.passages)} passages, fewer than {rounds} rounds; give more.")
    encode = _rival(embedding.path)
    ours = Contestant(OURS, embedder.embed, lambda texts: embedder.embed_query(texts[0])[None, :])
    rival = Contestant(RIVAL, encode, encode)
    for warm in (embedder.embed, encode):
        warm(material.passages[:WARM_UP])
    for number in range(rounds):
        progress("passages", number, rounds + 1)
        for one in _turn(number, ours, rival):
            one.slice(material.passages[number::rounds])
    progress("questions", rounds, rounds + 1)
    for number, question in enumerate(material.questions):
        for one in _turn(number, ours, rival):
            one.question(question.text)
    progress("done", rounds + 1, rounds + 1)
    return _result(ours, rival, _as_embedded(material, rounds), {"model": embedding.name, "rounds": rounds})


def _rival(path: Path) -> Embed:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str]) -> Vectors:
        vectors: Vectors = model.encode(list(texts), normalize_embeddings=True)
        return vectors

    return encode


def _turn(number: int, *contestants: Contestant) -> tuple[Contestant, ...]:
    return contestants if number % 2 == 0 else contestants[::-1]


def _as_embedded(material: Material, rounds: int) -> Material:
    """The material with its passages in the order in which the slices took them."""
    order = [i for number in range(rounds) for i in range(number, len(material.passages), rounds)]
    lines, documents = ([of[i] for i in order] for of in (material.passages, material.documents))
    return Material(lines, documents, material.questions)


def _result(ours: Contestant, rival: Contestant, material: Material, facts: Mapping[str, Any]) -> Result:
    times = {"passages": ratio(ours.speeds, rival.speeds), "question": ratio(rival.waits, ours.waits)}
    made = [(c.passages + c.questions) for c in (ours, rival)]
    cosines = np.einsum("nd,nd->n", *(np.concatenate(m).astype(np.float64) for m in made))
    distance = float(f"{max(0.0, 1 - cosines.min()):.2g}")
    shared = statistics.fmean(
        len(set(a) & set(b)) / len(b) for a, b in zip(ours.nearest(), rival.nearest(), strict=True)
    )
    rows = (ours.row(material), rival.row(material))
    summary = {
        **facts,
        "passages": len(material.passages),
        "characters": round(statistics.fmean(map(len, material.passages))),
        "questions": len(material.questions),
        "times": times,
        "cosine_distance": distance,
        f"shared_top_{CUT}": round(shared, 4),
    }
    goals = [
        Goal(f"times {RIVAL}'s passages/s", times["passages"]["median"], GOAL_TIMES, at_least=True),
        Goal("a question's vector, ms", rows[0]["question_ms"], GOAL_MS),
        Goal("largest cosine distance", distance, GOAL_DISTANCE),
    ]
    here, there = ours.recall(material), rival.recall(material)
    if here is not None and there is not None:
        goals.append(Goal(f"recall@{CUT} below the rival's", round(there - here, 4), GOAL_RECALL))
    return Result("embed", rows, summary, tuple(goals))


def _questions(path: Path) -> list[Question]:
    """The rows of a split that name their gold passages, each question once."""
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    gold = {str(row["input"]): (row.get("meta") or {}).get("gold_passages") for row in rows}
    return [Question(text, frozenset(map(str, ids))) for text, ids in gold.items() if ids]
