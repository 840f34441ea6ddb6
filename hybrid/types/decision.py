"""Which arm answers, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid.types import JSON
from hybrid.types.arm import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which arm answers and why. `scores` are the gate's, one an arm, higher is better, 0 to 1.

    `chosen_by` is "gate", "caller" (the model was named) or "fallback"; `fallback` says in a word why the gate was
    not followed (`deadline`, `error`, `abstained`), and is None where it was.
    """

    id: str
    arm: Arm
    scores: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 1.0
    reason: str = ""
    chosen_by: str = "gate"
    fallback: str | None = None
    adapter: str | None = None  # the immutable name@version that answers
    route_ms: float = 0.0
    neighbours: tuple[Mapping[str, Any], ...] = ()
    #: makes the query's unit vector as float16 bytes, for the log alone; None where it is not to be kept
    vector: Callable[[], bytes] | None = field(default=None, repr=False)
    #: a cheaper arm that is asked first and answers if it is sure (a cascade)
    first: Arm | None = None
    #: the probability with which the gate takes this arm for such a request, above 0; 1 without exploration
    propensity: float = 1.0
    #: how far feedback moved the scores, by arm
    adjusted: Mapping[str, float] = field(default_factory=dict)
    #: the version of the taught gate that scored; None without one
    gate: int | None = None

    def wire(self) -> JSON:
        """The public record: what `/v1/route` and `/v1/decisions/{id}` return."""
        return {
            "id": self.id,
            "arm": str(self.arm),
            "scores": dict(self.scores),
            "confidence": self.confidence,
            "reason": self.reason,
            "fallback": self.fallback,
            "chosen_by": self.chosen_by,
            "adapter": self.adapter,
            "route_ms": self.route_ms,
            "neighbours": [dict(n) for n in self.neighbours],
            "propensity": self.propensity,
            "adjusted": dict(self.adjusted),
            "gate": self.gate,
        }
