"""A request's body as JSON, within bounds that hold before and after parsing.

Parsing runs in C and holds the event loop: what would make it long is counted in the bytes first.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from hybrid.errors import BadRequest
from hybrid.types import JSON

MAX_DEPTH = 64
MAX_NODES = 200_000  # brackets and commas: about 20 ms of parsing


async def read_json(request: Request) -> JSON:
    """The body as one JSON object. Raises BadRequest (and TooLarge, from the door)."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        # a form or text/plain is what a foreign web page can send to a local server without being asked
        raise BadRequest(f"Send JSON with `Content-Type: application/json`; this came as {kind[:60]!r}.")
    return parse(await request.body())


def parse(raw: bytes) -> JSON:
    """`raw` as one JSON object: UTF-8, finite numbers, nested at most MAX_DEPTH deep. Raises BadRequest."""
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_NODES:
        raise BadRequest(f"The body holds more than {MAX_NODES:,} values.")
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of 5,000 digits
        raise BadRequest(f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise BadRequest(f"The body must be a JSON object, not {kind_of(value)}.")
    _check(value)
    if b"\\u" in raw:
        _check_text(value)
    return value


def kind_of(value: Any) -> str:
    """What JSON calls the type of `value`, with its article."""
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "an integer", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check(value: JSON) -> None:
    """Depth and finiteness, level by level (`1e999` parses to infinity)."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            below.extend(node.values() if isinstance(node, dict) else node)
        if any(isinstance(node, float) and not math.isfinite(node) for node in below):
            raise BadRequest("A number in the body is too large to be one.")
        level = [node for node in below if isinstance(node, (dict, list))]
        if not level:
            return
    raise BadRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _check_text(value: JSON) -> None:
    """Half a surrogate pair is no text: nothing behind us could encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequest(
            "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
        ) from None
