"""`few_shot[:TASK]`: the base model shown the training examples nearest to the question.

Nearest-neighbour demonstrations as in Liu et al. 2022 (KATE, arXiv 2101.06804), the nearest last.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from hybrid.errors import BadRequest
from hybrid.prompts import before_last_user, few_shot_messages
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Drafted, Event
from hybrid.types.request import Request


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """Retrieves examples, shows them as earlier turns, asks."""
    if not request.messages:
        raise BadRequest("few_shot answers chat requests; send `messages` to /v1/chat/completions.", param="model")
    task = arm.args[0] if arm.args else None
    examples = await tools.examples(task, request.query, tools.few_shot_k)
    for question, answer in examples:
        yield Drafted(arm="example", text=f"{question}\n→ {answer}")
    async for token in tools.generate(before_last_user(request.messages, few_shot_messages(examples))):
        yield token
