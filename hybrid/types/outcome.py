"""One measured answer: a row of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One (example, arm) measured: a row of `outcomes.jsonl`."""

    task: str
    id: str
    arm: str
    score: float
    answer: str
    latency_ms: float
    prompt_tokens: int
    completion_tokens: int
    calls: int
    adapter: str | None = None
    passages: tuple[str, ...] = ()
    error: str | None = None
    chosen: str | None = None  # the arm that answered, where the gate chose
    confidence: float | None = None  # the gate's, where it chose
    grounded: Mapping[str, float] = field(default_factory=dict)  # supported share of words, numbers, names, where shown
