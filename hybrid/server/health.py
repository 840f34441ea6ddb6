"""Whether it lives, whether it can answer, what it holds, what it counts."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from hybrid.server.access import caller
from hybrid.server.house import house

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> Response:
    """200 while the process runs, whatever the engine does."""
    return JSONResponse({"status": "alive"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 only when an answer would work; until then 503 with the phase in words."""
    here = house(request)
    ready, phase, detail = here.gateway.ready()
    if here.traffic.draining:
        ready, phase, detail = False, "shutting down", "answers in flight are being finished"
    body = {"status": "ready" if ready else "not ready", "phase": phase, "detail": detail}
    return JSONResponse(body, 200 if ready else 503, None if ready else {"retry-after": "2"})


@router.get("/v1/status")
async def status(request: Request) -> Response:
    """Engine, adapters with their states, corpora, gate, jobs, versions."""
    return JSONResponse(await asyncio.to_thread(house(request).gateway.status, caller(request).id))


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(await asyncio.to_thread(house(request).metrics.render), media_type=CONTENT_TYPE_LATEST)
