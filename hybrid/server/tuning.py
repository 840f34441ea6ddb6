"""`/v1/fine_tuning/jobs`, as the official client expects them."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest
from hybrid.server.access import caller
from hybrid.server.body import read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house
from hybrid.server.tuning_body import read_order
from hybrid.training.jobs import JobBook
from hybrid.training.wire import checkpoint_object, event_object, job_object, page

router = APIRouter(tags=["fine-tuning"])
#: how long an answer waits for a job to come to what was asked of it
PATIENCE_S = 10.0
_LOOK_S = 0.1
_METADATA = re.compile(r"metadata\[(.{1,64})\]")
_MAX_KEY = 256
Limit = Annotated[int, Query(ge=1, le=1000)]
_JOBS = "/v1/fine_tuning/jobs"
_JOB = _JOBS + "/{job_id}"


def _book(request: Request) -> JobBook:
    """The jobs as this caller sees them."""
    return house(request).jobs.of(caller(request).id)


@router.post(_JOBS, openapi_extra=body_schema(model={"type": "string"}, training_file={"type": "string"}))
async def create(request: Request) -> Response:
    """A new job. The same `Idempotency-Key` with the same body gives the job that was made first."""
    here, who = house(request), caller(request)
    order = read_order(await read_json(request), here.gateway, here.gateway.keys.rights(who.id))
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= _MAX_KEY:
        raise BadRequest(f"Idempotency-Key has 1 to {_MAX_KEY} characters.", param="Idempotency-Key")
    job = await asyncio.to_thread(here.orders.submit, order, caller=who.id, admin=who.admin, key=key)
    return JSONResponse(job_object(job))


@router.get(_JOBS)
async def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> Response:
    """The caller's jobs, newest first; `metadata[key]=value` picks those that carry it."""
    asked = {m[1]: value for name, value in request.query_params.items() if (m := _METADATA.fullmatch(name))}
    rows, more = await asyncio.to_thread(_book(request).list, after=after, limit=limit, metadata=asked)
    return JSONResponse(page([job_object(row) for row in rows], more))


@router.get(_JOB)
async def retrieve(request: Request, job_id: str) -> Response:
    """One of them."""
    return JSONResponse(job_object(await asyncio.to_thread(_book(request).get, job_id)))


@router.post(_JOB + "/cancel")
async def cancel(request: Request, job_id: str) -> Response:
    """Ends a job: at once where it waits, within ten seconds where it trains."""
    book = _book(request)
    await asyncio.to_thread(book.want, job_id, "cancel")
    return await _settled(book, job_id)


@router.post(_JOB + "/pause")
async def pause(request: Request, job_id: str) -> Response:
    """Stops a job after its step, with a checkpoint. A long step may take longer than this answer waits."""
    book = _book(request)
    await asyncio.to_thread(book.want, job_id, "pause")
    return await _settled(book, job_id)


@router.post(_JOB + "/resume")
async def resume(request: Request, job_id: str) -> Response:
    """Lets a paused job wait for its turn again."""
    job = await asyncio.to_thread(house(request).orders.resume, job_id, caller=caller(request).id)
    return JSONResponse(job_object(job))


async def _settled(book: JobBook, job_id: str) -> Response:
    """The job once nothing runs any more, or as it is when patience ends."""
    end = time.monotonic() + PATIENCE_S
    while (job := await asyncio.to_thread(book.get, job_id))["status"] == "running" and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)  # the process that trains writes the row; nothing announces it here
    return JSONResponse(job_object(job))


@router.get(_JOB + "/events")
async def events(request: Request, job_id: str, after: str | None = None, limit: Limit = 20) -> Response:
    """What happened, newest first."""
    last = _number(after, "ftevent-")
    rows, more = await asyncio.to_thread(_book(request).events, job_id, after=last, limit=limit)
    return JSONResponse(page([event_object(row) for row in rows], more))


@router.get(_JOB + "/checkpoints")
async def checkpoints(request: Request, job_id: str, after: str | None = None, limit: Limit = 10) -> Response:
    """The checkpoints that are complete, newest first."""
    book, last = _book(request), _number(after, "ftckpt-")
    job = await asyncio.to_thread(book.get, job_id)
    rows, more = await asyncio.to_thread(book.checkpoints, job_id, after=last, limit=limit)
    return JSONResponse(page([checkpoint_object(row, job) for row in rows], more))


def _number(after: Any, prefix: str) -> int | None:
    """The number in the id that a page begins after."""
    if after is None:
        return None
    digits = after.removeprefix(prefix)
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise BadRequest(f"`after` is an id of the page before, {prefix}…", param="after")
    return int(digits)
