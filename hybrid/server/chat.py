"""`/v1/chat/completions`, `/v1/completions` and `/v1/route`: the same road, whole or as far as the decision."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.server import asking, reply
from hybrid.server.access import caller
from hybrid.server.asking import Asked, Asker
from hybrid.server.body import read_json
from hybrid.server.house import House, house
from hybrid.server.reply import EventStream, Reply
from hybrid.types import JSON

router = APIRouter(tags=["answers"])

Parse = Callable[[JSON, Asker], Asked]


def body_schema(**properties: Any) -> dict[str, Any]:
    """What /docs shows of a body that is read raw: its main fields; every engine parameter is welcome beside them."""
    schema = {"type": "object", "properties": properties, "additionalProperties": True}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_MODEL = {"type": "string", "default": "auto", "examples": ["auto"]}
_MESSAGES = {
    "type": "array",
    "items": {"type": "object", "properties": {"role": {"type": "string"}, "content": {"type": "string"}}},
    "examples": [[{"role": "user", "content": "What can you do?"}]],
}
_COMMON = {
    "model": _MODEL,
    "stream": {"type": "boolean", "default": False},
    "max_tokens": {"type": "integer"},
    "temperature": {"type": "number"},
    "hybrid": {"type": "object", "description": "knobs: quality_cost, arms, corpus, top_k, explain, session"},
}


@router.post("/v1/chat/completions", openapi_extra=body_schema(messages=_MESSAGES, **_COMMON))
async def chat_completions(request: Request) -> Response:
    """Answers a conversation."""
    return await _answer(request, asking.chat)


@router.post("/v1/completions", openapi_extra=body_schema(prompt={"type": "string"}, **_COMMON))
async def completions(request: Request) -> Response:
    """Continues a raw prompt."""
    return await _answer(request, asking.completion)


@router.post("/v1/route", openapi_extra=body_schema(messages=_MESSAGES, **_COMMON))
async def route(request: Request) -> Response:
    """Decides as for a chat request, and generates nothing."""
    here = house(request)
    asked = await _ask(request, asking.chat, here)
    decision = await here.gateway.route(asked.request)
    here.metrics.decided(decision)
    spent = time.perf_counter() - request.scope["hybrid.began"]
    headers = {**reply.headers(decision), "x-hybrid-overhead-ms": f"{spent * 1000:.2f}"}
    return JSONResponse({"decision": decision.wire()}, headers=headers)


async def _ask(request: Request, parse: Parse, here: House) -> Asked:
    asker = Asker(
        id=request.scope["hybrid.id"],
        caller=caller(request).id,
        debug=request.headers.get("x-hybrid-debug", "").lower() in ("true", "1"),
        limits=here.settings.server,
        context=here.context,
    )
    return parse(await read_json(request), asker)


async def _answer(request: Request, parse: Parse) -> Response:
    here = house(request)
    asked = await _ask(request, parse, here)
    answer = Reply(here.gateway.answer(asked.request), here.metrics)
    if asked.request.stream:
        await answer.begin()
        return EventStream(answer, asked, _headers(request, here, answer))
    async with aclosing(answer):
        await answer.begin()
        body = await reply.whole(answer, asked)
        return Response(body, media_type="application/json", headers=_headers(request, here, answer))


def _headers(request: Request, here: House, answer: Reply) -> dict[str, str]:
    overhead = answer.overhead_s(request.scope["hybrid.began"])
    here.metrics.overhead.observe(overhead)
    decided = reply.headers(answer.decision) if answer.decision else {}
    return {**decided, "x-hybrid-overhead-ms": f"{overhead * 1000:.2f}"}
