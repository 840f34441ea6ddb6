"""Search by words: BM25 (Robertson & Zaragoza 2009) as Lucene scores it, by bm25s (Lù 2024, arXiv 2407.03618).

A generation holds the index of its passages, title and text, in parts; what was committed since is indexed in memory as
one part more. All are scored as one: how rare a word is counts over every part. What was taken away counts until its
part is made anew, and is never returned. The index assumes nothing of the language.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.store import Rows, Store

Numbers = npt.NDArray[np.float32]

ROWS = "words.rows.npy"
#: passages in one part at most: what indexing them takes in memory
PART = 200_000
#: the parts are made anew once so much of them is gone
WORN = 0.1
#: a word is a run of letters and digits; no stop words and no stems, which belong to a language
_WORD = r"(?u)\w+"


def tokens(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text in order, in lower case."""
    found: list[list[str]] = _tokenized(texts, ids=False)
    return found


def _tokenized(texts: Sequence[str], *, ids: bool) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), token_pattern=_WORD, stopwords=[], return_ids=ids, show_progress=False)


@dataclass(frozen=True, eq=False, slots=True)
class Words:
    """The index of some passages: `rows` int64 [n] ascending, and bm25s's matrix of what each word is worth there."""

    rows: Rows
    index: Any

    @classmethod
    def of(cls, rows: Sequence[int], texts: Sequence[str]) -> Words:
        """Indexes texts under their row numbers, ascending."""
        import bm25s

        index = bm25s.BM25(backend="numpy")
        found = _tokenized(texts, ids=True)
        # bm25s indexes no texts without any word: one that no question holds stands in
        index.index(found if any(found.ids) else [["\n"]], show_progress=False)
        return cls(np.array(rows, np.int64), index)

    @classmethod
    def stored(cls, store: Store, rows: Sequence[int]) -> Words:
        """Indexes these passages of a store, by the first title of each; those that are gone are left out."""
        named = store.passages(rows)
        kept = sorted(named)
        return cls.of(kept, [f"{named[row][0].title}\n{named[row][0].text}" for row in kept])

    @classmethod
    def load(cls, folder: Path) -> Words:
        """What `save` wrote. Raises OSError, ValueError or KeyError for what it did not."""
        import bm25s

        return cls(np.load(folder / ROWS, allow_pickle=False), bm25s.BM25.load(folder, show_progress=False))

    def save(self, folder: Path) -> None:
        """Writes the index as files of a new folder: arrays without pickles, and JSON."""
        folder.mkdir(parents=True)
        self.index.save(folder, show_progress=False)
        np.save(folder / ROWS, self.rows, allow_pickle=False)

    def postings(self, word: str) -> tuple[npt.NDArray[np.int32], Numbers]:
        """(positions in `rows`, what the word adds to the score there)."""
        at = self.index.vocab_dict.get(word)
        if at is None:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        start, end = self.index.scores["indptr"][at : at + 2]
        return self.index.scores["indices"][start:end], self.index.scores["data"][start:end]


def grown(parts: Sequence[Words], store: Store, rows: Rows) -> tuple[Words, ...]:
    """The parts and these rows of a store, which ascend from the last.

    A part no larger than what comes after it is made anew with that, as a binary counter carries: of n passages there
    are never more than log n parts, and none is indexed more than log n times.
    """
    kept = list(parts)
    while len(rows) and kept and len(kept[-1].rows) <= min(len(rows), PART - len(rows)):
        rows = np.concatenate([kept.pop().rows, rows])
    starts = range(0, len(rows), PART)
    return (*kept, *(Words.stored(store, rows[start : start + PART].tolist()) for start in starts))


def renewed(parts: Sequence[Words], store: Store, rows: Rows, small: int) -> tuple[Words, ...]:
    """Parts of exactly `rows`, ascending, as far as parts can forget; made of `parts` where that can be.

    Of `small` passages or fewer there is one part, made anew whenever they change; elsewhere a new title of an old
    text counts once its part is made anew.
    """
    held = np.concatenate([np.empty(0, np.int64), *(part.rows for part in parts)])
    gone = np.setdiff1d(held, rows)
    if len(rows) <= small or len(gone) > WORN * len(held):
        return grown((), store, rows)
    return grown(parts, store, np.setdiff1d(rows, held))


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """One question against every passage: `scores` float32 [n] of `rows` int64 [n] ascending, 0 where no word is
    shared, and how rare each of its words is (inverse document frequency, natural logarithm)."""

    rows: Rows
    scores: Numbers
    rarity: dict[str, float]

    def best(self, k: int, only: Rows | None = None) -> Rows:
        """The `k` rows of the highest score above 0, best first; with `only` no others are ranked."""
        scores = self.scores if only is None else np.where(np.isin(self.rows, only), self.scores, 0)
        found = np.flatnonzero(scores)
        if len(found) > k:
            least = np.partition(scores[found], -k)[-k]
            found = found[scores[found] >= least]
        order = np.argsort(-scores[found], kind="stable")
        return self.rows[found[order[:k]]]

    def of(self, rows: Rows) -> Numbers:
        """The scores of these rows; 0 for one that is not known."""
        if not len(self.rows):
            return np.zeros(len(rows), np.float32)
        at = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        return np.where(self.rows[at] == rows, self.scores[at], 0).astype(np.float32)


def scored(parts: Sequence[Words], question: str) -> Scored:
    """Scores the passages of all parts, whose rows ascend from one to the next, as if they were one index."""
    total = sum(len(part.rows) for part in parts)
    scores = [np.zeros(max(1, len(part.rows)), np.float32) for part in parts]
    rarity: dict[str, float] = {}
    for word, times in Counter(_telling(tokens([question])[0])).items():
        postings = [part.postings(word) for part in parts]
        rare = rarity[word] = _rarity(total, sum(len(at) for at, _ in postings))
        for part, into, (at, worth) in zip(parts, scores, postings, strict=True):
            into[at] += worth * (times * rare / _rarity(len(part.rows), len(at)))
    kept = [into[: len(part.rows)] for part, into in zip(parts, scores, strict=True)]
    rows = [part.rows for part in parts]
    empty = np.empty(0, np.int64)
    return Scored(np.concatenate([empty, *rows]), np.concatenate([empty.astype(np.float32), *kept]), rarity)


def _telling(words: Sequence[str]) -> Sequence[str]:
    """A question without the English words that tell nothing, unless it has no others: few passages do not show yet
    how common they are."""
    from bm25s.stopwords import STOPWORDS_EN

    return [word for word in words if word not in STOPWORDS_EN] or words


def _rarity(passages: int, having: int) -> float:
    """Lucene's inverse document frequency."""
    return math.log(1 + (passages - having + 0.5) / (having + 0.5))
