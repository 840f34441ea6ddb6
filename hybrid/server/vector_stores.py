"""`/v1/vector_stores`, as OpenAI: a vector store is a corpus, and `rag:NAME` is who answers from it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest, NotFound
from hybrid.knowledge.filters import Matches, read_filter
from hybrid.lifecycle.attachments import Wanted
from hybrid.lifecycle.corpora import own_groups
from hybrid.server import vector_body as read
from hybrid.server.access import caller
from hybrid.server.body import read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import House, house
from hybrid.training.wire import page
from hybrid.types import JSON
from hybrid.types.passage import Passage
from hybrid.types.rights import Rights

router = APIRouter(tags=["vector stores"])
STORES = "/v1/vector_stores"
STORE = STORES + "/{store_id}"
Limit = Annotated[int, Query(ge=1, le=100)]
Order = Literal["asc", "desc"]


def rights_of(request: Request) -> Rights:
    """What the caller may see at this moment."""
    return house(request).gateway.keys.rights(caller(request).id)


def wanted(here: House, who: str, file_id: str, body: JSON, rights: Rights) -> Wanted:
    """A file of the caller's as it is to be attached. Raises NotFound, BadRequest, Forbidden."""
    row = here.files.get(file_id, who)
    groups = own_groups(read.groups(body) or (), rights)
    return Wanted(file_id, row["filename"], read.attributes(body), groups, read.chunking(body))


def store_told(here: House, row: JSON) -> JSON:
    """A corpus as the API tells it: how many passages, whether it must be rebuilt, and how far that is."""
    info = here.corpora.info(row)
    more = {
        "passages": info.passages if info else 0,
        "stage": info.stage if info else "meaning",
        "stale": info is not None and here.gateway.library.stale(row["name"]),
        "rebuild": here.rebuilds.told(row),
    }
    return read.store_object(row, here.attachments.counts(row), info.bytes if info else 0, more)


@router.post(STORES, openapi_extra=body_schema(name={"type": "string"}, file_ids={"type": "array"}))
async def create(request: Request) -> Response:
    """A new corpus, with the files to read into it."""
    here, body, rights, who = house(request), await read_json(request), rights_of(request), caller(request).id

    def made() -> JSON:
        files = [wanted(here, who, file_id, {"chunking_strategy": body.get("chunking_strategy")}, rights)
                 for file_id in read.file_ids(body)]  # fmt: skip
        row = here.corpora.create(
            rights,
            read.text(body, "name", read.MAX_NAME),
            groups=read.groups(body) or (),
            notes=read.notes(body),
            description=read.text(body, "description", read.MAX_DESCRIPTION) or "",
            days=read.days(body),
        )
        if files:
            here.attachments.attach(row, files, who)
        return store_told(here, row)

    return JSONResponse(await asyncio.to_thread(made))


@router.get(STORES)
async def list_stores(
    request: Request, after: str | None = None, before: str | None = None, limit: Limit = 20, order: Order = "desc"
) -> Response:
    """The corpora that the caller sees, whoever made them."""
    here, rights = house(request), rights_of(request)

    def listed() -> JSON:
        rows = here.corpora.listed(rights)
        found, more = read.paged(rows, after=after, before=before, limit=limit, newest=order == "desc")
        return page([store_told(here, row) for row in found], more)

    return JSONResponse(await asyncio.to_thread(listed))


@router.get(STORE)
async def retrieve(request: Request, store_id: str) -> Response:
    """One of them."""
    here, rights = house(request), rights_of(request)
    return JSONResponse(await asyncio.to_thread(lambda: store_told(here, here.corpora.get(store_id, rights))))


@router.post(STORE, openapi_extra=body_schema(name={"type": "string"}, metadata={"type": "object"}))
async def modify(request: Request, store_id: str) -> Response:
    """Changes its name, metadata, expiry or groups."""
    here, body, rights = house(request), await read_json(request), rights_of(request)

    def changed() -> JSON:
        row = here.corpora.writable(store_id, rights)
        values: dict[str, Any] = {}
        if body.get("metadata") is not None:
            values["notes"] = read.notes(body)
        if "expires_after" in body:
            values["days"] = read.days(body)
        if (groups := read.groups(body)) is not None:
            values["groups"] = groups
        name = read.text(body, "name", read.MAX_NAME)
        row = here.corpora.change(row, rights, **values)
        return store_told(here, here.corpora.rename(row, name) if name else row)

    return JSONResponse(await asyncio.to_thread(changed))


@router.delete(STORE)
async def delete(request: Request, store_id: str) -> Response:
    """Takes a corpus away with its passages; the uploads stay."""
    here, rights = house(request), rights_of(request)

    def gone() -> None:
        row = here.corpora.writable(store_id, rights)
        here.rebuilds.cancel(row)  # it holds the corpus's lock
        here.corpora.delete(row)

    await asyncio.to_thread(gone)
    return JSONResponse({"id": store_id, "object": "vector_store.deleted", "deleted": True})


@router.post(STORE + "/search", openapi_extra=body_schema(query={"type": "string"}, filters={"type": "object"}))
async def search(request: Request, store_id: str) -> Response:
    """The passages nearest to a query among those that the caller may see and whose attributes pass the filters."""
    here, body, rights = house(request), await read_json(request), rights_of(request)
    asked, limit, least = read.queries(body), read.results(body), read.threshold(body)
    matches = read_filter(body["filters"]) if body.get("filters") is not None else None
    if not isinstance(body.get("rewrite_query") or False, bool):
        raise BadRequest("`rewrite_query` is true or false.", param="rewrite_query")

    def found() -> list[JSON]:
        row = here.corpora.get(store_id, rights)
        here.corpora.touch(row)
        best = _best(here, row["name"], asked, limit, rights, matches)
        known = [(hit, _attributes(here, hit)) for hit in best if hit.score >= least]
        return [read.result_object(hit, told) for hit, told in known if told is not None]

    data = await asyncio.to_thread(found)
    told = {"object": "vector_store.search_results.page", "search_query": asked, "data": data}
    return JSONResponse({**told, "has_more": False, "next_page": None})


def _best(
    here: House, corpus: str, asked: list[str], limit: int, rights: Rights, matches: Matches | None
) -> list[Passage]:
    """The best passages over all queries: each at the best rank that a query gives it, with its best score."""
    best: dict[tuple[str, str], tuple[int, Passage]] = {}
    for query in asked:
        try:
            hits = here.gateway.library.search(corpus, query, limit, every_id=True, rights=rights, matches=matches)
        except NotFound:
            return []  # nothing was put into it yet
        for rank, hit in enumerate(hits):
            place, known = best.get((hit.document, hit.id), (rank, hit))
            best[hit.document, hit.id] = min(place, rank), max(known, hit, key=lambda one: one.score)
    ranked = sorted(best.values(), key=lambda found: (found[0], -found[1].score))
    return [hit for _, hit in ranked[:limit]]


def _attributes(here: House, hit: Passage) -> JSON | None:
    """Those of the document that the passage stands in; None where it was deleted since the passage was found."""
    try:
        return dict(here.gateway.library.document(hit.corpus, hit.document).about.attributes)
    except NotFound:
        return None
