"""`/v1/files`, as OpenAI: what is uploaded to train on, and the results of jobs."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import FileResponse, JSONResponse, Response

from hybrid.errors import BadRequest
from hybrid.server.access import caller
from hybrid.server.house import house
from hybrid.server.multipart import read_form
from hybrid.training.check import check_upload
from hybrid.training.files import PURPOSES
from hybrid.training.wire import file_object, page

router = APIRouter(tags=["files"])
#: looking through rows takes the interpreter's lock from the answers
MAX_CHECKED = 16 << 20
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string"}},
}


@router.post("/v1/files", openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": _FORM}}}})
async def create(request: Request) -> Response:
    """Takes a file; it is written to disk as it comes."""
    files = house(request).files
    incoming = await asyncio.to_thread(files.begin)
    try:
        form = await read_form(request, incoming.file)
        purpose = form.fields.get("purpose", "")
        if form.filename is None:
            raise BadRequest("The form has no field `file`.", param="file")
        if purpose not in PURPOSES:
            raise BadRequest(f"`purpose` is one of {', '.join(PURPOSES)}, not {purpose[:80]!r}.", param="purpose")
        row = await asyncio.to_thread(
            files.keep, incoming, caller=caller(request).id, filename=form.filename, purpose=purpose
        )
    finally:
        incoming.discard()  # what was kept lies elsewhere by now
    return JSONResponse(file_object(row))


@router.get("/v1/files")
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The caller's files."""
    rows, more = await asyncio.to_thread(
        house(request).files.list, caller(request).id, purpose=purpose, after=after, limit=limit, newest=order == "desc"
    )
    return JSONResponse(page([file_object(row) for row in rows], more))


@router.get("/v1/files/{file_id}")
async def retrieve(request: Request, file_id: str) -> Response:
    """One of them."""
    return JSONResponse(file_object(await asyncio.to_thread(house(request).files.get, file_id, caller(request).id)))


@router.get("/v1/files/{file_id}/content")
async def content(request: Request, file_id: str) -> Response:
    """Its bytes. They come as a download, whatever they are: no browser may take an upload for a page of ours."""
    path = await asyncio.to_thread(house(request).files.path, file_id, caller(request).id)
    return FileResponse(path, media_type="application/octet-stream", headers={"content-disposition": "attachment"})


@router.get("/v1/files/{file_id}/check")
async def check(request: Request, file_id: str) -> Response:
    """What training would make of it: its kind, rows, complaints and balance, as `hybrid data check` says."""
    row = await asyncio.to_thread(house(request).files.get, file_id, caller(request).id)
    if row["bytes"] > MAX_CHECKED:
        raise BadRequest(
            f"The file is larger than {MAX_CHECKED >> 20} MiB, more than is looked through here; `hybrid data check` "
            "does it, and a job looks before it trains.",
            param="file_id",
        )
    path = await asyncio.to_thread(house(request).files.path, file_id, caller(request).id)
    return JSONResponse((await asyncio.to_thread(check_upload, path, row["filename"])).wire())


@router.delete("/v1/files/{file_id}")
async def delete(request: Request, file_id: str) -> Response:
    """Deletes a file, and takes it out of every corpus; a job that was made from it keeps what it needs."""
    here, who = house(request), caller(request).id

    def gone() -> None:
        here.files.get(file_id, who)
        here.attachments.forget(file_id)
        here.files.delete(file_id, who)

    await asyncio.to_thread(gone)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})
