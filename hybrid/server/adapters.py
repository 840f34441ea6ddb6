"""What a name means: vLLM's own verbs, through preflight and canary, and promote, rollback, retire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest
from hybrid.server.access import require_admin
from hybrid.server.body import kind_of, read_json
from hybrid.server.chat import body_schema
from hybrid.server.house import house
from hybrid.types import JSON

router = APIRouter(tags=["adapters"])
_NAME = {"type": "string", "description": "NAME or NAME@VERSION"}
_VERSION = {"type": "integer", "minimum": 1}
_REVISION = {
    "type": "integer",
    "minimum": 0,
    "description": "`aliases` of /v1/status as you saw it: when the name has moved since, the answer is 409",
}
_PATH = {"type": "string", "description": "a PEFT folder to copy into the store; without it NAME is published already"}


@router.post("/v1/load_lora_adapter", openapi_extra=body_schema(lora_name=_NAME, lora_path=_PATH))
async def load(request: Request) -> Response:
    """Takes an adapter through preflight and canary; it answers when this returns."""
    require_admin(request)
    body = await read_json(request)
    name, path = _text(body, "lora_name"), body.get("lora_path")
    version = await house(request).gateway.load_adapter(name, Path(_text(body, "lora_path")) if path else None)
    message = f"Success: LoRA adapter '{version.name}' added successfully as {version.id}."
    return JSONResponse({"status": "ok", "message": message, "adapter": version.name, "version": version.version})


@router.post("/v1/unload_lora_adapter", openapi_extra=body_schema(lora_name=_NAME))
async def unload(request: Request) -> Response:
    """Retires an adapter; answers begun on it end on it, and its files stay."""
    require_admin(request)
    name = _text(await read_json(request), "lora_name")
    await house(request).gateway.unload_adapter(name)
    return JSONResponse({"status": "ok", "message": f"Success: LoRA adapter '{name}' removed successfully."})


@router.post("/v1/adapters/{name}/promote", openapi_extra=body_schema(version=_VERSION, revision=_REVISION))
async def promote(request: Request, name: str) -> Response:
    """Points the bare name at a version; answers begun on the one before end on it."""
    require_admin(request)
    body = await read_json(request)
    version = _number(body, "version", 1)
    revision = await house(request).gateway.promote_adapter(name, version, _revision(body))
    return JSONResponse({"adapter": name, "version": version, "revision": revision})


@router.post("/v1/adapters/{name}/rollback", openapi_extra=body_schema(revision=_REVISION))
async def rollback(request: Request, name: str) -> Response:
    """Points the bare name back at the version that had it before."""
    require_admin(request)
    version, revision = await house(request).gateway.rollback_adapter(name, _revision(await read_json(request)))
    return JSONResponse({"adapter": name, "version": version, "revision": revision})


@router.post("/v1/adapters/{name}/retire", openapi_extra=body_schema(version=_VERSION))
async def retire(request: Request, name: str) -> Response:
    """Takes a version out of service; its files stay."""
    require_admin(request)
    version = _number(await read_json(request), "version", 1)
    await house(request).gateway.unload_adapter(f"{name}@{version}")
    return JSONResponse({"adapter": name, "version": version, "state": "retired"})


def _revision(body: JSON) -> int | None:
    return None if body.get("revision") is None else _number(body, "revision", 0)


def _number(body: JSON, field: str, least: int) -> int:
    value: Any = body.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadRequest(f"`{field}` is a whole number from {least}, not {kind_of(value)}.", param=field)
    return int(value)


def _text(body: JSON, field: str) -> str:
    value: Any = body.get(field)
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadRequest(f"`{field}` is a string that is not empty, not {kind_of(value)}.", param=field)
    return value
