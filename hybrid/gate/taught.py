"""Joins what a gate knows: whose request this is (from the arms' own material), and which arm answers requests of that
kind best (from measured outcomes).

A request belongs to one of several owners: an adapter, a corpus, a task that was measured, or nobody (`prompt`). With
p(o) the probability of an owner, an arm's score is its expected share of the best arm's score:

    share(a) = Σ_o p(o) · u(a | o),    u(a | o) = (ŝ(a) + ε) / (max ŝ + ε)  where outcomes speak of the owner,
                                       u(a | o) = [a is the owner's own arm]  where they do not.

So an arm that was published after the outcomes were gathered is scored by its own material alone, a request that
resembles nothing goes to `prompt`, and where nothing was measured the scores are the owners' probabilities themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybrid.gate.features import Vectors
from hybrid.gate.learned import Estimate, Learned
from hybrid.types.arm import PROMPT, Arm

#: the strategy of an owner that is a measured task and no arm
TASK = "task"
#: a request less usual than this share of those that taught is not one that the outcomes speak of
USUAL = 0.02
#: scores this low tell arms apart no more
_SMALL = 0.02


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

    @classmethod
    def of(
        cls, learned: Learned, offered: frozenset[Arm], at_home: Mapping[Arm, str] | None = None, version: int = 0
    ) -> Taught:
        """What of the learned arms is on offer."""
        columns = {Arm.parse(name): i for i, name in enumerate(learned.arms) if _is_arm(name)}
        served = {arm: i for arm, i in columns.items() if arm in offered or arm == PROMPT}
        return cls(learned, served, at_home or {}, version)

    def estimate(self, query: str, vector: Vectors) -> Estimate:
        """What outcomes say of one request with its unit vector [d]."""
        return self.learned.predict([query], vector[None, :])

    def of_owner(self, owner: Arm) -> Estimate | None:
        """What outcomes say of an owner's requests, none in particular; None where they were not measured, or where
        the arms of a task are told apart by more than the task."""
        task = owner.args[0] if owner.strategy == TASK else self.at_home.get(owner)
        return None if task is None else self.learned.of_task(task)

    def blend(self, owners: Mapping[Arm, float], estimate: Estimate) -> Blend:
        """The arms' shares, from the probabilities of owners (they sum to one)."""
        usual = float(estimate.typical[0]) >= USUAL
        shares: dict[Arm, float] = dict.fromkeys((*(o for o in owners if o.strategy != TASK), *self.served), 0.0)
        told_of = 0.0
        for owner, chance in owners.items():
            # a corpus is asked in more ways than were measured; an adapter's requests look like those it learned from
            if owner.strategy == TASK or (owner in self.at_home and (usual or owner.adapter)):
                told_of += chance
            else:
                shares[owner] += chance
        expected = {arm: float(estimate.score[0, i]) for arm, i in self.served.items()}
        best = max(expected.values(), default=0.0)
        for arm, score in expected.items():
            shares[arm] += told_of * (score + _SMALL) / (best + _SMALL)
        costs = {arm: float(estimate.cost[0, i]) for arm, i in self.served.items()}
        return Blend(shares, owners.get(PROMPT, 0.0), costs, expected if told_of else None)


def _is_arm(name: str) -> bool:
    """Whether a learned arm is one of ours: a gate may have been taught with a table of other models."""
    try:
        Arm.parse(name)
    except ValueError:
        return False
    return True
