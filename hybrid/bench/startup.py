"""`startup`: `hybrid serve` in a home of its own, from the command to the first token, more than once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from hybrid import reach
from hybrid.bench.result import Goal, Result
from hybrid.errors import NotReady
from hybrid.rooms import Home
from hybrid.settings import Settings

GOAL_S = 100.0
POLL_S = 0.1
#: beyond the drain: the engine's own end
LEAVE_S = 30.0


async def measure(settings: Settings, *, repeat: int, ui: bool, progress: Callable[[str, int, int], None]) -> Result:
    """Starts and stops a server `repeat` times in one temporary home, with this home's settings and model cache.

    Raises NotReady, with the server's last words, when a start ends early or takes longer than the engine may.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        home = Home(Path(folder))
        if (settings.home / "hybrid.toml").is_file():
            shutil.copy(settings.home / "hybrid.toml", home.root)
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


async def _one_start(settings: Settings, home: Home, ui: bool) -> dict[str, float]:
    began = time.monotonic()
    took: dict[str, float] = {}
    async with _serving(settings, home, ui) as process:
        async with asyncio.timeout(settings.engine.start_timeout_s):
            for name in ("livez", "readyz"):
                await _until_ok(process, home, f"/{name}")
                took[f"{name}_s"] = _since(began)
            await _first_token(home)
            took["first_token_s"] = _since(began)
        stopping = time.monotonic()
    return took | {"stop_s": _since(stopping)}


@contextlib.asynccontextmanager
async def _serving(settings: Settings, home: Home, ui: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process of a server; told to leave at the end, and waited for."""
    argv = [sys.executable, "-m", "hybrid.cli", "serve", "--no-quickstart", "--host", "127.0.0.1", "--port", "0"]
    with _log(home).open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            "--ui" if ui else "--no-ui",
            stdout=log,
            stderr=log,
            env={**os.environ, "HYBRID_HOME": str(home.root), "HYBRID_CACHE": str(settings.cache.resolve())},
        )
    try:
        yield process
    except TimeoutError as error:
        limit = settings.engine.start_timeout_s
        raise NotReady(f"The server is not ready after {limit:.0f} s. It said: {_last_words(home)}") from error
    finally:
        await _stop(process, settings.server.drain_s + LEAVE_S)


async def _stop(process: asyncio.subprocess.Process, patience_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), patience_s)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _until_ok(process: asyncio.subprocess.Process, home: Home, path: str) -> None:
    while True:
        if process.returncode is not None:
            raise NotReady(f"The server ended with {process.returncode} before it was ready: {_last_words(home)}")
        server = reach.find(home.server_file)
        if server is not None:
            with contextlib.suppress(NotReady):
                async with server.connect() as session, session.get(path) as response:
                    if response.status == 200:
                        return
        await asyncio.sleep(POLL_S)


async def _first_token(home: Home) -> None:
    server = reach.find(home.server_file)
    if server is None:
        raise NotReady(f"The server went away as soon as it was ready: {_last_words(home)}")
    body: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with (
        server.connect() as session,
        session.post("/v1/chat/completions", json={**body, "max_tokens": 1}) as response,
    ):
        await _content(response)


async def _content(response: aiohttp.ClientResponse) -> None:
    """Returns at the first line of a stream: the server sends nothing before there is a token."""
    if response.status != 200:
        await reach.answer(response)
    await response.content.readline()


def _since(began: float) -> float:
    return round(time.monotonic() - began, 2)


def _log(home: Home) -> Path:
    return home.root / "serve.log"


def _last_words(home: Home) -> str:
    return _log(home).read_text(encoding="utf-8", errors="replace").strip()[-500:]
