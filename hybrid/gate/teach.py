"""From outcomes to a published gate: embed, choose, compare with the gate that is live, publish, promote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import Refused
from hybrid.gate.choose import Progress, choose, digests
from hybrid.gate.features import Embed
from hybrid.gate.learned import Learned
from hybrid.gate.memory import Places
from hybrid.gate.outcomes import Lessons, Table
from hybrid.gate.published import GATE, learned_card, live_version, load_learned, promote, publish_learned
from hybrid.gate.routed import ahead_by, chosen
from hybrid.gate.vectors import embedded
from hybrid.rooms import Home
from hybrid.types import JSON

#: standard errors that a 95 % interval reaches
_SURE = 1.96
#: outcomes that two gates share, by which they can be compared
_COMPARED = 20
_UNKNOWN = -1.0


@dataclass(frozen=True, slots=True)
class NewGate:
    """A gate that was published: its `card`, and why it was not promoted (""; it was)."""

    name: str
    version: int
    path: Path
    card: JSON
    reason: str

    @property
    def promoted(self) -> bool:
        return not self.reason


def teach(
    home: Home,
    table: Lessons,
    embed: Embed,
    embedder: str,
    cache: Path,
    *,
    name: str = GATE,
    seed: int = 0,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    veto: Callable[[Learned], str] = lambda _: "",
) -> NewGate:
    """Teaches a gate and publishes it as the next version of `name`, with more `facts` on its card.

    It becomes the live one unless it is measured worse than that: on the same outcomes, each gate judged on rows that
    it was not fitted to; and unless `veto` says in words why not, too. Blocking; a minute for a thousand queries.
    Raises DataError, Refused.
    """
    vectors = embedded(table.queries, embed, embedder, cache, progress)
    learned, found = choose(table, vectors, seed, progress=progress)
    live = _live(home, name, embedder)
    reason = (worse(learned, live, table, vectors) if live is not None else "") or veto(learned)
    told = {**found, **(facts or {}), "promoted": not reason, "reason": reason}
    version = publish_learned(home, name, learned, embedder, told)
    if not reason:
        promote(home, name, version)
    return NewGate(name, version, home.adapters / name / str(version), learned_card(home, name, version), reason)


def worse(new: Learned, live: Learned, table: Table, vectors: np.ndarray) -> str:
    """Why a new gate may not replace the live one, in words; "" where it may.

    `table` is what the new gate was taught with. The arms that it took for held-out rows are compared with those that
    the live one took, also held out where it knows a row; the 95 % interval of the difference must lie below zero.
    Where hardly a row compares them, the gate that was taught by more rows stays.
    """
    mine, theirs = new.held_out.astype(np.intp), _taken(live, table, vectors)
    rows = np.flatnonzero(theirs >= 0)
    if len(rows) < _COMPARED and len(table) < len(live.taught):
        return (
            f"it was taught by {len(table)} queries, the live gate by {len(live.taught)}, "
            f"and {len(rows)} shared outcomes are too few to compare the two"
        )
    if len(rows) < 2:
        return ""
    gap, error = ahead_by(table.score[rows, mine[rows]], table.score[rows, theirs[rows]])
    if gap + _SURE * error >= 0:
        return ""
    return f"it scores {-gap:.3f} ± {_SURE * error:.3f} less than the live gate on {len(rows)} shared outcomes"


def score_for(learned: Learned, table: Table, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores, costs) [n, arms of the table] as a gate expects them; an arm that it does not know scores below all."""
    estimate = learned.predict(table.queries, vectors, explain=False)
    place = {arm: i for i, arm in enumerate(learned.arms)}
    score = np.full(table.score.shape, _UNKNOWN * 10)
    cost = np.full(table.score.shape, np.nan)
    for i, arm in enumerate(table.arms):
        if arm in place:
            score[:, i], cost[:, i] = estimate.score[:, place[arm]], estimate.cost[:, place[arm]]
    return score, cost


def _live(home: Home, name: str, embedder: str) -> Learned | None:
    """The gate that is live, if it can still serve here."""
    if live_version(home, name) is None:
        return None
    try:
        found = load_learned(home, name, None, embedder)
    except Refused:
        return None  # made for another embedder, or damaged: anything is better
    return found[0] if found else None


def _taken(gate: Learned, table: Table, vectors: np.ndarray) -> Places:
    """[n]: the arm of the table that a gate takes for every row; -1 where that one was not measured."""
    score, cost = score_for(gate, table, vectors)
    taken = chosen(table, score, cost, 0.0)
    column = {arm: i for i, arm in enumerate(table.arms)}
    kept = dict(zip(gate.taught.tolist(), gate.held_out.tolist(), strict=True))
    for row, digest in enumerate(digests(table.queries).tolist()):
        if digest in kept:
            arm = column.get(gate.arms[kept[digest]], -1)
            taken[row] = arm if arm >= 0 and table.measured[row, arm] else -1
    return taken
