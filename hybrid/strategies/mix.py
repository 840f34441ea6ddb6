"""`mix:a=0.7,b=0.3` and `mix`: the base model with a weighted mix of adapters, its weights given or the gate's.

The gateway has made the mix one adapter before this begins; it is the same for every token of the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event
from hybrid.types.request import Request


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """The request as it came, to the mix."""
    async for token in tools.generate(request.messages or None, prompt=request.prompt, adapter=str(arm)):
        yield token
