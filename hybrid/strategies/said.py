"""An answer that no engine spoke, in the shape that the engine gives its own, so that every client reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

from hybrid.types import JSON
from hybrid.types.event import Token
from hybrid.types.request import Request


def said(
    request: Request, model: str, text: str, *, reason: str = "stop", logprobs: JSON | None = None
) -> Iterator[Token]:
    """The tokens of `text` as `model` would have said it, streamed or whole, as often as `n` asks."""
    count = request.sampling.get("n") or 1
    if not request.stream:
        yield Token(text, 0, reason, raw=_dump(_body(request, model, text, reason, logprobs, count)))
        return
    for index in range(count):
        yield Token(text, index, None, raw=_dump(_chunk(request, model, text, index, logprobs)))
        yield Token("", index, reason, raw=_dump(_last(request, model, index, reason)))


def lengthened(token: Token, more: str) -> Iterator[Token]:
    """The last piece of an engine's answer with `more` after its words: itself where it is the whole answer, else a
    piece with the words and one with the end."""
    body = json.loads(token.raw)
    choice = body["choices"][0]
    if "delta" not in choice:
        choice["message"]["content"] = f"{choice['message'].get('content') or ''}{more}"
        yield replace(token, text=token.text + more, raw=_dump(body))
        return
    words = {**choice, "delta": {**choice["delta"], "content": token.text + more}, "finish_reason": None}
    yield Token(token.text + more, token.index, raw=_dump({**body, "choices": [words]}))
    yield replace(token, text="", raw=_dump({**body, "choices": [{**choice, "delta": {}}]}))


def _frame(request: Request, model: str, kind: str, choices: list[JSON]) -> JSON:
    id = f"chatcmpl-{request.id}" if request.messages else f"cmpl-{request.id}"
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, "choices": choices}


def _body(request: Request, model: str, text: str, reason: str, logprobs: JSON | None, count: int) -> JSON:
    words: JSON = {"message": {"role": "assistant", "content": text}} if request.messages else {"text": text}
    choices = [{"index": i, **words, "logprobs": logprobs, "finish_reason": reason} for i in range(count)]
    return _frame(request, model, "chat.completion" if request.messages else "text_completion", choices)


def _chunk(request: Request, model: str, text: str, index: int, logprobs: JSON | None) -> JSON:
    words: JSON = {"delta": {"role": "assistant", "content": text}} if request.messages else {"text": text}
    return _piece(request, model, {"index": index, **words, "logprobs": logprobs, "finish_reason": None})


def _last(request: Request, model: str, index: int, reason: str) -> JSON:
    words: JSON = {"delta": {}} if request.messages else {"text": ""}
    return _piece(request, model, {"index": index, **words, "logprobs": None, "finish_reason": reason})


def _piece(request: Request, model: str, choice: JSON) -> JSON:
    return _frame(request, model, "chat.completion.chunk" if request.messages else "text_completion", [choice])


def _dump(value: JSON) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
