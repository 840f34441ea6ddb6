"""What stands before the face: what the page may load, and what of Gradio's own routes nobody needs here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: the page loads from its own server alone: an image in an answer cannot carry a conversation elsewhere.
#: Gradio builds its components from inline scripts and templates, hence the two `unsafe` words.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
#: reading files, fetching addresses, editing code: this page does none of it
_CLOSED = tuple(
    f"/gradio_api/{name}"
    for name in (
        "file", "proxy", "stream", "custom_component", "component_server", "process_recording", "deep_link",
        "run-history", "vibe", "undo-vibe", "dev",
    )
)  # fmt: skip
#: training files come in here, posted by the page itself; what was uploaded is sent on, and never read back
_UPLOAD, _PROGRESS = "/gradio_api/upload", "/gradio_api/upload_progress"
#: an API path that no route answered is the API's 404, not the page's
_API = ("/v1/", "/metrics", "/livez", "/readyz")


class Guard:
    """An ASGI application around Gradio's."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 404 for closed and for API paths; else Gradio answers, under the policy."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(_CLOSED + _API) or not _is_ours(scope):
            raise HTTPException(404)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)


def _is_ours(scope: Scope) -> bool:
    """Whether an upload is posted by this page, and not by another that is open in the same browser."""
    path = scope["path"]
    if not path.startswith(_UPLOAD) or path == _PROGRESS:
        return True
    site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
    return path == _UPLOAD and scope["method"] == "POST" and site in (b"same-origin", b"none")
