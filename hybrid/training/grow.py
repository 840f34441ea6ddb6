"""Synthetic rows: other wordings of training inputs from any endpoint, each with the answer of its original.

Rewording the rows one has is the augmentation that keeps labels right most often; inventing rows from nothing
(Wang et al. 2023, "Self-Instruct", arXiv 2212.10560) needs answers that nobody has checked.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.errors import BadRequest
from hybrid.prompts import paraphrase_messages
from hybrid.training.data import Splits
from hybrid.training.endpoint import Endpoint
from hybrid.training.formats import Example
from hybrid.training.pool import Fresh
from hybrid.training.splits import is_closed

#: asks at most so many times for each row that is wanted: repeats of known rows are not counted as rows
_TRIES = 3


@dataclass(frozen=True, slots=True)
class Grown:
    """New task rows with `meta.synthetic`, `meta.from` and `meta.by`; `repeated` answers were known already."""

    rows: tuple[dict[str, Any], ...]
    asked: int
    repeated: int


async def grow(splits: Splits, n: int, endpoint: Endpoint, *, seed: int = 0) -> Grown:
    """At most `n` reworded training rows that are new to train, dev and test, near duplicates counted as known.

    The labels of a closed task take turns, so that rare ones grow most. Raises BadRequest for rows without an answer,
    and what the endpoint raises.
    """
    originals = _in_turn(splits, seed)
    fresh = Fresh((*splits.train, *splits.dev, *splits.test))
    rows: list[dict[str, Any]] = []
    asked = 0
    while len(rows) < n and asked < _TRIES * n:
        lot = [originals[(asked + k) % len(originals)] for k in range(n - len(rows))]
        said = await endpoint.ask_all(
            [paraphrase_messages(splits.instruction, row.bare, row.answer) for row in lot], temperature=0.9, top_p=0.95
        )
        asked += len(lot)
        rows += [
            _row(row, answer.text, len(rows) + k, endpoint.model)
            for k, (row, answer) in enumerate(zip(lot, said, strict=True))
            if answer.text and fresh.take(answer.text)
        ]
    return Grown(tuple(rows), asked, asked - len(rows))


def _row(original: Example, text: str, n: int, by: str) -> dict[str, Any]:
    meta = {**original.meta, "synthetic": True, "from": original.id, "by": by}
    return {"id": f"{original.id}~{n}", "input": text, "reference": original.answer, "meta": meta}


def _in_turn(splits: Splits, seed: int) -> Sequence[Example]:
    """The single-turn training rows, shuffled; those of a closed task one of each label after the other."""
    rows = [item for item in splits.train if isinstance(item, Example) and len(item.messages) == 1]
    if not rows:
        raise BadRequest("This needs rows with one input and one answer; the data hold none.")
    dice = random.Random(seed)
    dice.shuffle(rows)
    if not is_closed(rows, splits.labels):
        return rows
    place: defaultdict[str, int] = defaultdict(int)
    turns: list[tuple[int, Example]] = []
    for row in rows:
        turns.append((place[row.answer], row))
        place[row.answer] += 1
    return [row for _, row in sorted(turns, key=lambda pair: pair[0])]
