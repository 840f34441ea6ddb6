"""What was decided and why, and what people thought of the answer."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest
from hybrid.server.access import caller
from hybrid.server.body import kind_of, read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house

router = APIRouter(tags=["decisions"])
MAX_COMMENT = 4_000


@router.get("/v1/decisions/{decision_id}")
async def decision(request: Request, decision_id: str) -> Response:
    """The record of a decision; its id came in the header `x-hybrid-decision-id`."""
    return JSONResponse(house(request).gateway.decision(decision_id, caller(request).id))


@router.post(
    "/v1/feedback",
    openapi_extra=body_schema(decision_id={"type": "string"}, score={"type": "number"}, comment={"type": "string"}),
)
async def feedback(request: Request) -> Response:
    """Stores a score from 0 (useless) to 1 (right) for an answer."""
    body = await read_json(request)
    decision_id, score, comment = body.get("decision_id"), body.get("score"), body.get("comment") or ""
    if not isinstance(decision_id, str):
        raise BadRequest(f"`decision_id` is a string, not {kind_of(decision_id)}.", param="decision_id")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise BadRequest(f"`score` is a number from 0 to 1, not {kind_of(score)}.", param="score")
    if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
        raise BadRequest(f"`comment` is a string of at most {MAX_COMMENT:,} characters.", param="comment")
    gateway = house(request).gateway
    await asyncio.to_thread(gateway.feedback, decision_id, float(score), comment, caller(request).id)
    return JSONResponse({"decision_id": decision_id, "status": "ok"})
