"""What a corpus has besides OpenAI's routes: a map of its passages, and its vectors made again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import NotFound
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.plane import Plane
from hybrid.knowledge.search import Library
from hybrid.lifecycle.rebuilds import Rebuilder
from hybrid.server import vector_body as read
from hybrid.server.body import read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house
from hybrid.server.vector_stores import STORE, rights_of, store_told
from hybrid.types import JSON
from hybrid.types.passage import Passage

router = APIRouter(tags=["vector stores"])
#: so much of a passage says which one it is
_BEGINNING = 160
#: one map for the same passages
_SEED = 0


@router.post(STORE + "/map", openapi_extra=body_schema(query={"type": "string"}, limit={"type": "integer"}))
async def draw(request: Request, store_id: str) -> Response:
    """A sample of the passages that the caller may see, in the plane in which they differ most, and a query there."""
    here, body, rights = house(request), await read_json(request), rights_of(request)
    query, limit = read.text(body, "query", read.MAX_QUERY), read.spots(body)

    def drawn() -> JSON:
        library, row = here.gateway.library, here.corpora.get(store_id, rights)
        asked = library.embedder.embed_query(query) if query else None
        try:
            passages, vectors = library.sample(row["name"], limit, _SEED, rights=rights, near=asked)
        except NotFound:
            passages, vectors = (), np.empty((0, library.embedder.dim), np.float32)  # nothing was put into it yet
        return {"object": "vector_store.map", **_picture(passages, vectors, asked), **_groups(library, row, passages)}

    return JSONResponse(await asyncio.to_thread(drawn))


@router.post(STORE + "/rebuild")
async def rebuild(request: Request, store_id: str) -> Response:
    """Puts a corpus in line to have its vectors made again by the embedder of now, in the background."""
    return await _changed(request, store_id, Rebuilder.order)


@router.post(STORE + "/rebuild/cancel")
async def cancel(request: Request, store_id: str) -> Response:
    """Calls that off; the corpus is as it was."""
    return await _changed(request, store_id, Rebuilder.cancel)


async def _changed(request: Request, store_id: str, change: Callable[[Rebuilder, JSON], None]) -> Response:
    """Changes what is to be rebuilt, of a corpus that the caller may write to, and tells of that corpus."""
    here, rights = house(request), rights_of(request)

    def changed() -> JSON:
        row = here.corpora.writable(store_id, rights)
        change(here.rebuilds, row)
        return store_told(here, row)

    return JSONResponse(await asyncio.to_thread(changed))


def _picture(passages: tuple[Passage, ...], vectors: Vectors, asked: Vectors | None) -> JSON:
    """Where everything lies; `shares` is what of all difference the two axes show."""
    if not passages:
        return {"data": [], "query": None, "shares": [0.0, 0.0]}
    plane = Plane.of(vectors)
    spots = [_spot(passage, place) for passage, place in zip(passages, plane.places(vectors).tolist(), strict=True)]
    at = None if asked is None else plane.places(asked[None, :])[0].tolist()
    return {
        "data": spots,
        "query": None if at is None else {"x": round(at[0], 4), "y": round(at[1], 4)},
        "shares": [round(share, 4) for share in plane.shares],
    }


def _spot(passage: Passage, place: list[float]) -> JSON:
    return {
        "id": passage.id,
        "file_id": passage.document,
        "title": passage.title,
        "text": passage.text[:_BEGINNING],
        "x": round(place[0], 4),
        "y": round(place[1], 4),
    }


def _groups(library: Library, corpus: JSON, passages: tuple[Passage, ...]) -> JSON:
    """Which groups may read the documents of these passages; those that are for all are left out."""
    if not passages:
        return {"groups": {}}
    shown = {passage.document for passage in passages}
    listed = library.documents(corpus["name"])
    return {"groups": {one.id: list(one.about.groups) for one in listed if one.id in shown and one.about.groups}}
