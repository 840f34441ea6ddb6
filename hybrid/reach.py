"""How a program finds the server that runs in its home, and talks to it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from hybrid.errors import EngineRejected, NotReady


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of this home: where it is and the key that its owner holds."""

    url: str
    pid: int
    token: str

    @contextlib.asynccontextmanager
    async def connect(self, timeout_s: float = 600) -> AsyncIterator[aiohttp.ClientSession]:
        """A session whose paths begin at the server; `timeout_s` a request. Raises NotReady when the server is gone."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        headers = {"authorization": f"Bearer {self.token}"}
        lines = aiohttp.TCPConnector(limit=0)
        try:
            async with aiohttp.ClientSession(self.url, connector=lines, timeout=timeout, headers=headers) as session:
                yield session
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise NotReady(f"The server at {self.url} (pid {self.pid}) does not answer; see .hybrid/logs/.") from error

    async def post(self, path: str, body: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """POSTs JSON. Raises EngineRejected with the server's own message, NotReady when it is gone."""
        async with self.connect(timeout_s) as session, session.post(path, json=body) as response:
            return await answer(response)


async def answer(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The JSON of a response. Raises EngineRejected with the server's own message."""
    words = await response.text()
    try:
        body: dict[str, Any] = json.loads(words)
    except ValueError as error:
        said = f"{response.url} answered {response.status} with what is no JSON: {words[:200]}"
        raise EngineRejected(said, status=response.status) from error
    if response.status >= 400:
        told = body.get("error", {})
        raise EngineRejected(
            str(told.get("message", body)), status=response.status, code=str(told.get("code", "error"))
        )
    return body


def find(server_file: Path) -> Server | None:
    """The server that runs in this home, or None."""
    try:
        found = json.loads(server_file.read_text())
        server = Server(found["url"], int(found["pid"]), found["token"])
    except (OSError, ValueError, KeyError):
        return None
    return server if psutil.pid_exists(server.pid) else None
