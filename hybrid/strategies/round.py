"""One layer of a panel: its proposers answer at once; it goes on when all have, or at its deadline with a quorum."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.errors import EngineError, EngineRejected, EngineTimeout, HybridError
from hybrid.prompts import with_system
from hybrid.strategies.panel import Draft, Panel, Seat
from hybrid.strategies.tools import Tools
from hybrid.types.event import Drafted, Finished, Retrieved, Token
from hybrid.types.request import Message

Task = asyncio.Task[Draft]


async def drafted(
    tools: Tools, panel: Panel, messages: Sequence[Message], sampling: Mapping[str, Any], layer: int
) -> tuple[list[Draft], list[Drafted]]:
    """The drafts of one layer in the order of the seats, and what to tell of those who were dropped.

    Raises an error of the kind they failed with where fewer than the quorum answered; the rest is cancelled.
    """
    tasks = [
        asyncio.create_task(propose(tools, seat, messages, _own(sampling, seat, place), layer))
        for place, seat in enumerate(panel.seats)
    ]
    try:
        late = await _gathered(tasks, panel)
        return _counted(tasks, panel, late)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def propose(
    tools: Tools, seat: Seat, messages: Sequence[Message], sampling: Mapping[str, Any], layer: int = 1
) -> Draft:
    """What one proposer answers, with its mean log-probability where `sampling` asks for those. Raises its error."""
    told = Draft(seat=seat, text="", layer=layer)
    async for event in tools.answer(seat.arm, with_system(messages, seat.system), sampling=sampling):
        match event:
            case Retrieved():
                told = dataclasses.replace(told, passages=event.passages)
            case Token():
                told = dataclasses.replace(
                    told,
                    text=told.text + event.text,
                    finish_reason=event.finish_reason or told.finish_reason,
                    logprob=_mean_logprob(event.raw) if sampling.get("logprobs") else None,
                )
            case Finished():
                told = dataclasses.replace(told, usage=event.usage)
    return told


def _own(sampling: Mapping[str, Any], seat: Seat, place: int) -> dict[str, Any]:
    """A seat's sampling: its own temperature, and a seed of its own where one is given, or equal arms were equal."""
    own = dict(sampling)
    if seat.temperature is not None:
        own["temperature"] = seat.temperature
    if isinstance(own.get("seed"), int):
        own["seed"] += place
    return own


async def _gathered(tasks: Sequence[Task], panel: Panel) -> bool:
    """Waits for all, until the deadline (True), or until so many have failed that no quorum can be had."""
    clock = asyncio.get_running_loop().time
    end = clock() + panel.deadline_s
    pending = set(tasks)
    while pending and (left := end - clock()) > 0:
        _, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if sum(task.done() and task.exception() is not None for task in tasks) > len(tasks) - panel.quorum:
            return False
    return bool(pending)


def _counted(tasks: Sequence[Task], panel: Panel, late: bool) -> tuple[list[Draft], list[Drafted]]:
    drafts: list[Draft] = []
    lost: list[tuple[Seat, HybridError]] = []
    for seat, task in zip(panel.seats, tasks, strict=True):
        if not task.done() and not late:
            continue  # it was not waited for: too many others had failed
        error = task.exception() if task.done() else EngineTimeout(f"no answer within {panel.deadline_s:g} s")
        if error is None:
            drafts.append(task.result())
        elif isinstance(error, HybridError):
            lost.append((seat, error))
        else:
            raise error
    if len(drafts) < panel.quorum:
        raise _too_few(len(drafts), panel, lost)
    return drafts, [Drafted(str(seat.arm), "", note=f"dropped: {error.message}") for seat, error in lost]


def _too_few(count: int, panel: Panel, lost: Sequence[tuple[Seat, HybridError]]) -> HybridError:
    """What happened, in the words of those who failed; a fault of the request stays one."""
    words = "; ".join(dict.fromkeys(f"{seat.arm}: {error.message}" for seat, error in lost))
    message = f"{count} of {len(panel.seats)} proposers answered where {panel.quorum} must. {words}"
    first = lost[0][1]
    if all(error.status < 500 for _, error in lost):
        return EngineRejected(message, status=first.status, code=first.code, param=first.param)
    alike = all(type(error) is type(first) for _, error in lost)
    return type(first)(message) if alike else EngineError(message)


def _mean_logprob(raw: bytes) -> float | None:
    """Of the tokens of a whole answer, natural logarithm; None where the engine gave none."""
    said = json.loads(raw)["choices"][0].get("logprobs") or {}
    values = [float(token["logprob"]) for token in said.get("content") or ()]
    return sum(values) / len(values) if values else None
