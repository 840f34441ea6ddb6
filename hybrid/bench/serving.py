"""A server of its own: `hybrid serve` as a user starts it, in a home that nothing else uses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from hybrid import reach
from hybrid.errors import NotReady
from hybrid.rooms import Home
from hybrid.settings import Settings

POLL_S = 0.1
#: beyond the drain: the engine's own end
LEAVE_S = 30.0


def new_home(settings: Settings, folder: Path) -> Home:
    """A home in an empty folder, with the `hybrid.toml` of this one."""
    home = Home(folder)
    if (settings.home / "hybrid.toml").is_file():
        shutil.copy(settings.home / "hybrid.toml", home.root)
    return home


@contextlib.asynccontextmanager
async def serving(settings: Settings, home: Home, *flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process of a server with this home's model cache; told to leave at the end, and waited for.

    Raises NotReady, with the server's last words, for a TimeoutError of the block: it was too slow.
    """
    argv = [sys.executable, "-m", "hybrid.cli", "serve", "--no-quickstart", "--host", "127.0.0.1", "--port", "0"]
    with _log(home).open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *argv,
            *flags,
            stdout=log,
            stderr=log,
            env={**os.environ, "HYBRID_HOME": str(home.root), "HYBRID_CACHE": str(settings.cache.resolve())},
        )
    try:
        yield process
    except TimeoutError as error:
        limit = settings.engine.start_timeout_s
        raise NotReady(f"The server is not ready after {limit:.0f} s. It said: {last_words(_log(home))}") from error
    finally:
        await _stop(process, settings.server.drain_s + LEAVE_S)


async def until_ok(process: asyncio.subprocess.Process, home: Home, path: str) -> reach.Server:
    """The server, once `path` answers 200. Raises NotReady when its process ends before."""
    while True:
        if process.returncode is not None:
            raise NotReady(f"The server ended with {process.returncode} before it was ready: {last_words(_log(home))}")
        server = reach.find(home.server_file)
        if server is not None:
            with contextlib.suppress(NotReady):
                async with server.connect() as session, session.get(path) as response:
                    if response.status == 200:
                        return server
        await asyncio.sleep(POLL_S)


async def _stop(process: asyncio.subprocess.Process, patience_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), patience_s)
    except TimeoutError:
        process.kill()
        await process.wait()


def _log(home: Home) -> Path:
    return home.root / "serve.log"


def last_words(log: Path) -> str:
    """The end of what a process wrote to its log."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-800:]
