"""A cascade: a cheaper arm is heard first and answers where it is sure of itself; else the arm that was chosen does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable

from hybrid.errors import HybridError
from hybrid.plan import Plan
from hybrid.strategies.attempt import attempt, sureness
from hybrid.strategies.bound import Bound
from hybrid.strategies.said import said
from hybrid.types.arm import Arm
from hybrid.types.decision import Decision
from hybrid.types.event import Decided, Drafted, Event, Failed, Finished, Retrieved
from hybrid.types.request import Request


async def cascade(
    request: Request,
    plan: Plan,
    first: Arm,
    tools: Bound,
    *,
    enough: float,
    record: Callable[[Decision], None],
) -> AsyncGenerator[Event]:
    """Decided, what `first` said as Drafted, then the answer of whichever arm was kept; both are paid for.

    `tools` are those of the arm that was chosen. `enough` is how sure of itself, 0 to 1, `first` must be; `record`
    takes the decision once it has fallen. A failure is the last event, never an exception.
    """
    try:
        draft = await attempt(request, first, tools)
        sure = sureness(draft)
        kept = sure >= enough
        decision = _heard(plan, first, sure, kept)
        record(decision)
        yield Decided(decision)
        yield Drafted(str(first), draft.text, draft.usage, note=f"tried first, {sure:.2f} sure")
        if not kept:
            async with contextlib.aclosing(tools.play(plan.decision.arm)) as events:
                async for event in events:
                    yield event
            return
        if draft.passages:
            yield Retrieved(draft.passages)
        for token in said(request, str(first), draft.text, reason=draft.finish_reason):
            yield token
        yield Finished(tools.usage)
    except HybridError as error:
        yield Failed(error)
    finally:
        await tools.aclose()


def _heard(plan: Plan, first: Arm, sure: float, kept: bool) -> Decision:
    """The decision once the cheaper arm has been heard."""
    heard = f"{first} was {sure:.2f} sure of its own answer"
    if not kept:
        return dataclasses.replace(plan.decision, reason=f"{heard}, too little; {plan.decision.reason}")
    version = plan.version(first)
    adapter = version.id if version else None
    return dataclasses.replace(plan.decision, arm=first, adapter=adapter, reason=f"{heard}; {plan.decision.reason}")
