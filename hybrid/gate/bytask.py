"""First which task a request is of, then which arm does best on that task: most of what there is to know where tasks
differ. A ridge regression an arm on what is left says what single requests need beyond their task's mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

from hybrid.gate.features import Numbers
from hybrid.gate.linear import Linear
from hybrid.gate.memory import AROUND, Memory, Places
from hybrid.gate.study import Asked, Study, Tensors, fill

#: ridges of what is left; the last leaves next to nothing of it
PENALTIES = (3.0, 10.0, 30.0, 100.0, 1000.0)


@dataclass(frozen=True, eq=False, slots=True)
class ByTask:
    """`mean` [groups, arms], and what `beyond` it a single request promises."""

    kind: ClassVar[str] = "tasks"

    mean: Numbers
    beyond: Linear

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        tried: list[list[tuple[Places, Numbers]]] = [[] for _ in PENALTIES]
        for fold in study.folds:
            left = study.table.score[fold.fitted] - fold.means.mean[study.group[fold.fitted]]
            found = Linear.ridge(study.asked.part(fold.fitted), left, PENALTIES)
            for parts, beyond in zip(tried, found, strict=True):
                parts.append((fold.tried, cls(fold.means.mean, beyond).raw(fold.asked)))
        for penalty, parts in zip(PENALTIES, tried, strict=True):
            yield penalty, fill(len(study.table), parts)

    @classmethod
    def fit(cls, study: Study, setting: float) -> ByTask:
        mean = study.means.mean
        left = study.table.score - mean[study.group]
        return cls(mean, Linear.ridge(study.asked, left, (setting,))[0])

    def raw(self, asked: Asked) -> Numbers:
        return asked.group @ self.mean + self.beyond.raw(asked)

    @property
    def reach(self) -> int:
        return AROUND

    def tensors(self) -> Tensors:
        return {"mean": self.mean, **self.beyond.tensors()}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> ByTask:
        return cls(tensors["mean"], Linear.load(tensors, memory))
