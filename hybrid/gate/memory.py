"""The taught requests themselves: what a new request resembles, and what every arm scored on those.

Every kind of gate keeps them: they say how usual a request is, what answers cost, and which examples speak for an arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.outcomes import Table

Places = npt.NDArray[np.intp]
#: (text, cosine, {arm: score}) of a taught request
Example = tuple[str, float, Mapping[str, float]]

#: requests kept of a larger table: a matrix of 16,384 x 384 is compared with a request in 3 ms on one core
MOST = 16_384
#: neighbours that tell how usual a request is
USUAL_OF = 5
#: neighbours that tell the cost of an answer, and the task a request may belong to
AROUND = 20
#: how many measured neighbours the common mean counts as
_PRIOR = 2.0
_TEXT = 500
_ROWS = 512


@dataclass(frozen=True, eq=False, slots=True)
class Near:
    """The remembered requests nearest to each of n requests, best first: `rows` [n, k] and their cosines [n, k].

    A cosine of -inf marks a row that may not vote.
    """

    rows: Places
    similarity: Vectors

    def part(self, index: Places) -> Near:
        """Those of some of the requests."""
        return Near(self.rows[index], self.similarity[index])

    def repeated(self, n: int) -> Near:
        """Those of one request, `n` times."""
        return Near(np.repeat(self.rows, n, axis=0), np.repeat(self.similarity, n, axis=0))


@dataclass(frozen=True, eq=False)
class Memory:
    """`vectors` unit [m, d], `score` and `cost` [m, arms] (NaN: not measured), `group` [m] an index into `groups`,
    `texts` what was asked. The vectors are rounded to float16, as they are kept on disk."""

    vectors: Vectors
    score: Numbers
    cost: Numbers
    group: Places
    groups: tuple[str, ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, table: Table, vectors: Vectors, seed: int) -> tuple[Memory, Places]:
        """The memory of a table with its vectors [n, d], and which of its rows are in it."""
        kept = np.sort(np.random.default_rng(seed).permutation(len(table))[:MOST])
        group, groups = table.places
        memory = cls(
            vectors[kept].astype(np.float16).astype(np.float32),
            table.score[kept].astype(np.float32).astype(np.float64),
            table.cost[kept].astype(np.float32).astype(np.float64),
            group[kept],
            groups,
            tuple(table.queries[i][:_TEXT] for i in kept),
        )
        return memory, kept

    def near(self, vectors: Vectors, k: int, apart: tuple[Places, Places] | None = None) -> Near:
        """The `k` nearest to each of `vectors` [n, d].

        `apart` holds a fold for each request [n] and for each remembered one [m]; those of one fold do not meet.
        """
        k = min(k, len(self.vectors))
        rows = np.empty((len(vectors), k), dtype=np.intp)
        cosines = np.empty((len(vectors), k), dtype=np.float32)
        for start in range(0, len(vectors), _ROWS):
            part = slice(start, start + _ROWS)
            distance = vectors[part] @ self.vectors.T
            np.negative(distance, out=distance)  # in place: a block of a large memory is tens of megabytes
            if apart is not None:
                distance[apart[0][part, None] == apart[1][None, :]] = np.inf
            best = np.argpartition(distance, k - 1, axis=1)[:, :k]
            found = np.take_along_axis(distance, best, axis=1)
            order = np.argsort(found, axis=1, kind="stable")
            rows[part] = np.take_along_axis(best, order, axis=1)
            cosines[part] = -np.take_along_axis(found, order, axis=1)
        return Near(rows, cosines)

    @cached_property
    def common_cost(self) -> Numbers:
        """[arms]: what an answer of each arm costs on average; the mean of all where nothing is known of one."""
        known = ~np.isnan(self.cost)
        count = known.sum(axis=0)
        total = np.where(known, self.cost, 0.0).sum(axis=0)
        overall = total.sum() / count.sum() if count.any() else np.nan
        return np.where(count > 0, total / np.maximum(count, 1), overall)

    def costs(self, near: Near) -> Numbers:
        """[n, arms]: what answers to requests like these cost, drawn towards the arm's mean."""
        out = np.empty((len(near.rows), self.cost.shape[1]))
        for start in range(0, len(out), _ROWS):
            part = slice(start, start + _ROWS)
            cost, votes = self.cost[near.rows[part, :AROUND]], np.isfinite(near.similarity[part, :AROUND])
            known = ~np.isnan(cost) & votes[:, :, None]
            total = np.where(known, cost, 0.0).sum(axis=1)
            out[part] = (total + _PRIOR * self.common_cost) / (known.sum(axis=1) + _PRIOR)
        return out

    def examples(self, near: Near, arms: Sequence[str]) -> tuple[tuple[Example, ...], ...]:
        """For each request up to five of the nearest, with the scores of the arms measured on them."""
        return tuple(tuple(self._example(i, c, arms) for i, c in row) for row in _best(near))

    def _example(self, row: int, cosine: float, arms: Sequence[str]) -> Example:
        scores = {arm: float(s) for arm, s in zip(arms, self.score[row], strict=True) if not np.isnan(s)}
        return self.texts[row], cosine, scores


def _best(near: Near) -> Iterator[list[tuple[int, float]]]:
    for rows, cosines in zip(near.rows[:, :USUAL_OF], near.similarity[:, :USUAL_OF], strict=True):
        yield [(int(i), round(float(c), 4)) for i, c in zip(rows, cosines, strict=True) if np.isfinite(c)]
