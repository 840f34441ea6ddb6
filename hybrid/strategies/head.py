"""`head:TASK`: a linear head on frozen features names one of the task's labels; the language model is not asked.

The feature-based way of BERT (Devlin et al. 2019, arXiv 1810.04805, section 5.3). The answer has the shape that the
engine gives its own; its log-probability is the head's calibrated one.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

from hybrid.errors import BadRequest
from hybrid.strategies.said import said
from hybrid.strategies.tools import Tools
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.event import Drafted, Event
from hybrid.types.request import Request

#: labels shown to those who ask for the reasons
SHOWN = 5
Ranked = tuple[tuple[str, float], ...]


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """Reads the last user message and answers with its label."""
    if not request.query.strip():
        raise BadRequest("A head reads one text; send it as the last user message, or as `prompt`.", param="messages")
    ranked = await tools.classify(request.query)
    yield Drafted(arm=str(arm), text="\n".join(f"{label} {chance:.3f}" for label, chance in ranked[:SHOWN]))
    for token in said(request, str(arm), ranked[0][0], logprobs=_logprobs(request, ranked)):
        yield token


def _logprobs(request: Request, ranked: Ranked) -> JSON | None:
    """The label as one token, with the next likeliest where `top_logprobs` (chat) or `logprobs` asks for them."""
    asked: Any = request.sampling.get("logprobs")
    if asked is None or asked is False:
        return None
    if not request.messages:
        nearest = {label: _log(chance) for label, chance in ranked[: int(asked)]}
        label, chance = ranked[0]
        return {"tokens": [label], "token_logprobs": [_log(chance)], "top_logprobs": [nearest], "text_offset": [0]}
    more = ranked[: request.sampling.get("top_logprobs") or 0]
    return {"content": [{**_token(*ranked[0]), "top_logprobs": [_token(*pair) for pair in more]}], "refusal": None}


def _token(label: str, chance: float) -> JSON:
    return {"token": label, "logprob": _log(chance), "bytes": list(label.encode())}


def _log(chance: float) -> float:
    """As low as OpenAI goes for what is never said."""
    return math.log(chance) if chance > 0 else -9999.0
