"""`adapter:NAME`: the base model with one LoRA adapter.

A caller who names an adapter is taken at their word. Where the gate chose it, the person may not know its instruction,
so a request without it gets it: the adapter then sees what it was trained on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.prompts import instructed
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event
from hybrid.types.request import Request


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """The request to the adapter, with the instruction of its task when the gate chose it."""
    messages = instructed(request.messages, tools.instruction)
    async for token in tools.generate(messages or None, prompt=request.prompt, adapter=arm.adapter):
        yield token
