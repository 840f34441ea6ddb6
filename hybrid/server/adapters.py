"""vLLM's own verbs for adapters, through preflight and canary."""

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


def _text(body: JSON, field: str) -> str:
    value: Any = body.get(field)
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadRequest(f"`{field}` is a string that is not empty, not {kind_of(value)}.", param=field)
    return value
