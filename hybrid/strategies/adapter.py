"""`adapter:NAME`: the base model with one LoRA adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.strategies.tools import Tools
from hybrid.types import Arm, Event, Request


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """The request as it came, to the adapter."""
    async for token in tools.generate(request.messages or None, prompt=request.prompt, adapter=arm.adapter):
        yield token
