"""The rules around the learned scores: permissions, abstention, cost. Learned numbers are the gate's; these are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybrid.errors import BadRequest, Forbidden
from hybrid.gate.model import Scores
from hybrid.settings import GateSettings
from hybrid.types import PROMPT, Arm, Knobs

#: what an answer costs, as an order: passages lengthen the prompt, an adapter does not
_COST: Mapping[str, int] = {"prompt": 0, "adapter": 1, "rag": 2, "adapter+rag": 3}
#: how much less likely a cheaper arm may be and still be taken, where only cost counts
_WIDEST = 0.2
#: the quality-cost knob at which `abstain_below` holds as it stands: nearer 0, more is asked of a narrow arm
_AT = 0.7


@dataclass(frozen=True, slots=True)
class Choice:
    """The arm taken, how sure the gate was of it (0 to 1), why, and what it fell back from, if it did."""

    arm: Arm
    confidence: float
    reason: str
    fallback: str | None = None


class Policy:
    """Turns scores into a choice. A gate can only choose among what the caller may use."""

    def __init__(self, settings: GateSettings) -> None:
        self._settings = settings
        self._default = Arm.parse(settings.default_arm)

    def choose(self, scores: Scores, *, allowed: Callable[[Arm], bool], knobs: Knobs) -> Choice:
        """The arm to answer with. Raises BadRequest or Forbidden when the caller may use none of the arms."""
        usable = {arm: score for arm, score in scores.by_arm.items() if allowed(arm) and _asked(arm, knobs)}
        if not usable:
            return self._nothing(allowed, knobs)
        if not all(map(math.isfinite, usable.values())):
            safe = self._safe(usable)
            return Choice(safe, 0.0, f"the gate gave no usable score, so {safe} answers", "error")
        quality = self._settings.quality_cost if knobs.quality_cost is None else knobs.quality_cost
        arm = _cheapest_of_best(usable, quality)
        needed = min(self._settings.abstain_below * (1 + _AT - quality), 1.0)
        if arm == PROMPT or PROMPT not in usable or usable[arm] >= needed:
            return Choice(arm, usable[arm], scores.why.get(arm, "it scores best"))
        why = scores.why.get(arm, str(arm))
        if usable[PROMPT] >= usable[arm]:
            return Choice(PROMPT, usable[PROMPT], f"{scores.why.get(PROMPT, 'it scores best')} ({why})")
        reason = f"not sure enough: {why}, a probability of {usable[arm]:.2f} where {needed:.2f} is needed"
        return Choice(PROMPT, usable[PROMPT], reason, "abstained")

    def _safe(self, usable: Mapping[Arm, float]) -> Arm:
        if self._default in usable:
            return self._default
        return min(usable, key=lambda arm: (_COST.get(arm.strategy, len(_COST)), arm))

    def _nothing(self, allowed: Callable[[Arm], bool], knobs: Knobs) -> Choice:
        if knobs.arms is None and knobs.corpus is None and allowed(self._default):
            return Choice(self._default, 0.0, "no arm is scored, so the default arm answers", "error")
        if knobs.arms is None and knobs.corpus is None:
            raise Forbidden("This key may use none of the arms that are served; ask for one to be allowed.")
        named = ", ".join(knobs.arms or ()) or f"corpus {knobs.corpus}"
        raise BadRequest(
            f"None of the arms asked for can be chosen here: {named[:200]}. /v1/models lists them.", param="arms"
        )


def _cheapest_of_best(usable: Mapping[Arm, float], quality: float) -> Arm:
    """The best arm other than `prompt`, or a cheaper one that is nearly as likely; `prompt` where it is alone."""
    narrow = {arm: score for arm, score in usable.items() if arm != PROMPT}
    enough = max(narrow.values(), default=0.0) - _WIDEST * (1 - quality)
    close = [arm for arm, score in narrow.items() if score >= enough]
    return min(close, key=lambda arm: (_COST.get(arm.strategy, len(_COST)), -usable[arm], arm), default=PROMPT)


def _asked(arm: Arm, knobs: Knobs) -> bool:
    """Whether the request's own limits leave the arm in: `arms` by spelling or strategy, `corpus` for retrieval."""
    if knobs.arms is not None and str(arm) not in knobs.arms and arm.strategy not in knobs.arms:
        return False
    return not (knobs.corpus and "rag" in arm.strategy and arm.args[-1] != knobs.corpus)
