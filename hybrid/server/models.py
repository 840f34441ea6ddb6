"""`/v1/models` and `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest, ModelNotFound
from hybrid.server.access import caller, require_admin
from hybrid.server.body import kind_of, read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house
from hybrid.types import JSON

router = APIRouter(tags=["models"])

MAX_INPUTS = 2_048
MAX_INPUT_CHARS = 100_000


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """Everything that can be asked for by name."""
    return JSONResponse({"object": "list", "data": await asyncio.to_thread(_models, request)})


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """One of them."""
    for model in await asyncio.to_thread(_models, request):
        if model["id"] == name:
            return JSONResponse(model)
    raise _unknown(name)


def _models(request: Request) -> list[JSON]:
    return house(request).gateway.models(caller(request).id)


@router.delete("/v1/models/{name:path}")
async def delete_model(request: Request, name: str) -> Response:
    """Retires an adapter; what is built in cannot be deleted."""
    require_admin(request)
    gateway = house(request).gateway
    arm = gateway.names.arm(name)
    if arm is None or arm.strategy != "adapter" or arm.adapter is None:
        raise BadRequest(f"{name[:80]!r} is no adapter; only adapters can be deleted.", param="model")
    await gateway.unload_adapter(arm.adapter)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


@router.post(
    "/v1/embeddings",
    openapi_extra=body_schema(model={"type": "string"}, input={"type": "string"}, encoding_format={"type": "string"}),
)
async def embeddings(request: Request) -> Response:
    """The embedder's unit vectors, as floats or base64 of float32."""
    here = house(request)
    body = await read_json(request)
    texts = _inputs(body.get("input"))
    model = _embedder(body.get("model"), here.settings.embedder)
    form = _format(body.get("encoding_format"))
    vectors = await here.gateway.embed(texts)
    if body.get("dimensions") not in (None, vectors.shape[1]):
        raise BadRequest(f"{model} has {vectors.shape[1]} dimensions and no others.", param="dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": v.tolist() if form == "float" else _base64(v.tobytes())}
        for i, v in enumerate(vectors.astype("<f4"))
    ]
    words = sum(len(text.split()) for text in texts)  # the embedder does not tell its tokens
    return JSONResponse(
        {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": words, "total_tokens": words}}
    )


def _inputs(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_INPUTS:
        raise BadRequest(f"`input` is a text or a list of 1 to {MAX_INPUTS:,} texts.", param="input")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise BadRequest(f"`input` holds texts that are not empty, not {kind_of(text)}.", param="input")
        if len(text) > MAX_INPUT_CHARS:
            raise BadRequest(f"A text of `input` is longer than {MAX_INPUT_CHARS:,} characters.", param="input")
    return texts


def _embedder(asked: Any, source: str) -> str:
    """The embedder's public name, when `asked` is one of its names. Raises ModelNotFound."""
    name = Path(source).name
    if asked not in (None, name, source, "embedder", "auto"):
        raise ModelNotFound(f"{str(asked)[:80]!r} does not embed here; the embedder is {name!r}.", param="model")
    return name


def _format(value: Any) -> Literal["float", "base64"]:
    if value in (None, "float"):
        return "float"
    if value == "base64":
        return "base64"
    raise BadRequest("`encoding_format` is float or base64.", param="encoding_format")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _unknown(name: str) -> ModelNotFound:
    return ModelNotFound(f"There is no model {name[:80]!r}; GET /v1/models lists them.", param="model")
