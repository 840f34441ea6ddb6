"""`startup`: `hybrid serve` in a home of its own, from the command to the first token, more than once."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hybrid import reach
from hybrid.bench.result import Goal, Result
from hybrid.bench.serving import new_home, serving, until_ok
from hybrid.rooms import Home
from hybrid.settings import Settings

GOAL_S = 40.0


async def measure(settings: Settings, *, repeat: int, ui: bool, progress: Callable[[str, int, int], None]) -> Result:
    """Starts and stops a server `repeat` times in one temporary home, with this home's settings and model cache.

    Raises NotReady, with the server's last words, when a start ends early or takes longer than the engine may.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        home = new_home(settings, Path(folder))
        for number in range(1, repeat + 1):
            progress(f"start {number}", number - 1, repeat)
            rows.append({"start": number, **await _one_start(settings, home, ui)})
    later = [row["readyz_s"] for row in rows[1:]] or [rows[0]["readyz_s"]]
    return Result(
        "startup",
        tuple(rows),
        {"ui": ui, "engine": settings.engine.kind, "model": Path(settings.model).name},
        (Goal("slowest start after the first until /readyz, s", max(later), GOAL_S),),
    )


async def _one_start(settings: Settings, home: Home, ui: bool) -> dict[str, Any]:
    began = time.monotonic()
    took: dict[str, Any] = {}
    async with serving(settings, home, "--ui" if ui else "--no-ui") as process:
        async with asyncio.timeout(settings.engine.start_timeout_s):
            for name in ("livez", "readyz"):
                server = await until_ok(process, home, f"/{name}")
                took[f"{name}_s"] = _since(began)
            await _first_token(server)
            took["first_token_s"] = _since(began)
        took["engine_begun_s"] = _engine_begun(home, process.pid)
        stopping = time.monotonic()
    return took | {"stop_s": _since(stopping)}


async def _first_token(server: reach.Server) -> None:
    """Returns at the first line of a stream: the server sends nothing before there is a token."""
    body: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with (
        server.connect() as session,
        session.post("/v1/chat/completions", json={**body, "max_tokens": 1}) as response,
    ):
        if response.status != 200:
            await reach.answer(response)
        await response.content.readline()


def _engine_begun(home: Home, server: int) -> float | None:
    """Seconds from the beginning of the server's process to that of the engine's; None for one that runs elsewhere."""
    try:
        record = json.loads((home.hidden / "engine.json").read_bytes())
    except OSError:
        return None
    born: float = record["processes"][0][1]
    return round(born - psutil.Process(server).create_time(), 2)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 2)
