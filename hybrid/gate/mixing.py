"""`mix` without weights: the gate's scores of the adapters, made sparse, are the weights."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping

import numpy as np

from hybrid.adapters.mix import quantised
from hybrid.errors import ModelNotFound, NotReady
from hybrid.gate.decide import Decider
from hybrid.gate.features import Numbers
from hybrid.gate.sparse import balanced, top_k_softmax
from hybrid.settings import GateSettings
from hybrid.types.arm import Arm
from hybrid.types.decision import Decision
from hybrid.types.request import Request

#: without weights: they are the gate's
MIX = Arm("mix")
#: scored requests remembered, and how many of them pass before the load is evened again
RECENT, EVERY = 256, 16
#: a score of nothing still has a logarithm
_LEAST = 1e-9


class Mixer:
    """Weighs the adapters of a request by the gate."""

    def __init__(self, decider: Decider, settings: GateSettings) -> None:
        self._decider = decider
        self._settings = settings
        self._recent: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self._seen = 0
        self._bias: dict[str, float] = {}

    async def decide(self, request: Request) -> Decision:
        """The decision whose arm is `mix:…` of the best adapters, or the one adapter that outweighs all others.

        Raises ModelNotFound when the gate knows no adapter, or the request allows none, and NotReady when it could not
        score them: who asks for a mix gets one, or an error.
        """
        asked = dataclasses.replace(request.knobs, arms=None, corpus=None, session=None)
        decision = await self._decider.decide(dataclasses.replace(request, model="auto", knobs=asked), whole=True)
        if decision.fallback in ("deadline", "error"):
            raise NotReady(f"The adapters could not be weighed: {decision.reason}. Repeat, or give the weights.")
        weights = self._weights(_adapters(decision.scores, request.knobs.arms))
        arm = Arm(MIX.strategy, (",".join(f"{name}={w:g}" for name, w in weights.items()),))
        if len(weights) == 1:
            arm = Arm("adapter", tuple(weights))
        share = max(weights.values())
        reason = f"the gate weighs the adapters: {', '.join(f'{name} {w:.2f}' for name, w in weights.items())}"
        return dataclasses.replace(decision, arm=arm, confidence=share, reason=reason, fallback=None, chosen_by="gate")

    def _weights(self, scores: Mapping[str, float]) -> dict[str, float]:
        if not scores:
            raise ModelNotFound(
                "The gate knows no adapter to mix: train two, or give the weights as mix:a=0.7,b=0.3.", param="model"
            )
        self._balance(scores)
        bias = np.array([self._bias.get(name, 0.0) for name in scores])
        shares = top_k_softmax(_logs([scores], list(scores)), self._settings.mix_top_k, bias=bias)[0]
        return quantised({name: float(share) for name, share in zip(scores, shares, strict=True) if share > 0})

    def _balance(self, scores: Mapping[str, float]) -> None:
        """Evens the load over what was asked lately, every so often, where the house wants it."""
        if not self._settings.mix_balance:
            return
        self._recent.append(scores)
        self._seen += 1
        if self._seen % EVERY:
            return
        names = list(scores)
        rows = [row for row in self._recent if row.keys() == scores.keys()]
        found = balanced(_logs(rows, names), self._settings.mix_top_k, self._settings.mix_balance)
        self._bias = dict(zip(names, found.tolist(), strict=True))


def _adapters(scores: Mapping[str, float], allowed: tuple[str, ...] | None) -> dict[str, float]:
    """The scores of plain adapters' arms by the adapter's name; one that needs passages is no part of a mix."""
    arms = {Arm.parse(spelled): score for spelled, score in scores.items()}
    return {
        arm.args[0]: score
        for arm, score in arms.items()
        if arm.strategy == "adapter" and (allowed is None or str(arm) in allowed or "adapter" in allowed)
    }


def _logs(rows: list[Mapping[str, float]], names: list[str]) -> Numbers:
    logs: Numbers = np.log(np.maximum([[row[name] for name in names] for row in rows], _LEAST))
    return logs
