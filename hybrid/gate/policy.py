"""The rules around the learned scores: permissions, abstention, cost. Learned numbers are the gate's; these are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hybrid.errors import BadRequest, Forbidden
from hybrid.gate.model import Scores
from hybrid.settings import GateSettings
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.request import Knobs

#: what an answer costs where nothing was measured, in prompts of the base model: examples and passages lengthen the
#: prompt, a head needs no engine, and agents that confer call it several times
_NOMINAL: Mapping[str, float] = {
    "head": 0.0, "prompt": 1.0, "base": 1.0, "adapter": 1.1, "mix": 1.2, "few_shot": 4.0, "rag": 5.0,
    "adapter+rag": 5.1, "self_moa": 6.0, "moa": 8.0,
}  # fmt: skip
#: an arm expected to reach less than this share of the best one's score saves nothing
_LEAST = 0.5
#: an arm that costs more than this share of the chosen one is not tried before it
_CHEAP = 0.7
#: an arm that scores less than this share of the chosen one is not tried to learn of it, and how sharply the others'
#: scores tell which is
_REACH, _TEMPERATURE = 0.8, 0.1
#: the quality-cost knob at which that probability holds as it stands: nearer 0, more is asked of a narrow arm
_AT = 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """The arm taken, how sure the gate was of it (0 to 1), why, what it fell back from, if it did, the cheaper arm
    that may be tried first, and the probability of this choice."""

    arm: Arm
    confidence: float
    reason: str
    fallback: str | None = None
    first: Arm | None = None
    propensity: float = 1.0


class Policy:
    """Turns scores into a choice. A gate can only choose among what the caller may use. `dice` give numbers in [0, 1)
    by which it explores."""

    def __init__(self, settings: GateSettings, dice: Callable[[], float] = random.random) -> None:
        self._settings = settings
        self._dice = dice
        self._default = Arm.parse(settings.default_arm)

    def choose(
        self,
        scores: Scores,
        *,
        allowed: Callable[[Arm], bool],
        knobs: Knobs,
        kept: Arm | None = None,
    ) -> Choice:
        """The arm to answer with: the cheapest of those that score nearly as well as the best one.

        `kept` is the arm that answered earlier in the conversation: it stays unless another gains more than
        `stay_margin`, as to change adapters costs the cached prefix. Raises BadRequest or Forbidden when the caller
        may use none of the arms.
        """
        usable = {arm: score for arm, score in scores.by_arm.items() if allowed(arm) and _asked(arm, knobs)}
        if not usable:
            return self._nothing(allowed, knobs)
        if not all(map(math.isfinite, usable.values())):
            safe = self._safe(usable)
            return Choice(safe, 0.0, f"the gate gave no usable score, so {safe} answers", "error")
        quality = self._settings.quality_cost if knobs.quality_cost is None else knobs.quality_cost
        choice = self._best(scores, usable, quality)
        if kept in usable and kept != choice.arm and usable[choice.arm] - usable[kept] <= self._settings.stay_margin:
            return Choice(kept, usable[kept], f"stays with the conversation's arm; {choice.reason}")
        return choice if kept or choice.fallback or choice.first else self._explored(choice, usable, scores.why)

    def _explored(self, choice: Choice, usable: Mapping[Arm, float], why: Mapping[Arm, str]) -> Choice:
        """The choice, or with the probability `explore` another arm that scores nearly as well: a softmax of them."""
        share, best = self._settings.explore, usable[choice.arm]
        near = [a for a in usable if a != choice.arm and not a.confers and usable[a] >= _REACH * best > 0]
        if not share or not near:
            return choice
        odds = {arm: math.exp((usable[arm] - best) / _TEMPERATURE) for arm in sorted(near)}
        drawn = self._dice()
        for arm, odd in odds.items():
            chance = share * odd / sum(odds.values())
            if drawn < chance:
                reason = f"explored, {choice.arm} scores best; {why.get(arm, 'it scores nearly as well')}"
                return Choice(arm, usable[arm], reason, propensity=round(chance, 6))
            drawn -= chance
        return replace(choice, propensity=1 - share)

    def _best(self, scores: Scores, usable: Mapping[Arm, float], quality: float) -> Choice:
        """The cheapest arm that scores nearly as well as the best one; `prompt` where the request is nobody's."""
        stranger = usable.get(PROMPT, 0.0) if scores.stranger is None else scores.stranger
        earned = {arm: score - stranger if arm == PROMPT else score for arm, score in usable.items()}
        arm = _cheapest_of_best(earned, scores.costs, quality)
        sure = scores.needed(arm) if self._settings.abstain_below is None else self._settings.abstain_below
        needed = min(sure * (1 + (_AT - quality) / 2), 1.0)
        why = scores.why.get(arm, "it scores best")
        if PROMPT not in usable or earned[arm] >= needed:
            first = _cheaper(arm, earned, scores.costs) if self._settings.cascade else None
            return Choice(arm, usable[arm], why, first=first)
        if usable[PROMPT] >= usable[arm]:
            return Choice(PROMPT, usable[PROMPT], f"{scores.why.get(PROMPT, 'it scores best')} ({why})")
        reason = f"not sure enough: {why}, a score of {usable[arm]:.2f} where {needed:.2f} is needed"
        return Choice(PROMPT, usable[PROMPT], reason, "abstained")

    def _safe(self, usable: Mapping[Arm, float]) -> Arm:
        if self._default in usable:
            return self._default
        return min(usable, key=lambda arm: (_NOMINAL.get(arm.strategy, math.inf), arm))

    def _nothing(self, allowed: Callable[[Arm], bool], knobs: Knobs) -> Choice:
        if knobs.arms is None and knobs.corpus is None and allowed(self._default):
            return Choice(self._default, 0.0, "no arm is scored, so the default arm answers", "error")
        if knobs.arms is None and knobs.corpus is None:
            raise Forbidden("This key may use none of the arms that are served; ask for one to be allowed.")
        named = ", ".join(knobs.arms or ()) or f"corpus {knobs.corpus}"
        raise BadRequest(
            f"None of the arms asked for can be chosen here: {named[:200]}. /v1/models lists them.", param="arms"
        )


def _cheapest_of_best(earned: Mapping[Arm, float], costs: Mapping[Arm, float], quality: float) -> Arm:
    """The cheapest arm whose score is within (1 - quality)² of the best one's, as a share of it."""
    slack = min((1 - quality) ** 2, 1 - _LEAST)
    enough = max(earned.values()) * (1 - slack)
    good = (arm for arm in earned if earned[arm] >= enough)
    return min(good, key=lambda arm: (_price(arm, costs), -earned[arm], arm))


def _cheaper(chosen: Arm, earned: Mapping[Arm, float], costs: Mapping[Arm, float]) -> Arm | None:
    """The best of the arms that cost little beside the chosen one and are no waste to try; None without any."""
    limit, least = _CHEAP * _price(chosen, costs), _LEAST * earned[chosen]
    worth = [arm for arm in earned if _price(arm, costs) <= limit and earned[arm] >= least and not arm.confers]
    return max(worth, key=lambda arm: (earned[arm], arm), default=None)


def _price(arm: Arm, costs: Mapping[Arm, float]) -> float:
    """What an arm costs in prompts: as measured, in the unit of the outcomes, or what is usual of its strategy."""
    unit = costs.get(PROMPT, math.nan)
    known = costs.get(arm, math.nan) / unit if unit > 0 else math.nan
    return _NOMINAL.get(arm.strategy, max(_NOMINAL.values())) if math.isnan(known) else known


def _asked(arm: Arm, knobs: Knobs) -> bool:
    """Whether the request's own limits leave the arm in: `arms` by spelling or strategy, `corpus` for retrieval."""
    if knobs.arms is not None and str(arm) not in knobs.arms and arm.strategy not in knobs.arms:
        return False
    return not (knobs.corpus and "rag" in arm.strategy and arm.args[-1] != knobs.corpus)
