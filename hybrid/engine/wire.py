"""What goes over the wire: requests in OpenAI's spelling, chunks and bodies as `Token`s, failures as our errors.

Pure functions; `vllm.py` does the input and output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from hybrid.errors import BadRequest, ContextTooLong, EngineError, EngineRejected, HybridError, Overloaded
from hybrid.types import JSON
from hybrid.types.event import Token, Usage
from hybrid.types.request import Message

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

#: what vLLM says when prompt and answer do not fit
_TOO_LONG = re.compile(r"maximum context length|greater than max_model_len", re.IGNORECASE)

#: HTTP status → OpenAI's code, where the engine gives none in words
_CODES = {404: "model_not_found", 413: "request_too_large", 429: "rate_limit_exceeded"}


def request_body(
    model: str,
    messages: Sequence[Message] | None,
    prompt: Any,
    sampling: Mapping[str, Any],
    stream: bool,
    cache_salt: str,
) -> tuple[str, JSON]:
    """(path, body) of a generation. `sampling` passes as it is; what we decide ourselves wins over it."""
    body: JSON = {**sampling, "model": model, "stream": stream}
    if stream:
        body["stream_options"] = {**(sampling.get("stream_options") or {}), "include_usage": True}
    if cache_salt:
        body["cache_salt"] = cache_salt
    if messages:
        return CHAT, {**body, "messages": [m.wire() for m in messages]}
    if prompt is None:
        raise BadRequest("A request needs `messages` or a `prompt`.", param="messages")
    return COMPLETIONS, {**body, "prompt": prompt}


def read_events(buffer: bytearray) -> Iterator[bytes]:
    """The data of each whole SSE line in `buffer`, which keeps what is not whole yet."""
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).splitlines()
    del buffer[:end]
    for line in lines:
        if line.startswith(b"data:"):
            yield line[5:].strip()


def read_chunk(data: bytes) -> list[Token]:
    """The tokens of one stream chunk: one a choice, the first of which carries the bytes. Raises EngineError."""
    chunk = _parse(data)
    if error := chunk.get("error"):
        raise stream_error(error)
    choices = chunk.get("choices") or []
    usage = _usage(chunk) if not choices or any(c.get("finish_reason") for c in choices) else None
    if not choices:
        return [Token(raw=data, usage=usage)]
    return [
        Token(
            text=_said(choice, "delta"),
            index=choice.get("index", 0),
            finish_reason=choice.get("finish_reason"),
            usage=None if i else usage,
            raw=b"" if i else data,
        )
        for i, choice in enumerate(choices)
    ]


def read_body(data: bytes) -> Token:
    """A whole answer as one token: the text and finish reason of choice 0, the usage, the bytes. Raises EngineError."""
    body = _parse(data)
    choices = body.get("choices")
    if not choices:
        raise EngineError("The engine's answer has no choices. Look in the engine's log.")
    first = choices[0]
    return Token(
        text=_said(first, "message"),
        finish_reason=first.get("finish_reason"),
        usage=_usage(body) or Usage(calls=1),
        raw=data,
    )


def read_logprobs(data: bytes) -> tuple[float, ...]:
    """The log-probability of each prompt token but the first. Raises EngineError where the engine gives none."""
    choices = _parse(data).get("choices") or [{}]
    steps = choices[0].get("prompt_logprobs")
    if not steps:
        raise EngineError("The engine gives no prompt log-probabilities; use vLLM, or check adapters by hand.")
    return tuple(float(next(iter(step.values()))["logprob"]) for step in steps[1:] if step)


def read_cards(data: bytes) -> list[JSON]:
    """The models that `/v1/models` lists. Raises EngineError when the server is none of ours."""
    cards = _parse(data).get("data")
    if not isinstance(cards, list):
        raise EngineError("The engine's /v1/models is not OpenAI's. Is this a vLLM server?")
    return cards


def http_error(status: int, data: bytes) -> HybridError:
    """The engine's refusal as one of our errors, its own words kept."""
    fault = _fault(data)
    message = str(fault.get("message") or f"The engine answered with status {status}.")
    if status == 503:
        return Overloaded(f"The engine takes no more work now: {message}")
    if status >= 500:
        return EngineError(f"The engine failed: {message}")
    if status == 400 and (_TOO_LONG.search(message) or fault.get("code") == ContextTooLong.code):
        return ContextTooLong(message, param=fault.get("param"))
    code = fault.get("code")
    spelled = code if isinstance(code, str) else _CODES.get(status, "invalid_request_error")
    return EngineRejected(message, status=status, code=spelled, param=fault.get("param"))


def stream_error(fault: Any) -> HybridError:
    """An error that came inside a stream, after the status line said 200."""
    message = fault.get("message") if isinstance(fault, dict) else fault
    return EngineError(f"The engine broke off: {message}")


def _fault(data: bytes) -> JSON:
    try:
        body = from_json(data)
    except ValueError:
        return {"message": data[:200].decode("utf-8", "replace").strip()}
    if not isinstance(body, dict):
        return {}
    error = body.get("error", body)
    return error if isinstance(error, dict) else {"message": error}


def _parse(data: bytes) -> JSON:
    try:
        value = from_json(data)
    except ValueError as error:
        raise EngineError(f"The engine answered something that is not JSON: {data[:80]!r}.") from error
    if not isinstance(value, dict):
        raise EngineError("The engine answered JSON that is not an object.")
    return value


def _said(choice: JSON, part: str) -> str:
    text = choice["text"] if "text" in choice else (choice.get(part) or {}).get("content")
    return text or ""


def _usage(body: JSON) -> Usage | None:
    usage = body.get("usage")
    if not usage:
        return None
    return Usage(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0, 1)
