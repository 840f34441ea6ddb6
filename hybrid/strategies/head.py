"""`head:TASK`: a linear head on frozen features names one of the task's labels; the language model is not asked.

The feature-based way of BERT (Devlin et al. 2019, arXiv 1810.04805, section 5.3). The answer has the shape that the
engine gives its own, so that every client reads it; its log-probability is the head's calibrated one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from hybrid.errors import BadRequest
from hybrid.strategies.tools import Tools
from hybrid.types import JSON, Arm, Drafted, Event, Request, Token

#: labels shown to those who ask for the reasons
SHOWN = 5
Ranked = tuple[tuple[str, float], ...]


async def run(request: Request, arm: Arm, tools: Tools) -> AsyncIterator[Event]:
    """Reads the last user message and answers with its label."""
    if not request.query.strip():
        raise BadRequest("A head reads one text; send it as the last user message, or as `prompt`.", param="messages")
    ranked = await tools.classify(request.query)
    yield Drafted(arm=str(arm), text="\n".join(f"{label} {chance:.3f}" for label, chance in ranked[:SHOWN]))
    label = ranked[0][0]
    for index in range(request.sampling.get("n") or 1):
        if request.stream:
            yield Token(label, index, None, raw=_dump(_chunk(request, arm, ranked, index)))
            yield Token("", index, "stop", raw=_dump(_last(request, arm, index)))
    if not request.stream:
        yield Token(label, 0, "stop", raw=_dump(_body(request, arm, ranked)))


def _frame(request: Request, arm: Arm, kind: str, choices: list[JSON]) -> JSON:
    id = f"chatcmpl-{request.id}" if request.messages else f"cmpl-{request.id}"
    return {"id": id, "object": kind, "created": int(time.time()), "model": str(arm), "choices": choices}


def _body(request: Request, arm: Arm, ranked: Ranked) -> JSON:
    label, logprobs = ranked[0][0], _logprobs(request, ranked)
    said: JSON = {"message": {"role": "assistant", "content": label}} if request.messages else {"text": label}
    count = request.sampling.get("n") or 1
    choices = [{"index": i, **said, "logprobs": logprobs, "finish_reason": "stop"} for i in range(count)]
    return _frame(request, arm, "chat.completion" if request.messages else "text_completion", choices)


def _chunk(request: Request, arm: Arm, ranked: Ranked, index: int) -> JSON:
    label = ranked[0][0]
    said: JSON = {"delta": {"role": "assistant", "content": label}} if request.messages else {"text": label}
    return _piece(request, arm, {"index": index, **said, "logprobs": _logprobs(request, ranked), "finish_reason": None})


def _last(request: Request, arm: Arm, index: int) -> JSON:
    said: JSON = {"delta": {}} if request.messages else {"text": ""}
    return _piece(request, arm, {"index": index, **said, "logprobs": None, "finish_reason": "stop"})


def _piece(request: Request, arm: Arm, choice: JSON) -> JSON:
    return _frame(request, arm, "chat.completion.chunk" if request.messages else "text_completion", [choice])


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


def _dump(value: JSON) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
