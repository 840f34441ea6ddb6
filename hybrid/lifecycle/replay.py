"""Logged decisions made again by another gate: what it would have chosen, and whether that would have been worse.

The log holds the vector of a request and never its words, so whatever the gate reads in words is missing here: the
words shared with passages and examples, and the form of the request. The words of the nearest known request stand in
for them where one is near; else there are none. Scores differ from those of the day for that reason alone, and every
comparison is between two gates that miss the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sqlalchemy import select

from hybrid.adapters.store import AdapterStore
from hybrid.boot import example_folders
from hybrid.errors import BadRequest, NotFound
from hybrid.gate.bandit import Bandit
from hybrid.gate.enrol import Enrolment
from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.feedback import Rewards, unit
from hybrid.gate.learned import Learned
from hybrid.gate.model import Gate
from hybrid.gate.ope import Logged, Verdict, compare
from hybrid.gate.policy import Choice, Policy
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.settings import GateSettings, Settings
from hybrid.state import State, decisions
from hybrid.types import JSON
from hybrid.types.arm import PROMPT
from hybrid.types.request import Knobs

#: decisions replayed at most, the newest
MOST = 2000
#: a known request this similar lends its words
_NEAR = 0.5
MISSING = ("the words of the request", "words shared with passages", "the form of the request")


@dataclass(frozen=True, slots=True)
class Replayed:
    """One logged decision: the arm `then`, and the arm another gate takes `now`, with its score and reason."""

    id: str
    then: str
    now: str
    score: float
    reason: str

    def wire(self) -> JSON:
        """As `--json` shows it."""
        row = {"id": self.id, "then": self.then, "now": self.now, "changed": self.then != self.now}
        return {**row, "score": round(self.score, 4), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of replaying decisions; `skipped` had no vector of this home's embedder."""

    rows: tuple[Replayed, ...]
    skipped: int

    def wire(self) -> JSON:
        """As `--json` shows it."""
        changed = [row for row in self.rows if row.then != row.now]
        moves = Counter(f"{row.then} → {row.now}" for row in changed)
        return {
            "decisions": [row.wire() for row in self.rows],
            "n": len(self.rows),
            "changed": len(changed),
            "moves": dict(moves.most_common()),
            "skipped": self.skipped,
            "missing": list(MISSING),
        }


class Desk:
    """A home's gates without an engine, to ask them about vectors."""

    def __init__(self, settings: Settings, state: State, embedder: Embedder, library: Library) -> None:
        self.settings = settings
        self.embedder = embedder
        self.state = state
        home = settings.rooms
        store = AdapterStore(home, state)
        shelves = Shelves(lambda: example_folders(home, store), embedder, home.hidden / "cache")
        self._enrolment = partial(Enrolment, home, store, shelves, library, settings.cache, state.measurements)

    def gate(self, version: int | None = None, candidate: Learned | None = None) -> Gate:
        """The gate as it serves, or with another taught gate: a `version`, or one that is not published."""
        enrolment = self._enrolment(version, candidate)
        enrolment.refresh()
        return enrolment.gate

    def choices(self, gate: Gate, vectors: Vectors) -> list[Choice]:
        """What a gate and the rules choose for unit vectors [n, d], without exploring."""
        return [chosen(gate, vector, self.settings.gate) for vector in vectors]

    def replay(self, gate: Gate, ids: Sequence[str] = (), since: float | None = None) -> Replay:
        """What a gate would have chosen for decisions of the log: those named, or those since a time.

        Raises NotFound for a name that is not in the log, BadRequest where the gate did not choose.
        """
        rows = _named(self.state, ids) if ids else _since(self.state, since or 0.0)
        known = [row for row in rows if row["vector"] and len(row["vector"]) == 2 * self.embedder.dim]
        found = self.choices(gate, unit((row["vector"] for row in known), self.embedder.dim))
        told = (
            Replayed(row["id"], row["record"]["arm"], str(choice.arm), choice.confidence, choice.reason)
            for row, choice in zip(known, found, strict=True)
        )
        return Replay(tuple(told), len(rows) - len(known))

    def judged(self, rewards: Rewards, new: Gate, old: Gate, expected: Bandit | None) -> Verdict:
        """Whether a new gate is worse than the old one on the rewarded decisions of a holdout. `expected` is what
        other rewards say of arms; it has not seen these."""
        then = list(rewards.arms)
        mine, theirs = (
            [str(choice.arm) for choice in self.choices(gate, rewards.vectors)] if len(rewards) else []
            for gate in (new, old)
        )
        arms = sorted({*then, *mine, *theirs, str(PROMPT)})
        logged = Logged(np.array([arms.index(arm) for arm in then], dtype=np.intp), rewards.propensity, rewards.reward)
        return compare(logged, _taking(mine, arms), _taking(theirs, arms), _expected(expected, rewards, arms))


def chosen(gate: Gate, vector: Vectors, settings: GateSettings) -> Choice:
    """What a gate and the rules choose for one unit vector [d], without exploring."""
    scores = gate.score("", vector)
    near = max(scores.neighbours, key=lambda one: float(one["similarity"]), default=None)
    if near is not None and near["similarity"] >= _NEAR:
        scores = gate.score(str(near["text"]), vector)
    if gate.bandit:
        scores = scores.moved(gate.bandit.adjust(vector, settings.adjust_within))
    policy = Policy(settings.model_copy(update={"explore": 0.0, "cascade": 0.0}))
    return policy.choose(scores, allowed=lambda _: True, knobs=Knobs())


@contextmanager
def open_desk(settings: Settings, embedder: Embedder) -> Iterator[Desk]:
    """The gates of a home, for as long as the block runs."""
    state = State(settings.rooms.database)
    library = Library(settings.rooms, embedder, settings.retrieval)
    try:
        yield Desk(settings, state, embedder, library)
    finally:
        library.close()
        state.close()


def _taking(chosen: Sequence[str], arms: Sequence[str]) -> Numbers:
    """[n, arms]: one where an arm is taken."""
    return np.array([[float(arm == one) for arm in arms] for one in chosen]).reshape(len(chosen), len(arms))


def _expected(bandit: Bandit | None, rewards: Rewards, arms: Sequence[str]) -> Numbers:
    """[n, arms]: the reward that is expected of each arm; a half where nothing is known at all."""
    out = np.full((len(rewards), len(arms)), bandit.usual if bandit else 0.5)
    if bandit:
        above, _ = bandit.expected(rewards.vectors)
        for column, arm in enumerate(bandit.arms):
            if arm in arms:
                out[:, arms.index(arm)] += above[:, column]
    return np.clip(out, 0.0, 1.0)


def _named(state: State, ids: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name in ids:
        row = state.decision(name)
        if row is None:
            raise NotFound(f"There is no decision {name[:80]!r} in the log; its id is in x-hybrid-decision-id.")
        if row["record"].get("chosen_by") != "gate":
            raise BadRequest(f"The gate did not make {name[:80]!r}: the caller named the model, or it fell back.")
        rows.append(row)
    return rows


def _since(state: State, at: float) -> list[dict[str, Any]]:
    query = select(decisions).where(decisions.c.at >= at).order_by(decisions.c.at.desc()).limit(MOST)
    with state.transaction() as connection:
        found = [dict(row) for row in connection.execute(query).mappings()]
    return [row for row in reversed(found) if row["record"].get("chosen_by") == "gate"]
