"""What people thought of routed answers, as rewards that may teach: guarded against a few who say much.

A reward is the score that the caller of a decision gave it, joined to the vector of what was asked, the arm that
answered and the probability (propensity) with which the gate took it. The words of a request are not there: they were
never kept. A fixed fifth of all decisions, drawn by the hash of their ids, is a holdout: it judges and never teaches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import select

from hybrid.gate.features import Numbers, Vectors
from hybrid.gate.memory import Places
from hybrid.state import State, decisions, feedback

#: share of decisions whose rewards only judge
HOLDOUT = 0.2
#: rewards of one caller that count, the newest
MOST_OF_ONE = 20
#: who asks where no key exists: the owner of the home
_OWNER = "local"


@dataclass(frozen=True, eq=False, slots=True)
class Rewards:
    """Rewarded decisions, oldest first. `vectors` float32 unit [n, d]; `reward` and `propensity` [n] in 0..1 (the
    latter above 0); `at` [n] seconds since the epoch; `scores` what the gate said of each arm."""

    decisions: tuple[str, ...]
    callers: tuple[str, ...]
    arms: tuple[str, ...]
    vectors: Vectors
    reward: Numbers
    propensity: Numbers
    at: Numbers
    scores: tuple[Mapping[str, float], ...]

    def __len__(self) -> int:
        return len(self.decisions)

    def rows(self, index: Places) -> Rewards:
        """Some of them."""
        keep = index.tolist()
        return Rewards(
            tuple(self.decisions[i] for i in keep),
            tuple(self.callers[i] for i in keep),
            tuple(self.arms[i] for i in keep),
            self.vectors[index],
            self.reward[index],
            self.propensity[index],
            self.at[index],
            tuple(self.scores[i] for i in keep),
        )


def held_out(decision_id: str) -> bool:
    """Whether a decision belongs to the holdout; the same answer for ever."""
    first = int.from_bytes(hashlib.sha256(decision_id.encode()).digest()[:8], "big")
    return first < HOLDOUT * 2**64


def read_rewards(state: State, dim: int) -> Rewards:
    """Every reward of a decision that the gate made about a vector of `dim` numbers; the last of each (decision,
    caller) counts. Of an adapter only what its newest rewarded version answered: the ones before are another arm."""
    query = (
        select(
            decisions.c.id, decisions.c.record, decisions.c.vector, feedback.c.caller, feedback.c.score, feedback.c.at
        )
        .join(feedback, feedback.c.decision_id == decisions.c.id)
        .where(decisions.c.vector.is_not(None))
        .order_by(feedback.c.id)
    )
    last: dict[tuple[str, str], Mapping[str, Any]] = {}
    with state.transaction() as connection:
        for row in connection.execute(query).mappings():
            if row["record"].get("chosen_by") == "gate" and len(row["vector"]) == 2 * dim:
                last.pop((row["id"], row["caller"]), None)  # the place in time is that of the last word
                last[row["id"], row["caller"]] = dict(row)
    newest = {row["record"]["arm"]: row["record"].get("adapter") for row in last.values()}
    return _rewards([r for r in last.values() if r["record"].get("adapter") == newest[r["record"]["arm"]]], dim)


def split(rewards: Rewards) -> tuple[Rewards, Rewards]:
    """(what may teach, the holdout). Of what teaches, one caller contributes the newest `MOST_OF_ONE` at most, but for
    the owner of a home in which nobody else gave any."""
    judged = np.array([held_out(name) for name in rewards.decisions], dtype=bool)
    taught = ~judged
    if set(rewards.callers) != {_OWNER}:
        taught &= _newest(rewards.callers, taught)
    return rewards.rows(np.flatnonzero(taught)), rewards.rows(np.flatnonzero(judged))


def _newest(callers: Sequence[str], among: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[n]: whether a reward is among the newest that its caller gave."""
    seen: Counter[str] = Counter()
    kept = np.zeros(len(callers), dtype=bool)
    for i in reversed(np.flatnonzero(among).tolist()):
        seen[callers[i]] += 1
        kept[i] = seen[callers[i]] <= MOST_OF_ONE
    return kept


def _rewards(rows: Sequence[Mapping[str, Any]], dim: int) -> Rewards:
    return Rewards(
        decisions=tuple(row["id"] for row in rows),
        callers=tuple(row["caller"] for row in rows),
        arms=tuple(row["record"]["arm"] for row in rows),
        vectors=unit((row["vector"] for row in rows), dim),
        reward=np.array([row["score"] for row in rows], dtype=np.float64),
        propensity=np.array([row["record"].get("propensity", 1.0) for row in rows], dtype=np.float64),
        at=np.array([row["at"] for row in rows], dtype=np.float64),
        scores=tuple(row["record"].get("scores", {}) for row in rows),
    )


def unit(kept: Iterable[bytes], dim: int) -> Vectors:
    """Unit vectors float32 [n, dim] from the float16 bytes that the log keeps."""
    raw = [np.frombuffer(one, np.float16).astype(np.float32) for one in kept]
    vectors = np.array(raw, dtype=np.float32).reshape(-1, dim)
    lengths: Vectors = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Vectors = vectors / np.maximum(lengths, 1e-6)
    return found
