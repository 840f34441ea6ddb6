"""Who confers and how: the panel that the gateway convened for one request, and the drafts it wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid.adapters.listing import AdapterVersion
from hybrid.settings import Method
from hybrid.types.arm import Arm
from hybrid.types.event import Usage
from hybrid.types.passage import Passage
from hybrid.types.request import Message

#: (the folder of a reward model, the conversation, answers to it) → how good each answer is; blocking
Rater = Callable[[Path, Sequence[Message], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A proposer. `weight` is the gate's score of its arm, 0 to 1; None for `temperature` keeps the request's own."""

    arm: Arm
    weight: float = 1.0
    temperature: float | None = None
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`max_tokens` bounds each call; after `deadline_s` seconds a layer goes on with `quorum` drafts.

    `routed` says that the gate chose the members, not a person; `reward` is the version that rates the drafts of
    `best_of`.
    """

    seats: tuple[Seat, ...]
    aggregator: Arm
    method: Method
    layers: int
    quorum: int
    deadline_s: float
    max_tokens: int
    routed: bool
    reward: AdapterVersion | None = None

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Every arm that may be asked."""
        return tuple(dict.fromkeys((*(seat.arm for seat in self.seats), self.aggregator)))

    @property
    def calls(self) -> int:
        """The answers asked of the members at most."""
        if self.method == "refine":
            return 1 + 2 * self.layers
        return len(self.seats) * self.layers + (self.method in ("auto", "synthesis"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What one proposer answered. `logprob` is the mean log-probability of its tokens, where it was asked for."""

    seat: Seat
    text: str
    layer: int = 1
    finish_reason: str = "stop"
    usage: Usage = field(default_factory=Usage)
    passages: tuple[Passage, ...] = ()
    logprob: float | None = None
