"""How a command finds the server that runs in its home."""

from __future__ import annotations

import json
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

    async def post(self, path: str, body: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
        """POSTs JSON. Raises EngineRejected with the server's own message, NotReady when it is gone."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        headers = {"authorization": f"Bearer {self.token}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.post(self.url + path, json=body) as response,
            ):
                answer: dict[str, Any] = await response.json(content_type=None)
                if response.status >= 400:
                    error = answer.get("error", {})
                    raise EngineRejected(
                        str(error.get("message", answer)), status=response.status, code=str(error.get("code", "error"))
                    )
                return answer
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            raise NotReady(f"The server at {self.url} (pid {self.pid}) does not answer; see .hybrid/logs/.") from error


def find(server_file: Path) -> Server | None:
    """The server that runs in this home, or None."""
    try:
        found = json.loads(server_file.read_text())
        server = Server(found["url"], int(found["pid"]), found["token"])
    except (OSError, ValueError, KeyError):
        return None
    return server if psutil.pid_exists(server.pid) else None
