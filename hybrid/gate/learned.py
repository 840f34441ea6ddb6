"""A gate that outcomes taught: expected score and cost of every arm, how usual a request is, and who says so.

    model (tasks, knn, linear or towers) ─► bounded to what was measured ─► trust ─► calibrated ─► Estimate

Fitting is heavy and may import torch and scikit-learn; predicting is numpy alone, and any number of threads may do it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.errors import Refused
from hybrid.gate.bytask import ByTask
from hybrid.gate.calibrate import Conformal, Isotonic
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.form import FORM, form
from hybrid.gate.groups import GroupMeans, Groups
from hybrid.gate.knn import Knn
from hybrid.gate.linear import Linear
from hybrid.gate.memory import AROUND, Example, Memory, Near
from hybrid.gate.study import Asked, Model, Tensors
from hybrid.gate.towers import Towers

#: simplest first: of equals the simpler is taken
KINDS: Mapping[str, type[Model]] = {kind.kind: kind for kind in (ByTask, Knn, Linear, Towers)}


@dataclass(frozen=True, eq=False, slots=True)
class Estimate:
    """What is expected of n requests: `score` [n, arms] in 0..1, `cost` [n, arms] in the unit of the outcomes (NaN
    where no cost is known at all).

    `typical` [n] in 0..1 is the conformal p-value of "as usual as what taught": small means out of distribution.
    `nearest` holds up to five taught requests for each.
    """

    score: Numbers
    cost: Numbers
    typical: Numbers
    nearest: tuple[tuple[Example, ...], ...]


@dataclass(frozen=True, eq=False, slots=True)
class Told:
    """What outcomes say of one request: how much it is `like` each task [groups], as these sum to one, the `score`
    [groups, arms] of every arm were it of that task, `cost` [arms], `typical` and `nearest` as of an `Estimate`."""

    like: Numbers
    score: Numbers
    cost: Numbers
    typical: float
    nearest: tuple[Example, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Trust:
    """How far a model is believed: `advantage` 0..1 scales how an arm differs from its mean (0: the best single arm
    is always taken), every arm but the best single one must be better by `margin`, and every arm is doubted by so many
    standard errors of what was measured of it in the request's group."""

    advantage: float
    margin: float = 0.0
    doubt: float = 0.0

    def __call__(self, raw: Numbers, means: Numbers) -> Numbers:
        """Scores [n, arms] from raw ones and the arms' means [arms]; what all arms share of a request stays."""
        away = raw - means
        shared = away.mean(axis=1, keepdims=True)
        scores: Numbers = means + shared + self.advantage * (away - shared)
        scores[:, means.argmax()] += self.margin
        return scores


@dataclass(frozen=True, eq=False)
class Learned:
    """A taught gate. `arms` are spelled as in the outcomes it learned from."""

    arms: tuple[str, ...]
    model: Model
    memory: Memory
    groups: Groups
    means: GroupMeans
    trust: Trust
    calibration: Isotonic
    conformal: Conformal
    #: what was taught, as digests of the queries [n], and the arm [n] that cross-validation took for each
    taught: npt.NDArray[np.uint64]
    held_out: npt.NDArray[np.int16]

    @property
    def kind(self) -> str:
        """ "tasks", "knn", "linear" or "towers"."""
        return self.model.kind

    def predict(self, queries: Sequence[str], vectors: Vectors, *, explain: bool = True) -> Estimate:
        """What to expect of requests with their unit vectors [n, d]. Without `explain` no examples are looked up."""
        near = self.memory.near(vectors, max(self.model.reach, AROUND))
        looks = form(queries)
        asked = Asked(vectors, looks, near, self.groups(vectors, looks))
        return Estimate(
            score=self.calibration(trusted(self.model.raw(asked), asked.group, self.means, self.trust)),
            cost=self.memory.costs(near),
            typical=self.conformal.typical(near),
            nearest=self.memory.examples(near, self.arms) if explain else (),
        )

    def look(self, query: str, vector: Vectors, owned: Numbers) -> Told:
        """What to expect of one request with its unit vector [d]. `owned` [groups] is how likely it is of each task by
        what else is known of it; what the model sees beyond the task is believed as far as the two agree."""
        near = self.memory.near(vector[None], max(self.model.reach, AROUND))
        looks = form([query])
        like = self.groups(vector[None], looks)[0]
        agreed = float(np.minimum(owned / max(owned.sum(), 1e-9), like).sum())
        n = len(like)
        vectors, forms = np.repeat(vector[None], n, axis=0), np.repeat(looks, n, axis=0)
        asked = Asked(vectors, forms, near.repeated(n), np.eye(n))
        raw = agreed * self.model.raw(asked) + (1 - agreed) * self.means.mean
        return Told(
            like=like,
            score=self._believed(raw),
            cost=self.memory.costs(near)[0],
            typical=float(self.conformal.typical(near)[0]),
            nearest=self.memory.examples(near, self.arms)[0],
        )

    def of_task(self, task: str) -> Told | None:
        """What to expect of a task's requests, none in particular; None where the model sees more than the task."""
        if not isinstance(self.model, ByTask):
            return None
        rows = np.flatnonzero(self.memory.group == self.memory.groups.index(task))[None, :]
        groups = len(self.memory.groups)
        cost = self.memory.costs(Near(rows, np.ones(rows.shape, np.float32)))[0]
        return Told(np.full(groups, 1 / groups), self._task_scores, cost, typical=1.0, nearest=())

    @cached_property
    def _task_scores(self) -> Numbers:
        return self._believed(self.means.mean)

    def _believed(self, raw: Numbers) -> Numbers:
        """The scores [groups, arms] that raw ones for a request of each task come to."""
        return self.calibration(trusted(raw, np.eye(len(raw)), self.means, self.trust))

    def may_be_best(self, score: Numbers) -> tuple[str, ...]:
        """The arms that may be the best one for a request with these scores [arms]: nine sets in ten hold it."""
        return tuple(arm for arm, s in zip(self.arms, score, strict=True) if s >= score.max() - self.conformal.gap)

    # --- on disk -----------------------------------------------------------------------------------------------------

    def tensors(self) -> Tensors:
        """Everything, as arrays: the same gate gives the same bytes."""
        words = {"arms": self.arms, "kind": self.kind, "groups": self.memory.groups, "texts": self.memory.texts}
        own = {f"model.{name}": value for name, value in self.model.tensors().items()}
        kept = {f"conformal.{name}": value for name, value in self.conformal.tensors().items()}
        told = {f"groups.{name}": value for name, value in self.groups.tensors().items()}
        return {
            **own,
            **kept,
            **told,
            "words": np.frombuffer(json.dumps({**words, "form": FORM}).encode(), dtype=np.uint8),
            "memory.vectors": self.memory.vectors.astype(np.float16),
            "memory.score": self.memory.score.astype(np.float32),
            "memory.cost": self.memory.cost.astype(np.float32),
            "memory.group": self.memory.group.astype(np.int32),
            "means": np.stack([self.means.mean, self.means.error, self.means.measured]),
            "trust": np.array([self.trust.advantage, self.trust.margin, self.trust.doubt]),
            "calibration": np.stack([self.calibration.x, self.calibration.y]),
            "taught": self.taught,
            "held_out": self.held_out,
        }

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Learned:
        """The gate that `tensors` was taken of. Raises Refused for one that this version cannot read."""
        try:
            return cls._load(tensors)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise Refused(f"The gate cannot be read ({error}); teach a new one.", param="gate") from error

    @classmethod
    def _load(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> Learned:
        words = json.loads(tensors["words"].tobytes())
        if tuple(words["form"]) != FORM:
            raise ValueError("it was taught with other features than this version computes")
        memory = Memory(
            tensors["memory.vectors"].astype(np.float32),
            tensors["memory.score"].astype(np.float64),
            tensors["memory.cost"].astype(np.float64),
            tensors["memory.group"].astype(np.intp),
            tuple(words["groups"]),
            tuple(words["texts"]),
        )
        parts: dict[str, Tensors] = defaultdict(dict)
        for name, value in tensors.items():
            part, _, of = name.rpartition(".")
            parts[part][of] = value
        x, y = tensors["calibration"]
        mean, error, measured = tensors["means"]
        return cls(
            arms=tuple(words["arms"]),
            model=KINDS[words["kind"]].load(parts["model"], memory),
            memory=memory,
            groups=Groups.load(parts["groups"]),
            means=GroupMeans(mean, error, measured > 0),
            trust=Trust(*tensors["trust"].tolist()),
            calibration=Isotonic(x, y),
            conformal=Conformal.load(parts["conformal"]),
            taught=tensors["taught"],
            held_out=tensors["held_out"],
        )


def trusted(raw: Numbers, group: Numbers, means: GroupMeans, trust: Trust) -> Numbers:
    """Raw scores [n, arms] as far as they are believed of requests with these probabilities of groups [n, groups]: by
    `trust`, and within what was measured of the arms there."""
    believed = means.bounded(trust(means.bounded(raw, group), means.arm), group)
    return believed - trust.doubt * means.doubt(group) if trust.doubt else believed
