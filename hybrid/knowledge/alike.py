"""Texts that say the same in almost the same words.

MinHash signatures find candidates (Broder 1997, "On the resemblance and containment of documents"; banded as in
Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", chapter 3) and the true Jaccard similarity decides, so
that no text is lost to a chance collision.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

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


def same(one: Shingles, other: Shingles) -> bool:
    """Whether two texts without different numbers say almost the same, by their shingles."""
    return len(one & other) >= ALIKE * len(one | other)


def shingles(text: str) -> Shingles:
    """The runs of three words, case folded, with marks for the beginning and the end."""
    words = ["^", *_WORDS.findall(text.casefold()), "$"]
    return frozenset(" ".join(words[n : n + SHINGLE]) for n in range(max(1, len(words) - SHINGLE + 1)))


def numbers(text: str) -> tuple[str, ...]:
    """The words with digits, in order: a question with another number is another question."""
    return tuple(word for word in _WORDS.findall(text) if any(c.isdigit() for c in word))


class Texts:
    """An index of texts that finds those alike; 5,000 short ones take about half a second.

    Texts that differ in their numbers, or in what is given as `apart`, are never alike: their shingles are hashed
    apart, so that thousands of rows from one template are not candidates of one another.
    """

    def __init__(self, texts: Sequence[str] = (), apart: Sequence[str] = ()) -> None:
        from datasketch import MinHashLSH

        self._lsh: Any = MinHashLSH(threshold=_CANDIDATES, num_perm=_PERMUTATIONS)
        self._shingles: list[Shingles] = []
        self._signatures: list[Any] = []
        self.extend(texts, apart)

    def extend(self, texts: Sequence[str], apart: Sequence[str] = ()) -> None:
        """Adds texts, each with what keeps it apart (nothing by default); their positions count on."""
        from datasketch import MinHash

        salts = [repr((numbers(text), other)) for text, other in zip(texts, apart or [""] * len(texts), strict=True)]
        cut = [frozenset(f"{salt}{one}" for one in shingles(text)) for text, salt in zip(texts, salts, strict=True)]
        encoded = ([shingle.encode() for shingle in one] for one in cut)
        for signature in MinHash.generator(encoded, num_perm=_PERMUTATIONS, hashfunc=zlib.crc32):
            self._lsh.insert(len(self._signatures), signature, check_duplication=False)
            self._signatures.append(signature)
        self._shingles += cut

    def alike(self, position: int, among: Callable[[int], bool] = lambda _: True) -> int | None:
        """The last added text, of those `among` allows, that says almost the same as the one at `position`."""
        mine = self._shingles[position]
        for other in sorted(self._lsh.query(self._signatures[position]), reverse=True):
            theirs = self._shingles[other]
            if other != position and among(other) and same(mine, theirs):
                return int(other)
        return None

    def has(self, text: str) -> bool:
        """Whether a text like this one is in the index; it is in it afterwards."""
        self.extend([text])
        return self.alike(len(self._signatures) - 1) is not None


def groups(texts: Sequence[str]) -> list[list[int]]:
    """The positions of texts that are alike, each to one before it: groups of two and more, in their order."""
    index = Texts(texts)
    leader: list[int] = []
    found: dict[int, list[int]] = {}
    for n in range(len(texts)):
        other = index.alike(n, range(n).__contains__)
        leader.append(n if other is None else leader[other])
        found.setdefault(leader[n], []).append(n)
    return [group for group in found.values() if len(group) > 1]
