"""A corpus that nobody wrote: words as often as words are used (Zipf 1949), and vectors that lie in clusters of few
dimensions, as those of texts do."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from hybrid.knowledge.embed import Embedder, Vectors

VOCABULARY = 50_000
#: words of a passage: between these
LENGTH = (40, 120)
CLUSTERS = 512
#: directions in which texts differ, how far those of a cluster lie apart in them, and what else is in a vector
DEPTH, SPREAD, NOISE = 32, 0.6, 0.05
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]


def word(rank: int) -> str:
    """The word of a rank: the more common the shorter."""
    parts = [_SYLLABLES[rank % len(_SYLLABLES)]]
    while rank := rank // len(_SYLLABLES):
        parts.append(_SYLLABLES[rank % len(_SYLLABLES)])
    return "".join(parts)


def texts(count: int, seed: int = 0) -> Iterator[str]:
    """Passages of words; the word of rank r comes 1 / r as often as the first."""
    dice = np.random.default_rng(seed)
    words = np.array([word(rank) for rank in range(VOCABULARY)])
    chances = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    for length in dice.integers(*LENGTH, count).tolist():
        yield " ".join(words[np.searchsorted(chances, dice.random(length) * chances[-1])])


def write_corpus(folder: Path, count: int) -> list[str]:
    """Writes a `corpus.jsonl` of so many passages `p0`, `p1`, …; returns their texts."""
    folder.mkdir()
    written = list(texts(count))
    with (folder / "corpus.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": f"p{n}", "title": "", "text": text}) + "\n" for n, text in enumerate(written))
    return written


class Space:
    """Unit vectors of `dim` numbers in clusters; the same for the same seed."""

    def __init__(self, dim: int) -> None:
        dice = np.random.default_rng(0)
        self.dim = dim
        self._middles = dice.standard_normal((CLUSTERS, DEPTH), np.float32)
        self._turn = dice.standard_normal((DEPTH, dim), np.float32) / np.float32(np.sqrt(dim))

    def draw(self, count: int, seed: int) -> Vectors:
        """Vectors float32 [count, dim]."""
        dice = np.random.default_rng(seed)
        apart = np.float32(SPREAD) * dice.standard_normal((count, DEPTH), np.float32)
        own = (self._middles[dice.integers(CLUSTERS, size=count)] + apart) @ self._turn
        own += np.float32(NOISE) * dice.standard_normal((count, self.dim), np.float32)
        return unit(own)


def unit(vectors: Vectors) -> Vectors:
    """Vectors [n, d] at length 1."""
    shorter: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return shorter


class Made(Embedder):
    """An embedder that takes no time in bulk: a text's vector is drawn by its checksum. A question takes the time of
    the real one, and gets a vector beside that of the passage it was taken from."""

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self.asked: dict[str, Vectors] = {}

    @cached_property
    def _space(self) -> Space:
        return Space(self.dim)

    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Vectors:
        drawn = [self._space.draw(1, zlib.crc32(text.encode())) for text in texts]
        if progress:
            progress(len(texts), len(texts))
        return np.concatenate([np.empty((0, self.dim), np.float32), *drawn])

    def embed_query(self, text: str) -> Vectors:
        real = super().embed_query(text)
        return self.asked.get(text, real)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    def ask_about(self, texts: Sequence[str], seed: int) -> list[str]:
        """A question for each passage: six of its words, and a vector that lies beside its own."""
        dice = np.random.default_rng(seed)
        questions = [" ".join(dice.choice(text.split(), 6)) for text in texts]
        beside = unit(self.embed(texts) + 0.5 * self._space.draw(len(texts), seed))
        self.asked.update(zip(questions, beside, strict=True))
        return questions
