"""`/v1/vector_stores/{id}/files` and `/file_batches`, as OpenAI: what is in a corpus, and what is on its way."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest
from hybrid.lifecycle.attachments import Wanted
from hybrid.server import vector_body as read
from hybrid.server.access import caller
from hybrid.server.body import read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import House, house
from hybrid.server.vector_stores import STORE, Limit, Order, rights_of, wanted
from hybrid.training.wire import page
from hybrid.types import JSON
from hybrid.types.rights import Rights

router = APIRouter(tags=["vector stores"])
FILES = STORE + "/files"
FILE = FILES + "/{file_id:path}"
BATCHES = STORE + "/file_batches"
BATCH = BATCHES + "/{batch_id}"
Status = Literal["in_progress", "completed", "failed", "cancelled"]
#: how soon a client that waits for a file may ask again
_POLL = {"openai-poll-after-ms": "200"}


@router.post(FILES, openapi_extra=body_schema(file_id={"type": "string"}, attributes={"type": "object"}))
async def attach(request: Request, store_id: str) -> Response:
    """Puts an upload in line for a corpus; `in_progress` until it is found by searches."""
    here, body, rights, who = house(request), await read_json(request), rights_of(request), caller(request).id

    def attached() -> JSON:
        row = here.corpora.writable(store_id, rights)
        file_id = read.file_id(body.get("file_id"))
        here.attachments.attach(row, [wanted(here, who, file_id, body, rights)], who)
        here.corpora.touch(row)
        return read.file_object(here.attachments.get(row, file_id, rights))

    return JSONResponse(await asyncio.to_thread(attached), headers=_POLL)


@router.get(FILES)
async def list_files(
    request: Request,
    store_id: str,
    filter: Status | None = None,
    after: str | None = None,
    before: str | None = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> Response:
    """The files of a corpus; the documents that `hybrid index` read are among them."""
    cursor = {"after": after, "before": before, "limit": limit, "newest": order == "desc"}
    return JSONResponse(await asyncio.to_thread(_listed, house(request), rights_of(request), store_id, filter, cursor))


@router.get(FILE + "/content")
async def content(request: Request, store_id: str, file_id: str) -> Response:
    """What was read of a file: its passages, in order."""
    here, rights = house(request), rights_of(request)

    def passages() -> list[JSON]:
        row = here.corpora.get(store_id, rights)
        if here.attachments.get(row, file_id, rights)["status"] != "completed":
            return []
        found = here.gateway.library.called(row["name"], [file_id]).get(file_id, [])
        return [
            {"type": "text", "text": one.text, "hybrid": {"id": one.id, "title": one.title}}
            for one in found
            if one.document == file_id
        ]

    data = await asyncio.to_thread(passages)
    return JSONResponse(
        {"object": "vector_store.file_content.page", "data": data, "has_more": False, "next_page": None}
    )


@router.get(FILE)
async def retrieve(request: Request, store_id: str, file_id: str) -> Response:
    """One of them."""
    here, rights = house(request), rights_of(request)
    told = await asyncio.to_thread(lambda: here.attachments.get(here.corpora.get(store_id, rights), file_id, rights))
    return JSONResponse(read.file_object(told), headers=_POLL)


@router.post(FILE, openapi_extra=body_schema(attributes={"type": "object"}))
async def modify(request: Request, store_id: str, file_id: str) -> Response:
    """Changes a file's attributes."""
    here, body, rights = house(request), await read_json(request), rights_of(request)
    given = read.attributes(body)

    def changed() -> JSON:
        return here.attachments.describe(here.corpora.writable(store_id, rights), file_id, given, rights)

    return JSONResponse(read.file_object(await asyncio.to_thread(changed)))


@router.delete(FILE)
async def delete(request: Request, store_id: str, file_id: str) -> Response:
    """Takes a file out of a corpus: when this answers, no search finds it."""
    here, rights = house(request), rights_of(request)
    await asyncio.to_thread(lambda: here.attachments.delete(here.corpora.writable(store_id, rights), file_id, rights))
    return JSONResponse({"id": file_id, "object": "vector_store.file.deleted", "deleted": True})


@router.post(BATCHES, openapi_extra=body_schema(file_ids={"type": "array"}, files={"type": "array"}))
async def create_batch(request: Request, store_id: str) -> Response:
    """Puts several uploads in line at once: `file_ids` with one set of attributes, or `files` with each its own."""
    here, body, rights, who = house(request), await read_json(request), rights_of(request), caller(request).id

    def made() -> JSON:
        row = here.corpora.writable(store_id, rights)
        batch = here.attachments.attach(row, _batch(here, who, body, rights), who, batch=True)
        here.corpora.touch(row)
        return _batch_told(here, row, str(batch))

    return JSONResponse(await asyncio.to_thread(made), headers=_POLL)


@router.get(BATCH)
async def retrieve_batch(request: Request, store_id: str, batch_id: str) -> Response:
    """How far a batch is."""
    here, rights = house(request), rights_of(request)
    told = await asyncio.to_thread(lambda: _batch_told(here, here.corpora.get(store_id, rights), batch_id))
    return JSONResponse(told, headers=_POLL)


@router.post(BATCH + "/cancel")
async def cancel_batch(request: Request, store_id: str, batch_id: str) -> Response:
    """Cancels what waits of a batch; what is done stays."""
    here, rights = house(request), rights_of(request)

    def cancelled() -> JSON:
        row = here.corpora.writable(store_id, rights)
        here.attachments.cancel(row, batch_id)
        return _batch_told(here, row, batch_id)

    return JSONResponse(await asyncio.to_thread(cancelled))


@router.get(BATCH + "/files")
async def list_batch_files(
    request: Request,
    store_id: str,
    batch_id: str,
    filter: Status | None = None,
    after: str | None = None,
    before: str | None = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> Response:
    """The files of a batch."""
    here, cursor = house(request), {"after": after, "before": before, "limit": limit, "newest": order == "desc"}
    return JSONResponse(await asyncio.to_thread(_listed, here, rights_of(request), store_id, filter, cursor, batch_id))


def _listed(
    here: House, rights: Rights, store_id: str, status: str | None, cursor: dict[str, Any], batch: str | None = None
) -> JSON:
    row = here.corpora.get(store_id, rights)
    if batch is not None:
        here.attachments.batch(row, batch)
    files = [read.file_object(one) for one in here.attachments.listed(row, rights, batch=batch)]
    found, more = read.paged([one for one in files if status in (None, one["status"])], **cursor)
    return page(found, more)


def _batch(here: House, who: str, body: JSON, rights: Rights) -> list[Wanted]:
    each = body.get("files")
    if each is None:
        return [wanted(here, who, file_id, body, rights) for file_id in read.file_ids(body)]
    if body.get("file_ids") is not None or not isinstance(each, list) or not 1 <= len(each) <= read.MAX_BATCH:
        raise BadRequest(f"Give `file_ids`, or `files` as a list of 1 to {read.MAX_BATCH:,} objects.", param="files")
    if not all(isinstance(one, dict) for one in each):
        raise BadRequest("`files` holds objects with a `file_id`.", param="files")
    return [wanted(here, who, read.file_id(one.get("file_id")), one, rights) for one in each]


def _batch_told(here: House, corpus: JSON, batch_id: str) -> JSON:
    row = here.attachments.batch(corpus, batch_id)
    return read.batch_object(row, here.attachments.counts(corpus, batch_id))
