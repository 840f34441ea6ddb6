"""`prompt`: the base model, zero-shot. `base` is the same without the house's system prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event
from hybrid.types.request import Message, Request


async def base(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """The request as it came, to the base model."""
    async for token in tools.generate(request.messages or None, prompt=request.prompt):
        yield token


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """The request to the base model, with the house's system prompt when it brings none."""
    messages = request.messages
    if messages and tools.system_prompt and messages[0].role != "system":
        messages = (Message("system", tools.system_prompt), *messages)
    async for token in tools.generate(messages or None, prompt=request.prompt):
        yield token
