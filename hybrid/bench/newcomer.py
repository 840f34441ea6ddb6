"""An adapter that is published after the gate was taught: does it get its own requests at once, and only those?

Each adapter in turn is taken out of everything that the gate was made of: its arms, its task, the outcomes that speak
of either. The ownership weights are fitted and the outcomes taught without it. Then it is enrolled, nothing is fitted
again, and the whole of the requests is decided anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.bench.house import House
from hybrid.errors import DataError
from hybrid.gate.choose import fit
from hybrid.gate.learned import Learned
from hybrid.gate.model import Gate
from hybrid.gate.outcomes import Lessons, Table
from hybrid.gate.taught import Taught, task_owner
from hybrid.types.arm import Arm


@dataclass(frozen=True, slots=True)
class Newcomer:
    """What a new adapter got: `right` of the `n` requests of its own task, `corpus` more went to the task's corpus;
    and `wrong` of the `others`. `before` it came, its task's requests were taken by these arms."""

    adapter: str
    n: int
    right: int
    corpus: int
    others: int
    wrong: int
    before: tuple[Arm, ...] = ()


async def arrival(house: House, table: Table, arm: Arm) -> Newcomer:
    """Publishes the adapter of `arm` once more, for a gate that has never seen it."""
    name = str(arm.adapter)
    task = house.tasks[name]
    gate = _before(house, task)
    before = await house.arms([q for q, group in zip(table.queries, table.groups, strict=True) if group == task], gate)
    shelf = house.shelves.get(name)
    corpus = arm.args[1] if arm.strategy == "adapter+rag" else None
    gate.enrol_adapter(name, shelf.messages, shelf.vectors, shelf.bare, corpus=corpus)
    taken = await house.arms(table.queries, gate)
    mine = np.array([group == task for group in table.groups])
    its = np.array([name in found.adapters for found in taken])
    beside = np.array([house.own(task, found) for found in taken]) & ~its
    right, wrong = int(its[mine].sum()), int(its[~mine].sum())
    corpora = int(beside[mine].sum())
    return Newcomer(name, int(mine.sum()), right, corpora, int((~mine).sum()), wrong, tuple(before))


def _before(house: House, task: str) -> Gate:
    """The gate as it would be if a task and its adapter had never been there; its corpus may have been."""
    out = [arm for arm in house.gate.bank.messages if arm == task_owner(task) or house.own(task, arm)]
    known, taught = house.gate.taught, None
    learned = known and without(known.learned, task, lambda arm: house.own(task, arm))
    if known and learned:
        at_home = {arm: named for arm, named in known.at_home.items() if not house.own(task, arm)}
        taught = Taught.of(learned, frozenset(known.served), at_home, house.tasks)
    return house.without(out, taught)


def without(learned: Learned, task: str, its: Callable[[Arm], bool], seed: int = 0) -> Learned | None:
    """A gate of the same kind, taught from what `learned` remembers (its texts are cut) less the requests of a task
    and `its` arms. None where too little is left to teach anything."""
    memory = learned.memory
    rows = np.flatnonzero([memory.groups[place] != task for place in memory.group])
    score, cost = memory.score[rows], memory.cost[rows]
    measured = np.flatnonzero((~np.isnan(score)).any(axis=0))
    arms = [i for i in measured.tolist() if not its(Arm.parse(learned.arms[i]))]
    if len(arms) < 2:
        return None
    lessons = Lessons(
        ids=tuple(str(row) for row in rows),
        queries=tuple(memory.texts[row] for row in rows),
        groups=tuple(memory.groups[memory.group[row]] for row in rows),
        arms=tuple(learned.arms[i] for i in arms),
        score=score[:, arms],
        cost=cost[:, arms],
    )
    try:
        return fit(learned.kind, lessons, memory.vectors[rows], seed)
    except DataError:
        return None


def total(newcomers: Sequence[Newcomer]) -> Newcomer:
    """All of them added up."""
    counts = np.array([(c.n, c.right, c.corpus, c.others, c.wrong) for c in newcomers]).sum(axis=0).tolist()
    return Newcomer("all", *counts)
