"""What a run learns from, out of what was read: tasks mixed, and the few rows that a few-shot run may see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import TypeVar

from hybrid.errors import DataError
from hybrid.training.data import Counts, Dataset
from hybrid.training.formats import Example, Item, Pair, Text
from hybrid.training.recipes import Recipe
from hybrid.training.splits import draw

T = TypeVar("T", bound=Item)


def assemble(found: Sequence[Dataset], recipe: Recipe) -> Dataset:
    """The data sets as one, cut to `recipe.rows` training rows where the recipe says so.

    The rows are a stratified draw: of a closed task every label gives its share. Raises DataError.
    """
    data = mixed(found, seed=recipe.seed, temperature=recipe.mixture_temperature)
    if not 0 < recipe.rows < len(data.train_items):
        return data
    drawn = draw(data.train_items, recipe.rows, seed=recipe.seed, labels=data.labels)[1]
    return _with_items(data, drawn, data.dev_items)


def mixed(found: Sequence[Dataset], *, seed: int, temperature: float) -> Dataset:
    """Several tasks as one, every row under its own task's instruction (multi-task, Raffel et al. 2020, T5).

    As many training rows as all have together; a task's share is its size to the power 1 / `temperature`: 1 keeps the
    sizes, a high one makes the tasks equal. A task that must give more than it has repeats its rows. The dev rows take
    turns, so that any first part of them holds every task. Rows of a mixture carry `meta.task`, and `bare` is what a
    client sends, since there is no one instruction. Raises DataError for data of different kinds.
    """
    if len(found) == 1:
        return found[0]
    if len({data.kind for data in found}) > 1:
        kinds = ", ".join(f"{data.name} is {data.kind}" for data in found)
        raise DataError(
            f"A mixture needs data of one kind ({kinds}); train on each kind by itself, then --set init_from."
        )
    dice = random.Random(seed)
    sizes = shares([len(data.train_items) for data in found], temperature)
    train = [
        row
        for data, size in zip(found, sizes, strict=True)
        for row in _take(_named(data, data.train_items), size, dice)
    ]
    turns = zip_longest(*(_named(data, data.dev_items) for data in found))
    metrics = {data.metric for data in found}
    whole = Dataset(
        name="-".join(data.name for data in found),
        train=(),
        dev=(),
        counts=_summed([data.counts for data in found]),
        kind=found[0].kind,
        metric=metrics.pop() if len(metrics) == 1 else "",
        license="; ".join(sorted({data.license for data in found if data.license})),
        source="; ".join(sorted({data.source for data in found if data.source})),
    )
    return _with_items(whole, train, [row for row in chain.from_iterable(turns) if row is not None])


def shares(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many rows each task gives, about as many as there are in all; at least one each."""
    weights = [size ** (1 / temperature) for size in sizes]
    return [max(1, round(sum(sizes) * weight / sum(weights))) for weight in weights]


def _take(rows: Sequence[T], size: int, dice: random.Random) -> list[T]:
    """`size` of the rows: some of them, or all again and again and then some."""
    return [*list(rows) * (size // len(rows)), *dice.sample(list(rows), size % len(rows))]


def _named(data: Dataset, items: Sequence[Item]) -> list[Item]:
    """The rows as rows of a mixture: with the task in id and meta."""
    named = [replace(item, id=f"{data.name}/{item.id}", meta={**item.meta, "task": data.name}) for item in items]
    return [replace(item, bare=item.question) if isinstance(item, Example) else item for item in named]


def _summed(counts: Sequence[Counts]) -> Counts:
    return Counts(
        **{name: sum(count.wire()[name] for count in counts) for name in counts[0].wire()},
        complaints=tuple(line for count in counts for line in count.complaints),
        removed=tuple(line for count in counts for line in count.removed),
    )


def _with_items(data: Dataset, train: Sequence[Item], dev: Sequence[Item]) -> Dataset:
    return replace(
        data,
        train=_examples(train),
        dev=_examples(dev),
        pairs=tuple(item for item in train if isinstance(item, Pair)),
        dev_pairs=tuple(item for item in dev if isinstance(item, Pair)),
        texts=tuple(item for item in train if isinstance(item, Text)),
        dev_texts=tuple(item for item in dev if isinstance(item, Text)),
    )


def _examples(items: Sequence[Item]) -> tuple[Example, ...]:
    found = [item.preferred if isinstance(item, Pair) else item for item in items]
    return tuple(item for item in found if isinstance(item, Example))
