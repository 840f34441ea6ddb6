"""The rules that turn scores into a choice: who may be chosen, what a tie costs, when nobody is sure.

Learned numbers live in the gate; everything a person decides lives here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybrid.gate.model import Scores
from hybrid.settings import GateSettings
from hybrid.types import PROMPT, Arm, Knobs

#: what an answer costs by strategy, in the order of tokens and calls: cheap first
COST = {"prompt": 0.0, "adapter": 0.1, "rag": 0.6, "adapter+rag": 0.7}
#: how much probability the dearest arm gives up at quality_cost = 0
MARGIN = 0.5
#: a narrow arm that is no likelier than this is not trusted with the answer
LEAST = 0.35


@dataclass(frozen=True, slots=True)
class Choice:
    """The arm, how sure the gate was of it, why in words, and the fallback taken if one was."""

    arm: Arm
    confidence: float
    reason: str
    fallback: str | None = None


class Policy:
    """`settings` holds the default knob; a request may bring its own."""

    def __init__(self, settings: GateSettings) -> None:
        self._settings = settings

    def choose(self, scores: Scores, *, allowed: Callable[[Arm], bool], knobs: Knobs) -> Choice:
        """The best allowed arm after its price; `prompt` when nothing is near enough.

        `quality_cost` 1 looks at the scores alone; towards 0 a dearer arm must be likelier by up to `MARGIN`.
        """
        knob = self._settings.quality_cost if knobs.quality_cost is None else knobs.quality_cost
        open_to = {arm: score for arm, score in scores.by_arm.items() if allowed(arm)}
        if not open_to:
            return Choice(Arm.parse(self._settings.default_arm), 0.0, "no arm the gate knows is allowed", "not_allowed")
        arm = max(open_to, key=lambda a: open_to[a] - (1 - knob) * MARGIN * COST.get(a.strategy, 1.0))
        sure = open_to[arm]
        if arm != PROMPT and sure < LEAST and PROMPT in open_to:
            reason = f"no adapter or corpus is near enough (best: {arm}, {sure:.0%})"
            return Choice(PROMPT, open_to[PROMPT], reason, "abstained")
        return Choice(arm, sure, scores.why.get(arm, ""))
