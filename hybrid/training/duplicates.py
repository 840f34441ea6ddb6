"""Near duplicates: rows that ask the same in almost the same words.

MinHash signatures find candidates (Broder 1997, "On the resemblance and containment of documents"; banded as in
Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", chapter 3) and the true Jaccard similarity decides, so
that no row is lost to a chance collision.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hybrid.training.formats import Item

#: Jaccard similarity of three-word shingles from which two inputs are the same question. Measured on eleven public
#: tasks of short commands, questions, tables and abstracts: nothing in eight, at most 4 rows in 1,000 in the others.
ALIKE = 0.9
SHINGLE = 3
_PERMUTATIONS = 64
#: candidates are asked for below ALIKE, because a signature only estimates; the true similarity is computed after
_CANDIDATES = 0.8
#: words and signs that carry meaning (`+`, `<`); not the punctuation that people add and leave out
_WORDS = re.compile(r"\w+|[^\w\s.,;:!?'\"]")

Shingles = frozenset[str]


def shingles(text: str) -> Shingles:
    """The runs of three words, case folded, with marks for the beginning and the end."""
    words = ["^", *_WORDS.findall(text.casefold()), "$"]
    return frozenset(" ".join(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1)))


def numbers(text: str) -> tuple[str, ...]:
    """The words with digits, in order: a question with another number is another question."""
    return tuple(word for word in _WORDS.findall(text) if any(c.isdigit() for c in word))


class Texts:
    """An index of texts that finds those alike; 5,000 short ones take about half a second."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        from datasketch import MinHashLSH

        self._lsh: Any = MinHashLSH(threshold=_CANDIDATES, num_perm=_PERMUTATIONS)
        self._texts: list[str] = []
        self._shingles: list[Shingles] = []
        self._signatures: list[Any] = []
        self.extend(texts)

    def extend(self, texts: Iterable[str]) -> None:
        """Adds texts; their positions count on."""
        from datasketch import MinHash

        new = list(texts)
        cut = [shingles(text) for text in new]
        encoded = ([shingle.encode() for shingle in one] for one in cut)
        for signature in MinHash.generator(encoded, num_perm=_PERMUTATIONS, hashfunc=zlib.crc32):
            self._lsh.insert(len(self._signatures), signature, check_duplication=False)
            self._signatures.append(signature)
        self._texts += new
        self._shingles += cut

    def alike(self, position: int) -> Iterator[int]:
        """The positions of the other texts that say almost the same as the one at `position`."""
        mine, own = self._shingles[position], numbers(self._texts[position])
        for other in sorted(self._lsh.query(self._signatures[position])):
            theirs = self._shingles[other]
            same = len(mine & theirs) >= ALIKE * len(mine | theirs)
            if other != position and same and numbers(self._texts[other]) == own:
                yield other

    def has(self, text: str) -> bool:
        """Whether a text like this one is in the index; it is in it afterwards."""
        self.extend([text])
        return any(True for _ in self.alike(len(self._texts) - 1))


def near_duplicates(rows: Sequence[Item], held: Sequence[Item]) -> tuple[dict[int, Item], dict[int, Item]]:
    """Positions of `rows` that repeat an earlier row, and of those that repeat a held-out row, each with which one.

    Inputs must be alike, what stands before them equal, and replies equal but for case: a small change of words that
    changes the answer is another question, and worth learning.
    """
    everything = [*rows, *held]
    index = Texts(item.bare for item in everything)
    around = [_around(item) for item in everything]
    repeated: dict[int, Item] = {}
    leaked: dict[int, Item] = {}
    for n in range(len(rows)):
        like = [m for m in index.alike(n) if around[m] == around[n] and m not in repeated]
        if shown := next((m for m in like if m >= len(rows)), None):
            leaked[n] = everything[shown]
        elif (earlier := next(iter(like), n)) < n and earlier not in leaked:
            repeated[n] = everything[earlier]
    return repeated, leaked


def _around(item: Item) -> tuple[str, ...]:
    """What must be equal beside the input: the reply, the earlier turns, the words before the input."""
    *earlier, (_, last) = item.key
    return (item.reply.casefold(), last.removesuffix(item.bare), *(text for _, text in earlier))
