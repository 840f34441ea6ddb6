"""What is settled before work starts: which arm answers, why, and with which immutable versions.

A named model bypasses the gate. Adapter aliases are resolved once, here: an answer begun on `@2` ends on `@2`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hybrid.adapters.listing import AdapterVersion
from hybrid.convene import Convener
from hybrid.gate.decide import Decider, new_id
from hybrid.gate.mixing import MIX, Mixer
from hybrid.names import Names
from hybrid.strategies.attempt import can_be_tried
from hybrid.strategies.panel import Panel
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.decision import Decision
from hybrid.types.request import Request


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The decision, and every version that it or an arm it asks answers with."""

    decision: Decision
    versions: Mapping[str, AdapterVersion]
    panel: Panel | None = None

    def version(self, arm: Arm) -> AdapterVersion | None:
        """The adapter or head that an arm of the plan answers with, if it is one alone."""
        named = arm.args[0] if arm.strategy == "head" else arm.adapter
        return self.versions.get(named) if named else None

    @property
    def by_gate(self) -> bool:
        """Whether the gate chose who answers, and a person may not know what their adapters want to be told."""
        return self.panel.routed if self.panel else self.decision.chosen_by == "gate"


class Planner:
    """Makes the plan of a request. `names` knows what the home offers, `decider` is the gate with its policy."""

    def __init__(self, names: Names, decider: Decider, convener: Convener, mixer: Mixer) -> None:
        self._names = names
        self._decider = decider
        self._convener = convener
        self._mixer = mixer

    async def plan(self, request: Request) -> Plan:
        """Raises ModelNotFound, Refused, BadRequest, NotReady and the engine's errors: all that can be known before."""
        arm = self._names.arm(request.model, request.rights)
        if arm is None:
            decision = await self._decider.decide(request)
            if decision.arm.confers:
                return await self._conferring(request, decision.arm, decision)
        elif arm == MIX:
            decision = await self._mixer.decide(request)
        elif arm.confers:
            return await self._conferring(request, arm)
        else:
            decision = Decision(id=new_id(), arm=arm, reason="the caller named the model", chosen_by="caller")
        versions = await self._names.versions(decision.arm)
        first = decision.first if decision.first and can_be_tried(request) else None
        decision = dataclasses.replace(decision, adapter=_spoken(versions), first=first)
        return Plan(decision, {**versions, **await self._names.versions(first)} if first else versions)

    async def _conferring(self, request: Request, arm: Arm, chosen: Decision | None = None) -> Plan:
        """The plan of an arm that asks others. The gate's view of the request chooses and weighs the members;
        `chosen` is its decision where it chose that others are asked, too."""
        limits = request.knobs if arm.strategy == "self_moa" else dataclasses.replace(request.knobs, arms=None)
        routed = chosen or await self._decider.decide(dataclasses.replace(request, knobs=limits), whole=True)
        enrolled = [member for member in self._decider.gate.arms() if request.rights.may(member)]
        panel = self._convener.panel(request, arm, _by_itself(routed), enrolled)
        versions: dict[str, AdapterVersion] = {}
        for member in panel.arms:
            versions |= await self._names.versions(member)
        seats = f"{', '.join(str(seat.arm) for seat in panel.seats)} propose"
        if chosen:
            return Plan(dataclasses.replace(chosen, reason=f"{chosen.reason}; {seats}"), versions, panel)
        decision = dataclasses.replace(
            routed,
            arm=arm,
            confidence=1.0,
            reason=f"the caller named the model; {seats}",
            chosen_by="caller",
            fallback=None,
            vector=None,
        )
        return Plan(decision, versions, panel)


def _spoken(versions: Mapping[str, AdapterVersion]) -> str | None:
    """The immutable names of what answers."""
    return ", ".join(version.id for version in versions.values()) or None


def _by_itself(decision: Decision) -> Decision:
    """The decision with the best arm that asks no other, where it is for one that does."""
    if not decision.arm.confers:
        return decision
    alone = [arm for arm in map(Arm.parse, decision.scores) if not arm.confers] or [PROMPT]
    return dataclasses.replace(decision, arm=max(alone, key=lambda arm: decision.scores.get(str(arm), 0.0)))
