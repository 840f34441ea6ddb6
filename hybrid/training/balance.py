"""How even the labels and groups of a data set are, and how far an adapter's outputs lean away from them.

Fine-tuning amplifies what is frequent (Zhao et al. 2017, "Men also like shopping", arXiv 1707.09457), so the training
skew is reported, and `skew` measures what an adapter made of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.training.formats import Item
from hybrid.training.splits import GROUP, is_closed

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often each name stands, the most frequent first."""

    counts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, names: Iterable[str], expected: Iterable[str] = ()) -> Distribution:
        """Counts `names`; those of `expected` that never stand count 0."""
        counts = Counter({name: 0 for name in expected})
        counts.update(names)
        return cls(tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))))

    @property
    def rows(self) -> int:
        """How many names were counted."""
        return sum(count for _, count in self.counts)

    @property
    def evenness(self) -> float:
        """The entropy as a share of the greatest possible: 1 where all are equally frequent, 0 where one is all."""
        if len(self.counts) < 2:
            return 1.0
        shares = [count / self.rows for _, count in self.counts if count]
        return -sum(share * math.log(share) for share in shares) / math.log(len(self.counts))

    @property
    def imbalance(self) -> float:
        """The most frequent count over the least frequent one; infinite where a label never stands."""
        least = self.counts[-1][1]
        return self.counts[0][1] / least if least else math.inf

    def wire(self) -> dict[str, Any]:
        """The report: `imbalance` is None where a label has no row."""
        return {
            "distinct": len(self.counts),
            "evenness": round(self.evenness, 4),
            "imbalance": round(self.imbalance, 2) if math.isfinite(self.imbalance) else None,
            "most": dict(self.counts[:_SHOWN]),
            "least": dict(self.counts[-_SHOWN:]),
        }


@dataclass(frozen=True, slots=True)
class Balance:
    """The labels of a closed task and the groups that rows name; None where there are none."""

    labels: Distribution | None
    groups: Distribution | None

    def wire(self) -> dict[str, Any]:
        """Both as JSON."""
        return {"labels": self.labels and self.labels.wire(), "groups": self.groups and self.groups.wire()}


def balance(rows: Sequence[Item], labels: Sequence[str] = (), group: str = GROUP) -> Balance:
    """The balance of training rows; `labels` are all that may be answered, `group` the key of `meta`."""
    groups = [str(row.meta[group]) for row in rows if row.meta.get(group) is not None]
    return Balance(
        labels=Distribution.of((row.reply for row in rows), labels) if is_closed(rows, labels) else None,
        groups=Distribution.of(groups) if groups else None,
    )


@dataclass(frozen=True, slots=True)
class Skew:
    """How outputs lean: `distance` is 0 (as in training) to 1 (nothing in common); `leans` the largest changes."""

    distance: float
    leans: tuple[tuple[str, float], ...]

    def wire(self) -> dict[str, Any]:
        """Distance, and by how much of all answers the leaning ones became more (+) or less (-) frequent."""
        return {"distance": round(self.distance, 4), "leans": {name: round(by, 4) for name, by in self.leans}}


def skew(train_answers: Sequence[str], output_answers: Sequence[str]) -> Skew:
    """Total variation distance between the answers trained on and those given, with the labels that moved most."""
    before, after = Counter(train_answers), Counter(output_answers)
    moved = {
        name: after[name] / max(1, len(output_answers)) - before[name] / max(1, len(train_answers))
        for name in {*before, *after}
    }
    leans = sorted(moved.items(), key=lambda pair: (-abs(pair[1]), pair[0]))[:_SHOWN]
    return Skew(sum(map(abs, moved.values())) / 2, tuple((name, by) for name, by in leans if by))
