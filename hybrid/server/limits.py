"""The door: pure ASGI, before any route. It names the request, checks key, headers, size and room, and counts.

It also watches the line: when a client goes away, whatever was being done for it is cancelled, on every API route,
streaming or not. Starlette alone notices only when the next byte is sent, which for an answer in the making is never.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid.errors import (
    BadRequest,
    Draining,
    Forbidden,
    HeadersTooLarge,
    HybridError,
    Overloaded,
    RateLimited,
    TooLarge,
)
from hybrid.evaluation.asking import PURPOSE
from hybrid.keys import ID
from hybrid.server import errors
from hybrid.server.access import OPEN, Access, challenge
from hybrid.server.house import Traffic
from hybrid.server.metrics import Metrics
from hybrid.settings import ServerSettings

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: answered while the server leaves
_ALWAYS = OPEN | {"/metrics"}
#: takes files, which are written to disk as they come, and so may be large
_UPLOADS = "/v1/files"
_ENVELOPE = 64 << 10  # of a form around its file
_GONE = 499  # nginx's word for: the client closed the request


class Visit:
    """One request on its way through: its id, what was sent of its response, and whether its client is still there."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.headers = dict(scope["headers"])
        asked = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = asked if _ID.fullmatch(asked) else f"req_{uuid.uuid4().hex}"
        self.status = 0
        self.complete = False
        self.gone = False
        self._send = send

    async def send(self, message: Message) -> None:
        """Passes a message on; the start of the response gets the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.id.encode())]
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        await self._send(message)


class Inbox:
    """Reads ahead by one message, so that a disconnect is seen while the app works. Counts the bytes of the body."""

    def __init__(self, receive: Receive, visit: Visit, limit: int, setting: str) -> None:
        self._receive = receive
        self._visit = visit
        self._left = limit
        self._limit = limit
        self._setting = setting
        self._queue: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)  # one: backpressure reaches the socket

    async def watch(self, worker: asyncio.Task[None]) -> None:
        """Feeds `receive` until the client goes; then cancels the worker, unless its answer is complete."""
        while (message := await self._receive())["type"] != "http.disconnect":
            await self._queue.put(message)
        if not self._visit.complete:
            self._visit.gone = True
            worker.cancel()

    async def receive(self) -> Message:
        """The app's `receive`. Raises TooLarge when a body outgrows the limit, said or unsaid."""
        message = await self._queue.get()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooLarge(_too_large(self._limit, self._setting))
        return message


class Door:
    """The outermost middleware. Refuses with the errors of INTERFACES; routes never see what it refused."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, access: Access, metrics: Metrics, traffic: Traffic
    ) -> None:
        self._app = app
        self._settings = settings
        self._access = access
        self._metrics = metrics
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._visit(scope, receive, Visit(scope, send))

    async def _visit(self, scope: Scope, receive: Receive, visit: Visit) -> None:
        scope["hybrid.id"], scope["hybrid.began"] = visit.id, time.perf_counter()
        try:
            self._admit(scope, visit)
            await self._pass(scope, receive, visit)
        except HybridError as error:  # the app answers its own errors: this one is the door's
            self._metrics.rejected.labels(error.code).inc()
            await self._refuse(scope, receive, visit, error)
        except Exception as error:
            if visit.status:
                raise
            await self._refuse(scope, receive, visit, errors.known(error))
        finally:
            self._metrics.requests.labels(_route(scope), str(_GONE if visit.gone else visit.status)).inc()

    def _admit(self, scope: Scope, visit: Visit) -> None:
        """Raises what keeps this request out; sets `scope["hybrid.caller"]` otherwise. No byte of the body is read."""
        s, path, headers = self._settings, scope["path"], scope["headers"]
        if len(headers) > s.max_header_count or sum(len(k) + len(v) for k, v in headers) > s.max_header_bytes:
            raise HeadersTooLarge(f"More than {s.max_header_count} headers or {s.max_header_bytes} bytes of them.")
        if path not in OPEN:
            purpose = visit.headers.get(PURPOSE.encode(), b"")
            scope["hybrid.caller"] = self._access.caller(visit.headers.get(b"authorization"), purpose)
        if self._traffic.draining and path not in _ALWAYS:
            raise Draining("The server is shutting down; try again in a few seconds.")
        if not path.startswith("/v1/"):
            return
        if scope["method"] != "GET" and visit.headers.get(b"sec-fetch-site") == b"cross-site":
            # a form on a stranger's page may post to a loopback server, and needs nobody's leave for it
            raise Forbidden(
                "A page of another site cannot use this server; call it from a program, or from its own page."
            )
        if visit.headers.get(b"content-encoding", b"identity") != b"identity":
            raise BadRequest("Send the body as it is: compressed bodies are not unpacked.", param="content-encoding")
        limit, setting = self._room(path)
        if _length(visit.headers.get(b"content-length")) > limit:
            raise TooLarge(_too_large(limit, setting))
        self._seat(scope["hybrid.caller"].id)

    def _seat(self, caller: str) -> None:
        """Raises RateLimited for a key that has all the places it may have, Overloaded when there is none at all."""
        one, all_ = self._settings.max_inflight_per_key, self._settings.max_inflight
        if caller.startswith(ID) and self._traffic.of(caller) >= one:
            raise RateLimited(f"This key has {one} requests in flight, as many as it may; try again in a second.")
        if self._traffic.inflight >= all_:
            raise Overloaded(f"All {all_} places are taken; try again in a second.")

    async def _pass(self, scope: Scope, receive: Receive, visit: Visit) -> None:
        """Runs the app; on API routes the line is watched meanwhile."""
        if not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, visit.send)
            return
        worker = asyncio.current_task()
        assert worker is not None  # noqa: S101 - a coroutine that runs has a task; for the type checker
        inbox = Inbox(receive, visit, *self._room(scope["path"]))
        watcher = asyncio.create_task(inbox.watch(worker))
        caller: str = scope["hybrid.caller"].id
        self._count(+1, caller)
        try:
            await self._app(scope, inbox.receive, visit.send)
        except asyncio.CancelledError:
            if not visit.gone:
                raise
            worker.uncancel()
        finally:
            watcher.cancel()
            self._count(-1, caller)

    def _room(self, path: str) -> tuple[int, str]:
        """How many bytes a body may have here, and the setting that says so."""
        if path == _UPLOADS:
            return self._settings.max_file_bytes + _ENVELOPE, "server.max_file_bytes"
        return self._settings.max_body_bytes, "server.max_body_bytes"

    def _count(self, change: int, caller: str) -> None:
        self._traffic.count(change, caller)
        self._metrics.inflight.set(self._traffic.inflight)

    async def _refuse(self, scope: Scope, receive: Receive, visit: Visit, error: HybridError) -> None:
        response = errors.response(error)
        if error.status == 401:
            response.headers.update(challenge(scope["path"]))
        with suppress(OSError):
            await response(scope, receive, visit.send)


def _route(scope: Scope) -> str:
    """The route's template, never the path: a bounded set."""
    if not scope["path"].startswith("/v1/") and scope["path"] not in _ALWAYS:
        return "ui"
    return getattr(scope.get("route"), "path", "none")


def _length(header: bytes | None) -> int:
    return int(header) if header and header.isdigit() else 0


def _too_large(limit: int, setting: str) -> str:
    return f"The body is larger than {limit:,} bytes; send less, or raise {setting}."
