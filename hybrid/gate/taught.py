"""Joins what a gate knows: whose request this is (from the arms' own material), and which arm answers requests of that
kind best (from measured outcomes).

A request belongs to one of several owners: an adapter, a corpus, a task that was measured, or nobody (`prompt`). With
p(o) the probability of an owner, an arm's score is its expected share of the best arm's score:

    share(a) = Σ_o p(o) · u(a | o)

    u(a | o) = (ŝ(a | o) + ε) / (max ŝ(· | o) + ε)    where outcomes speak of the owner,
    u(a | o) = [a is the owner's own arm]             where they do not.

So an arm that was published after the outcomes were gathered is scored by its own material alone, a request that
resembles nothing goes to `prompt`, and where nothing was measured the scores are the owners' probabilities themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.learned import Learned, Told
from hybrid.types.arm import PROMPT, Arm

#: the strategy of an owner that is a measured task and no arm
TASK = "task"
#: a request less usual than this share of those that taught is not one that the outcomes speak of
USUAL = 0.02
#: scores this low tell arms apart no more
_SMALL = 0.02
#: strategies whose arms are made of some task's data, and how many standard errors tell more than luck
_MADE, _BEYOND_CHANCE = frozenset(["adapter", "adapter+rag", "few_shot", "head", "rag"]), 1.645
#: how far each way of telling a task may be wrong when it rules one out: words that are asked without the instruction
#: that they were measured under are unlike any task to the outcomes, but not to an adapter that knows both
_SURELY_OWNED, _SURELY_LIKE = 0.001, 0.05


def task_owner(task: str) -> Arm:
    """The owner that stands for the requests of a measured task."""
    return Arm(TASK, (task,))


@dataclass(frozen=True, slots=True)
class Blend:
    """The arms' shares (0 to 1), what of `prompt`'s comes from requests that are nobody's, expected costs in the unit
    of the outcomes, and what was expected of each arm for requests like this one (None: outcomes say nothing)."""

    shares: Mapping[Arm, float]
    stranger: float
    costs: Mapping[Arm, float]
    expected: Mapping[Arm, float] | None


@dataclass(frozen=True, slots=True)
class Taught:
    """Outcomes as they bear on this home: `served` says which column of the estimate an arm that can be asked has,
    `at_home` the task on which owners' own requests were measured (an adapter may have been measured on other tasks
    alone)."""

    learned: Learned
    served: Mapping[Arm, int]
    at_home: Mapping[Arm, str] = field(default_factory=dict)
    version: int = 0
    #: [groups, served]: arms that are not taken for a task
    closed: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))

    @classmethod
    def of(
        cls,
        learned: Learned,
        offered: frozenset[Arm],
        at_home: Mapping[Arm, str] | None = None,
        tasks: Mapping[str, str] | None = None,
        version: int = 0,
    ) -> Taught:
        """What of the learned arms is on offer. `tasks` say what adapters and heads were trained on, where that is not
        their name."""
        columns = {Arm.parse(name): i for i, name in enumerate(learned.arms) if _is_arm(name)}
        served = {arm: i for arm, i in columns.items() if arm in offered or arm == PROMPT}
        return cls(learned, served, at_home or {}, version, _closed(learned, served, tasks or {}))

    def look(self, query: str, vector: Vectors, owners: Mapping[Arm, float]) -> Told:
        """What outcomes say of one request with its unit vector [d], whose `owners` are as likely as told."""
        return self.learned.look(query, vector, self._tasks(owners))

    def of_owner(self, owner: Arm) -> Told | None:
        """What outcomes say of an owner's requests, none in particular; None where they were not measured, or where
        the arms of a task are told apart by more than the task."""
        task = self._task(owner)
        return None if task is None else self.learned.of_task(task)

    def blend(self, owners: Mapping[Arm, float], told: Told) -> Blend:
        """The arms' shares, from the probabilities of owners (they sum to one)."""
        # a corpus is asked in more ways than were measured; an adapter's requests look like those it learned from
        usual = told.typical >= USUAL
        heard = {o: p for o, p in owners.items() if self._task(o) is not None and (usual or o.strategy != "rag")}
        shares: dict[Arm, float] = dict.fromkeys((*(o for o in owners if o.strategy != TASK), *self.served), 0.0)
        shares |= {owner: chance for owner, chance in owners.items() if owner not in heard}
        chances = _pooled(self._tasks(heard), told.like)
        columns = list(self.served.values())
        score = told.score[:, columns]
        open_ = np.where(self.closed, -_SMALL, score)
        worth = (open_ + _SMALL) / (open_.max(axis=1, keepdims=True) + _SMALL)
        for arm, share in zip(self.served, (chances @ worth).tolist(), strict=True):
            shares[arm] += share
        costs = dict(zip(self.served, told.cost[columns].tolist(), strict=True))
        total = chances.sum()
        expected = dict(zip(self.served, (chances @ score / total).tolist(), strict=True)) if total else None
        return Blend(shares, owners.get(PROMPT, 0.0), costs, expected)

    def _task(self, owner: Arm) -> str | None:
        """The task whose outcomes speak of an owner's requests."""
        return owner.args[0] if owner.strategy == TASK else self.at_home.get(owner)

    def _tasks(self, owners: Mapping[Arm, float]) -> Numbers:
        """[groups]: how likely a request is of each measured task."""
        groups = self.learned.memory.groups
        out = np.zeros(len(groups))
        for owner, chance in owners.items():
            task = self._task(owner)
            if task in groups:
                out[groups.index(task)] += chance
        return out


def _pooled(owned: Numbers, like: Numbers) -> Numbers:
    """How likely a request is of each task [groups], of two ways of telling that may each be quite wrong: by the arms'
    material (`owned`, whose sum stays) and by the outcomes' requests. A logarithmic pool (Genest & Zidek 1986) in
    which neither has a veto."""
    both = (owned + _SURELY_OWNED) * (like + _SURELY_LIKE)
    chances: Numbers = owned.sum() * both / both.sum()
    return chances


def _closed(learned: Learned, served: Mapping[Arm, int], tasks: Mapping[str, str]) -> npt.NDArray[np.bool_]:
    """[groups, served]: what was made of another task's data and is not measured to beat `prompt` there beyond chance.
    The best of many such arms is mostly the luckiest, and nobody expects it to answer."""
    means, prompt = learned.means, served.get(PROMPT)
    if prompt is None:
        return np.zeros((len(learned.memory.groups), len(served)), dtype=bool)
    columns = list(served.values())
    gap = means.mean[:, columns] - means.mean[:, [prompt]]
    better = gap > _BEYOND_CHANCE * np.hypot(means.error[:, columns], means.error[:, [prompt]])
    made = [{tasks.get(name, name) for name in arm.args} if arm.strategy in _MADE else None for arm in served]
    foreign = [[of is not None and group not in of for of in made] for group in learned.memory.groups]
    closed: npt.NDArray[np.bool_] = np.array(foreign, dtype=bool) & ~better
    return closed


def _is_arm(name: str) -> bool:
    """Whether a learned arm is one of ours: a gate may have been taught with a table of other models."""
    try:
        Arm.parse(name)
    except ValueError:
        return False
    return True
