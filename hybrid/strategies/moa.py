"""`moa[:PANEL]` and `self_moa`: several arms draft an answer at once, and one answer is made of their drafts.

Mixture-of-Agents, Wang et al. 2024 (arXiv 2406.04692): in each layer the proposers answer, from the second on with the
drafts of the layer before; then the drafts are aggregated. Self-MoA, Li et al. 2025 (arXiv 2502.00674), samples one arm
several times instead. Roles, after Self-Refine (Madaan et al. 2023, arXiv 2303.17651): generate, critique, refine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hybrid.errors import HybridError
from hybrid.prompts import critic_messages, last_user, packed, replace_last_user, with_critique, with_drafts
from hybrid.strategies.aggregate import CHOOSERS, Chosen, likeliest, rated_best
from hybrid.strategies.panel import Draft, Panel, Seat
from hybrid.strategies.round import drafted
from hybrid.strategies.said import said
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Drafted, Event, Retrieved, Token
from hybrid.types.passage import Passage
from hybrid.types.request import Message, Request

#: tokens of the chat template and of our own words around the drafts
MARGIN = 160


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """Confers as the panel says. Only the final answer streams; drafts and those who were dropped are told before."""
    panel = tools.panel
    if panel.method == "refine":
        async for event in _refined(request, panel, tools):
            yield event
        return
    sampling = _sampling(request, panel)
    messages = request.messages
    drafts: list[Draft] = []
    for layer in range(1, panel.layers + 1):
        if drafts:
            messages = _with_drafts(request, panel, tools, drafts)
        drafts, dropped = await drafted(tools, panel, messages, sampling, layer)
        chosen = await _chosen(panel, tools, drafts) if layer == panel.layers else None
        for place, one in enumerate(drafts):
            yield _told(one, panel, chosen.why if chosen and chosen.place == place else "")
        for lost in dropped:
            yield lost
    async for event in _closing(request, panel, tools, drafts, chosen):
        yield event


async def _chosen(panel: Panel, tools: Tools, drafts: Sequence[Draft]) -> Chosen | None:
    """The draft that answers; None asks for a synthesis. A reward model that cannot rate is told of, not waited for:
    the drafts and their log-probabilities are there."""
    if panel.method != "best_of" or panel.reward is None:
        return CHOOSERS[panel.method](drafts)
    try:
        scores = await tools.rate([one.text for one in drafts])
    except HybridError as error:
        return likeliest(drafts, f"{panel.reward.id} did not rate them: {error.message}")
    return rated_best(drafts, scores, panel.reward.id)


async def _closing(
    request: Request, panel: Panel, tools: Tools, drafts: Sequence[Draft], chosen: Chosen | None
) -> AsyncIterator[Event]:
    """The chosen draft as it stands, or what the aggregator makes of them all."""
    if chosen is None:
        messages = _with_drafts(request, panel, tools, drafts)
        async for event in _final(request, panel, tools, messages, _passages(drafts)):
            yield event
        return
    best = drafts[chosen.place]
    if best.passages:
        yield Retrieved(best.passages)
    for token in said(request, str(best.seat.arm), best.text, reason=best.finish_reason):
        yield token


async def _final(
    request: Request, panel: Panel, tools: Tools, messages: Sequence[Message], passages: Sequence[Passage]
) -> AsyncIterator[Event]:
    """The aggregator's answer as it comes; what it may cite is what the drafts and itself were shown."""
    sampling = {**request.sampling, "max_tokens": _limit(request, panel)}
    sampling.pop("max_completion_tokens", None)
    if passages:
        yield Retrieved(tuple(passages))
    async for event in tools.answer(panel.aggregator, messages, sampling=sampling, stream=request.stream):
        if isinstance(event, Retrieved):
            yield Retrieved(tuple(dict.fromkeys((*passages, *event.passages))))
        elif isinstance(event, Token):
            yield event


async def _refined(request: Request, panel: Panel, tools: Tools) -> AsyncIterator[Event]:
    """Generate, then in each layer critique and refine; the first seat writes, the second criticises, if there is one.

    Only the last refinement streams, written by the aggregator.
    """
    writer, critic = panel.seats[0], panel.seats[min(1, len(panel.seats) - 1)]
    question, messages = last_user(request.messages), request.messages
    room = _room(request, panel, tools)
    for layer in range(1, panel.layers + 1):
        current = await _alone(request, panel, tools, writer, messages, layer)
        yield _told(current, panel, "draft")
        asked, shown = packed([question, current.text], room, tools.count)
        critique = await _alone(request, panel, tools, critic, critic_messages(asked, shown), layer)
        yield _told(critique, panel, "critique")
        parts = packed([current.text, critique.text], room, tools.count)
        messages = replace_last_user(request.messages, with_critique(question, *parts))
    async for event in _final(request, panel, tools, messages, current.passages):
        yield event


async def _alone(
    request: Request, panel: Panel, tools: Tools, seat: Seat, messages: Sequence[Message], layer: int
) -> Draft:
    """The draft of one seat, within the panel's deadline. Raises what it fails with."""
    table = dataclasses.replace(panel, seats=(seat,), quorum=1)
    (one,), _ = await drafted(tools, table, messages, _sampling(request, panel), layer)
    return one


def _with_drafts(request: Request, panel: Panel, tools: Tools, drafts: Sequence[Draft]) -> tuple[Message, ...]:
    """The conversation with the drafts, as many tokens of each as fit, before its last question."""
    texts = packed([one.text for one in drafts], _room(request, panel, tools), tools.count)
    return replace_last_user(request.messages, with_drafts(last_user(request.messages), texts))


def _room(request: Request, panel: Panel, tools: Tools) -> int:
    """Tokens that the model's context leaves beside the conversation, the passages of retrieval and the answer."""
    asked = sum(tools.count(message.text) for message in request.messages)
    retrieves = any("rag" in arm.strategy for arm in panel.arms)
    passages = tools.passage_budget if retrieves else 0
    return max(tools.context - asked - passages - _limit(request, panel) - MARGIN, 0)


def _limit(request: Request, panel: Panel) -> int:
    return request.sampling.get("max_completion_tokens") or request.sampling.get("max_tokens") or panel.max_tokens


def _sampling(request: Request, panel: Panel) -> Mapping[str, Any]:
    """What drafts are sampled with: as the request, with a bound, and log-probabilities where they are compared."""
    sampling = {key: value for key, value in request.sampling.items() if key != "max_completion_tokens"}
    sampling["max_tokens"] = _limit(request, panel)
    return {**sampling, "logprobs": True} if panel.method == "best_of" else sampling


def _told(one: Draft, panel: Panel, note: str) -> Drafted:
    layer = f"layer {one.layer} of {panel.layers}" if panel.layers > 1 else ""
    return Drafted(str(one.seat.arm), one.text, one.usage, ", ".join(filter(None, (layer, note))))


def _passages(drafts: Sequence[Draft]) -> tuple[Passage, ...]:
    return tuple(dict.fromkeys(passage for one in drafts for passage in one.passages))
