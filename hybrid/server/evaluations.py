"""Evaluations in the background of this server, and the reports of the home. All of it takes the scope `admin`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from hybrid.errors import BadRequest, NotFound
from hybrid.evaluation import folder, gallery
from hybrid.lifecycle.evaluations import Evaluation, Split, choices, find_evaluation, wire
from hybrid.server.access import caller, require_admin
from hybrid.server.body import kind_of, read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house
from hybrid.types import JSON

router = APIRouter(tags=["evaluations"])
_NAMES = {"type": "array", "items": {"type": "string"}}
_BODY = body_schema(
    suite={"type": "string"}, tasks=_NAMES, arms=_NAMES, split={"enum": list(get_args(Split))},
    limit={"type": "integer", "minimum": 1}, name={"type": "string"},
)  # fmt: skip
_MAX_NAMES = 200
#: a report is read by people, with the words of models and data in it: it runs nothing and fetches nothing
_QUIET = {
    "content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


@router.get("/v1/suites")
async def suites(request: Request) -> Response:
    """The suites and task folders that can be evaluated."""
    require_admin(request)
    return JSONResponse(await asyncio.to_thread(choices, house(request).settings))


@router.post("/v1/evaluations", openapi_extra=_BODY)
async def create(request: Request) -> Response:
    """Puts an evaluation in the line: one runs at a time, asking this server, and gives way to other requests."""
    require_admin(request)
    evaluation = await _asked(request)
    row = await asyncio.to_thread(house(request).evaluations.create, evaluation, caller(request).id)
    return JSONResponse(wire(row))


@router.post("/v1/evaluations/plan", openapi_extra=_BODY)
async def plan(request: Request) -> Response:
    """What it would train and ask, and about how many minutes that takes; nothing is done."""
    require_admin(request)
    return JSONResponse(await house(request).evaluator.plan(await _asked(request)))


@router.get("/v1/evaluations")
async def list_evaluations(request: Request, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
    """The evaluations of this home, newest first."""
    require_admin(request)
    rows = await asyncio.to_thread(house(request).evaluations.list, limit)
    return JSONResponse({"object": "list", "data": [wire(row) for row in rows]})


@router.get("/v1/evaluations/{row_id}")
async def retrieve(request: Request, row_id: str) -> Response:
    """One of them."""
    require_admin(request)
    return JSONResponse(wire(await asyncio.to_thread(house(request).evaluations.get, row_id)))


@router.post("/v1/evaluations/{row_id}/cancel")
async def cancel(request: Request, row_id: str) -> Response:
    """Ends an evaluation within seconds. The answers it has stay: the same one, started again, goes on from them."""
    require_admin(request)
    return JSONResponse(wire(await asyncio.to_thread(house(request).evaluations.cancel, row_id)))


@router.get("/v1/reports")
async def list_reports(request: Request) -> Response:
    """The reports in `eval/reports`, newest first."""
    require_admin(request)
    found = await asyncio.to_thread(gallery.list_reports, house(request).settings.rooms)
    return JSONResponse({"object": "list", "data": found})


@router.get("/v1/reports/{name}")
async def report(request: Request, name: str) -> Response:
    """Its `report.json`."""
    return JSONResponse(await asyncio.to_thread(folder.read, await _folder(request, name)))


@router.get("/v1/reports/{name}/report.html")
async def report_page(request: Request, name: str) -> Response:
    """The page for people."""
    path = await _folder(request, name) / "report.html"
    if not path.is_file():
        raise NotFound(f"{name} has no report.html; `hybrid report` writes it again.", param="name")
    return HTMLResponse(await asyncio.to_thread(path.read_text, "utf-8"), headers=_QUIET)


@router.get("/v1/reports/{name}/examples")
async def examples(request: Request, name: str, task: str, id: str | None = None) -> Response:
    """The examples of a task with each arm's score; with `id` one of them, with every arm's answer."""
    out = await _folder(request, name)
    if id is not None:
        return JSONResponse(await asyncio.to_thread(gallery.read_example, out, task, id))
    return JSONResponse({"object": "list", "data": await asyncio.to_thread(gallery.list_examples, out, task)})


async def _folder(request: Request, name: str) -> Path:
    require_admin(request)
    return await asyncio.to_thread(gallery.find_report, house(request).settings.rooms, name)


async def _asked(request: Request) -> Evaluation:
    """The evaluation in a body. Raises BadRequest naming the field, NotFound, DataError."""
    body = await read_json(request)
    limit, split = body.get("limit"), body.get("split", "dev")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise BadRequest(f"`limit` is a whole number from 1, not {kind_of(limit)}.", param="limit")
    if split not in get_args(Split):
        raise BadRequest(f"`split` is dev or test, not {str(split)[:80]!r}.", param="split")
    return await asyncio.to_thread(
        find_evaluation,
        house(request).settings,
        suite=_text(body, "suite"),
        tasks=_names(body, "tasks"),
        arms=_names(body, "arms"),
        split=split,
        limit=limit,
        name=_text(body, "name"),
    )


def _text(body: JSON, field: str) -> str:
    value: Any = body.get(field) or ""
    if not isinstance(value, str):
        raise BadRequest(f"`{field}` is a string, not {kind_of(value)}.", param=field)
    return value


def _names(body: JSON, field: str) -> list[str]:
    value: Any = body.get(field) or []
    if not isinstance(value, list) or len(value) > _MAX_NAMES or not all(isinstance(v, str) and v for v in value):
        raise BadRequest(f"`{field}` is a list of at most {_MAX_NAMES} names.", param=field)
    if any("," in name for name in value if field == "arms"):
        raise BadRequest("A name in `arms` has no comma.", param="arms")
    return value
