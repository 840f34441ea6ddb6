"""What the kinds of gates share: what they are shown of a request, and the folds that all of them are tried on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from hybrid.errors import DataError
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.form import form
from hybrid.gate.groups import GroupMeans, Groups
from hybrid.gate.memory import Memory, Near, Places
from hybrid.gate.outcomes import Lessons, lessons

Tensors = dict[str, npt.NDArray[Any]]

FOLDS = 5
#: neighbours found for every row of a study: as many as any setting of the nearest-neighbour gate looks at
NEIGHBOURS = 160
_LEAST = 8
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """Requests as a gate sees them: unit `vectors` [n, d], `form` [n, columns], what they are `near` to, and the
    probabilities of the groups they may be of, `group` [n, groups]."""

    vectors: Vectors
    form: Numbers
    near: Near
    group: Numbers

    def part(self, index: Places) -> Asked:
        """Some of the requests."""
        return Asked(self.vectors[index], self.form[index], self.near.part(index), self.group[index])


class Model(Protocol):
    """A learned estimate of every arm's score. Fitting may be heavy; `raw` is numpy alone and safe in threads."""

    kind: ClassVar[str]

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        """(a setting, its estimates [n, arms] for rows that the fit had not seen), for every setting worth trying."""
        ...

    @classmethod
    def fit(cls, study: Study, setting: float) -> Self:
        """The model of all rows."""
        ...

    def raw(self, asked: Asked) -> Numbers:
        """[n, arms]: estimated scores, not yet calibrated."""
        ...

    @property
    def reach(self) -> int:
        """How many neighbours it looks at."""
        ...

    def tensors(self) -> Tensors:
        """What `load` needs beside the memory."""
        ...

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> Self:
        """The model that `tensors` was taken of."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Fold:
    """One fold of a study: the rows that are `fitted` and those that are `tried`, what the arms scored in every group
    of the former, and the latter as a gate sees them."""

    fitted: Places
    tried: Places
    means: GroupMeans
    asked: Asked


@dataclass(frozen=True, eq=False, slots=True)
class Study:
    """A table laid out for cross-validation: its folds, every row as `asked` with the neighbours and groups that the
    other folds tell, its own `group` [n], what all of it says of `groups` and their `means`, and the `worth` [n, arms]
    of taking an arm for a row."""

    table: Lessons
    asked: Asked
    memory: Memory
    folds: tuple[Fold, ...]
    group: Places
    groups: Groups
    means: GroupMeans
    worth: Numbers
    seed: int

    @classmethod
    def of(cls, table: Lessons, vectors: Vectors, seed: int) -> Study:
        """Raises DataError where there are too few different queries to check anything by, Refused for a table that
        may not teach."""
        place = _folds(lessons(table), seed)
        memory, kept = Memory.of(table, vectors, seed)
        near = memory.near(vectors, NEIGHBOURS, (place, place[kept]))
        looks = form(table.queries)
        group, names = table.places
        chance, worth = np.empty((len(table), len(names))), np.empty_like(table.score)
        parts = []
        for fold in range(int(place.max()) + 1):
            fitted, tried = np.flatnonzero(place != fold), np.flatnonzero(place == fold)
            means = GroupMeans.of(table.score[fitted], group[fitted], len(names))
            groups = Groups.of(vectors[fitted], looks[fitted], group[fitted], len(names))
            chance[tried] = groups(vectors[tried], looks[tried])
            worth[tried] = means.mean[group[tried]]
            parts.append((fitted, tried, means))
        asked = Asked(vectors, looks, near, chance)
        return cls(
            table,
            asked,
            memory,
            tuple(Fold(fitted, tried, means, asked.part(tried)) for fitted, tried, means in parts),
            group,
            Groups.of(vectors, looks, group, len(names)),
            GroupMeans.of(table.score, group, len(names)),
            _worth(table, group, worth),
            seed,
        )


def _worth(table: Lessons, group: Places, expected: Numbers) -> Numbers:
    """[n, arms]: what an arm scored on a row, or what is `expected` of it there, so that means over a group's rows are
    right for arms that were measured on some of them only (doubly robust: Dudík, Langford & Li 2011, arXiv 1103.4601).
    """
    measured = table.measured
    share = np.zeros((int(group.max()) + 1, measured.shape[1]))
    np.add.at(share, group, measured)
    share /= np.bincount(group)[:, None]
    away = np.where(measured, np.nan_to_num(table.score) - expected, 0.0)
    worth: Numbers = expected + away / np.maximum(share, 1e-9)[group]
    return worth


def _folds(table: Lessons, seed: int) -> Places:
    """[n]: a fold for every row. Queries of the same words stay together; every group is spread over all folds."""
    units: dict[bytes, list[int]] = {}
    for i, query in enumerate(table.queries):
        units.setdefault(_words(query), []).append(i)
    if len(units) < _LEAST:
        raise DataError(
            f"The outcomes hold {len(units)} different queries; a gate needs {_LEAST} at least, better hundreds."
        )
    drawn = list(units.values())
    np.random.default_rng(seed).shuffle(drawn)
    drawn.sort(key=lambda unit: table.groups[unit[0]])  # stable: the draw decides within a group
    folds = np.empty(len(table), dtype=np.intp)
    for n, unit in enumerate(drawn):
        folds[unit] = n % FOLDS
    return folds


def _words(query: str) -> bytes:
    """A digest of the different words of a query: a long one has hundreds, and a table tens of thousands of queries."""
    words = sorted(set(_WORD.findall(query.casefold()))) or [query]
    return hashlib.blake2b("\n".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def fill(n: int, parts: Sequence[tuple[Places, Numbers]]) -> Numbers:
    """[n, arms] put together from the rows of every fold."""
    out = np.empty((n, parts[0][1].shape[1]))
    for rows, values in parts:
        out[rows] = values
    return out
