"""Near duplicates: rows that ask the same in almost the same words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from hybrid.knowledge.alike import Texts
from hybrid.training.formats import Item

#: where more of the rows than this are near duplicates, what they share is a template and what differs is the data
TEMPLATED = 0.2


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
