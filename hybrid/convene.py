"""Who confers on a request: from the settings, the request and the gate's scores to a `Panel`, or a refusal in words.

All of it happens before the first call: the members are known, and so is the most that they can cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hybrid.errors import BadRequest
from hybrid.names import Names
from hybrid.settings import MoaSettings, PanelSettings, ProposerSettings
from hybrid.strategies.panel import Panel, Seat
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.decision import Decision
from hybrid.types.request import Request
from hybrid.types.rights import Rights

#: the panel of `moa` alone, where the settings have one of that name
DEFAULT = "default"

#: what cannot be made of several answers, and what is asked for instead
_REFUSED = ("tools", "functions", "logprobs", "top_logprobs", "prompt_logprobs", "echo")


@dataclass(frozen=True, slots=True)
class Convener:
    """Seats panels by the `settings`; `names` knows what the home offers."""

    settings: MoaSettings
    names: Names

    def panel(self, request: Request, arm: Arm, routed: Decision, enrolled: Sequence[Arm]) -> Panel:
        """The panel of `moa`, `moa:NAME` or `self_moa`. `routed` is what the gate thinks of the request.

        Raises BadRequest for what no panel can answer and over the limits, ModelNotFound for an unknown member.
        """
        _check(request)
        named = self.settings.panels.get(arm.args[0] if arm.args else DEFAULT) if arm.strategy == "moa" else None
        if arm.strategy == "self_moa":
            seats = self._repeated([routed.arm], self.settings.samples, every=True)
        elif request.knobs.arms:
            seats = [Seat(arm=self._member(model, request.rights)) for model in request.knobs.arms]
        elif named:
            seats = [self._seat(proposer, request.rights) for proposer in named.proposers]
        else:
            seats = self._repeated(_best(routed, enrolled), self.settings.proposers)
        by_gate = arm.strategy == "self_moa" or not (named or request.knobs.arms)
        panel = self._seated(_weighed(seats, routed.scores), named or _PLAIN, request.rights, routed=by_gate)
        self._check_cost(panel, request)
        return panel

    def _seated(self, seats: Sequence[Seat], asked: PanelSettings, rights: Rights, *, routed: bool) -> Panel:
        aggregator = self._member(asked.aggregator, rights) if asked.aggregator else _heaviest(seats)
        if aggregator.strategy == "head":
            raise BadRequest("A head says one label and aggregates nothing; name another aggregator.", param="model")
        return Panel(
            seats=tuple(seats),
            aggregator=aggregator,
            method=asked.method,
            layers=asked.layers,
            quorum=min(asked.quorum or (len(seats) + 1) // 2, len(seats)),
            deadline_s=asked.deadline_s or self.settings.deadline_s,
            max_tokens=asked.max_tokens or self.settings.draft_tokens,
            routed=routed,
            reward=self.names.reward(asked.reward) if asked.reward else None,
        )

    def _seat(self, proposer: ProposerSettings, rights: Rights) -> Seat:
        return Seat(arm=self._member(proposer.arm, rights), temperature=proposer.temperature, system=proposer.system)

    def _member(self, model: str, rights: Rights) -> Arm:
        """The arm of a member. Raises BadRequest for one that would choose or confer itself, ModelNotFound."""
        arm = self.names.arm(model, rights)
        if arm is None or arm.confers or arm == Arm("mix"):
            raise BadRequest(
                f"A member of a panel answers by itself; {model[:80]!r} asks others or the gate.", param="arms"
            )
        return arm

    def _repeated(self, arms: Sequence[Arm], count: int, *, every: bool = False) -> list[Seat]:
        """So many seats of so few arms: what sits there again is sampled, or it would agree with itself."""
        warm = self.settings.temperature
        again = [every or place >= len(arms) for place in range(count)]
        return [Seat(arm=arms[i % len(arms)], temperature=warm if more else None) for i, more in enumerate(again)]

    def _check_cost(self, panel: Panel, request: Request) -> None:
        limit = self.settings.max_calls
        if panel.calls > limit:
            raise BadRequest(
                f"This panel may take {panel.calls} engine calls; the limit is {limit} (moa.max_calls). "
                "Ask fewer proposers or layers.",
                param="arms",
            )
        each = request.sampling.get("max_completion_tokens") or request.sampling.get("max_tokens") or panel.max_tokens
        if panel.calls * each > self.settings.max_tokens:
            raise BadRequest(
                f"{panel.calls} calls of {each:,} tokens are {panel.calls * each:,}; the limit is "
                f"{self.settings.max_tokens:,} (moa.max_tokens). Ask for a smaller max_tokens or fewer proposers.",
                param="max_tokens",
            )


#: what holds for a panel that no settings describe
_PLAIN = PanelSettings(proposers=(ProposerSettings(arm=str(PROMPT)),))


def _check(request: Request) -> None:
    if not request.messages:
        raise BadRequest("moa answers chat requests; send `messages` to /v1/chat/completions.", param="model")
    for name in _REFUSED:
        if request.sampling.get(name):
            raise BadRequest(f"moa makes one text of several answers and takes no `{name}`; ask one arm.", param=name)
    for name in ("n", "best_of"):
        if (request.sampling.get(name) or 1) > 1:
            raise BadRequest(f"moa gives one answer; leave `{name}` out, or ask one arm for several.", param=name)


def _best(routed: Decision, enrolled: Sequence[Arm]) -> list[Arm]:
    """The arms in the gate's order, the one it would take first; what it does not score comes last."""
    rest = sorted((arm for arm in enrolled if not arm.confers), key=lambda arm: -routed.scores.get(str(arm), -1.0))
    return list(dict.fromkeys((routed.arm, *rest)))


def _weighed(seats: Sequence[Seat], scores: Mapping[str, float]) -> list[Seat]:
    """The seats with the gate's scores as weights; an arm that it does not score weighs as the others on average."""
    known = [scores[str(seat.arm)] for seat in seats if str(seat.arm) in scores]
    mean = sum(known) / len(known) if known else 1.0
    return [replace(seat, weight=scores.get(str(seat.arm), mean)) for seat in seats]


def _heaviest(seats: Sequence[Seat]) -> Arm:
    """The arm the gate trusts most among those that can write; `prompt` where none can."""
    writers = [seat for seat in seats if seat.arm.strategy != "head"]
    return max(writers, key=lambda seat: seat.weight).arm if writers else PROMPT
