"""Draws a held-out split: stratified by label, grouped so that what belongs together stands on one side."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

from hybrid.errors import DataError
from hybrid.training.formats import Example, Item

GROUP = "group"
#: answers are labels where each stands this often on average, and there are no more than so many
_REPEATED, _MOST_LABELS = 5, 500

T = TypeVar("T", bound=Item)


def is_closed(rows: Sequence[Item], labels: Sequence[str] = ()) -> bool:
    """Whether the answers are a closed list: one is given, or few answers come again and again."""
    if labels or not rows:
        return bool(labels)
    if not isinstance(rows[0], Example):
        return False
    distinct = len({row.reply for row in rows})
    return 1 < distinct <= min(_MOST_LABELS, len(rows) // _REPEATED)


def draw(
    rows: Sequence[T], size: int, *, seed: int = 0, group: str = GROUP, labels: Sequence[str] = ()
) -> tuple[list[T], list[T]]:
    """(the rest, about `size` drawn rows), each in the order given; the same for the same seed.

    Rows with the same question, or the same `meta[group]`, are never parted. Of a closed task every label gives its
    share; a label too rare to share stays in the rest. Raises DataError where fewer than two such units exist.
    """
    units = _units(rows, group)
    if len(units) < 2:
        raise DataError(
            "The data hold fewer than two different rows or groups; one to learn from and one to measure on are needed."
        )
    dice = random.Random(seed)
    dice.shuffle(units)
    closed = is_closed(rows, labels)
    taken: set[int] = set()
    for unit in _in_turn(rows, units) if closed else units:
        if len(taken) + len(unit) <= size:
            taken.update(unit)
    smallest = min(units, key=len)
    taken = taken or set(smallest)
    return [row for n, row in enumerate(rows) if n not in taken], [row for n, row in enumerate(rows) if n in taken]


def _in_turn(rows: Sequence[Item], units: Sequence[list[int]]) -> list[list[int]]:
    """The units so that any first part of them has the labels in their shares: systematic sampling.

    A unit's place is how much of its label lies before its middle; units of equal place keep their shuffled order.
    """
    label_of = [Counter(rows[n].reply for n in unit).most_common(1)[0][0] for unit in units]
    total: Counter[str] = Counter()
    for label, unit in zip(label_of, units, strict=True):
        total[label] += len(unit)
    before: Counter[str] = Counter()
    places: list[float] = []
    for label, unit in zip(label_of, units, strict=True):
        places.append((before[label] + len(unit) / 2) / total[label])
        before[label] += len(unit)
    return [unit for _, unit in sorted(zip(places, units, strict=True), key=lambda pair: pair[0])]


def _units(rows: Sequence[Item], group: str) -> list[list[int]]:
    """Positions of the rows that must stay together, by union of equal questions and equal groups."""
    parent = list(range(len(rows)))

    def root(n: int) -> int:
        while parent[n] != n:
            parent[n] = n = parent[parent[n]]
        return n

    first: dict[Hashable, int] = {}
    for n, row in enumerate(rows):
        named = row.meta.get(group)
        for name in (("question", row.key), ("group", str(named)) if named is not None else None):
            if name is not None:
                parent[root(n)] = root(first.setdefault(name, n))
    units: defaultdict[int, list[int]] = defaultdict(list)
    for n in range(len(rows)):
        units[root(n)].append(n)
    return list(units.values())
