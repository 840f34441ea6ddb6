"""Near duplicates: rows that ask the same in almost the same words.

MinHash signatures find candidates (Broder 1997, "On the resemblance and containment of documents"; banded as in
Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", chapter 3) and the true Jaccard similarity decides, so
that no row is lost to a chance collision.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from hybrid.training.formats import Item

#: Jaccard similarity of three-word shingles from which two inputs are the same question. Measured on eleven public
#: tasks of short commands, questions, tables and abstracts: nothing in eight, at most 4 rows in 1,000 in the others.
ALIKE = 0.9
SHINGLE = 3
#: where more of the rows than this are near duplicates, what they share is a template and what differs is the data
TEMPLATED = 0.2
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
            if other != position and among(other) and len(mine & theirs) >= ALIKE * len(mine | theirs):
                return int(other)
        return None

    def has(self, text: str) -> bool:
        """Whether a text like this one is in the index; it is in it afterwards."""
        self.extend([text])
        return self.alike(len(self._signatures) - 1) is not None


def near_duplicates(rows: Sequence[Item], held: Sequence[Item]) -> tuple[dict[int, Item], dict[int, Item]]:
    """Positions of `rows` that repeat an earlier row, and of those that repeat a held-out row, each with which one.

    Inputs must be alike, what stands before them equal, and replies equal but for case: a small change of words that
    changes the answer is another question, and worth learning. Nothing is found in data that come from a template.
    """
    everything = [*rows, *held]
    index = Texts([item.bare for item in everything], [_around(item) for item in everything])
    repeated: dict[int, Item] = {}
    leaked: dict[int, Item] = {}

    def compared(n: int) -> Callable[[int], bool]:
        """Held-out rows, and the earlier ones that stay."""
        return lambda m: m >= len(rows) or (m < n and m not in repeated and m not in leaked)

    for n in range(len(rows)):
        other = index.alike(n, compared(n))
        if other is not None:
            (leaked if other >= len(rows) else repeated)[n] = everything[other]
        if len(repeated) + len(leaked) > TEMPLATED * len(rows):
            return {}, {}
    return repeated, leaked


def _around(item: Item) -> str:
    """What must be equal beside the input: the reply, the earlier turns, the words before the input."""
    *earlier, (_, last) = item.key
    around = (item.reply.casefold(), last.removesuffix(item.bare), *(text for _, text in earlier))
    return hashlib.sha256(repr(around).encode()).hexdigest()[:16]
