"""Errors as OpenAI spells them: one function for routes and middleware alike."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from hybrid.errors import BadRequest, HybridError, NotFound

log = logging.getLogger("hybrid.server")


def known(error: BaseException) -> HybridError:
    """`error` as one of ours: what nobody foresaw is logged, and told without its details."""
    if isinstance(error, HybridError):
        return error
    log.error("unforeseen %s", type(error).__name__, exc_info=error)
    return HybridError("Something broke inside hybrid; the server's log has the details under this request id.")


def headers(error: HybridError) -> dict[str, str]:
    """`Retry-After` for what may pass, `x-should-retry: false` for what a retry cannot mend."""
    if error.retry_after is not None:
        return {"retry-after": str(math.ceil(error.retry_after))}
    return {"x-should-retry": "false"} if error.status < 500 else {}


def response(error: HybridError) -> Response:
    """The error as a JSON response with its status."""
    return JSONResponse(error.wire(), error.status, headers(error))


def frame(error: HybridError) -> bytes:
    """The error inside a stream that has begun: OpenAI clients raise on an `error` object."""
    return b"event: error\ndata: " + json.dumps(error.wire()).encode() + b"\n\n"


async def _ours(_request: Request, error: Exception) -> Response:
    return response(known(error))


async def _http(request: Request, error: Exception) -> Response:
    """No such route, or not with this method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    where = f"{request.method} {request.url.path[:80]!r}"
    ours: HybridError = NotFound(f"There is no {where} here; /docs lists the routes.")
    if status != 404:
        ours = BadRequest(f"{where} does not work like that; /docs lists the routes.")
        ours.status = status
    return response(ours)


async def _invalid(_request: Request, error: Exception) -> Response:
    """A query or path parameter of a wrong type."""
    details: list[dict[str, Any]] = list(error.errors()) if isinstance(error, RequestValidationError) else []
    first = details[0] if details else {"loc": ("?",), "msg": "invalid"}
    param = str(first["loc"][-1])
    return response(BadRequest(f"{param}: {first['msg']}.", param=param))


def install(app: FastAPI) -> None:
    """Every error of the app leaves it in OpenAI's shape."""
    app.add_exception_handler(HybridError, _ours)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
