"""Our end of the load: a process that asks servers as it is ordered (`generator.py`), one order at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.bench.serving import last_words
from hybrid.errors import SetupError
from hybrid.types import JSON

#: what is asked of every server
PATH = "/v1/chat/completions"
#: bytes in one line of an answer: a latency for each of some hundred thousand requests
_LINE = 16 << 20


class Load:
    """The process. `loading` starts one."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    async def ask(self, url: str, headers: Mapping[str, str], **order: Any) -> JSON:
        """What came of an order. Raises SetupError with the last words of a process that ended."""
        assert self._process.stdin  # noqa: S101  # both were asked for
        assert self._process.stdout  # noqa: S101
        with contextlib.suppress(ConnectionError):  # told below, with the reason
            self._process.stdin.write(json.dumps({"url": url, "headers": dict(headers), **order}).encode() + b"\n")
            await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise SetupError(f"The load generator ended before its work was done. It said: {last_words(self._log)}")
        told: JSON = json.loads(line)
        return told


@contextlib.asynccontextmanager
async def loading(log: Path) -> AsyncIterator[Load]:
    """The process, for as long as the block takes; what it says goes to `log`."""
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hybrid.bench.generator",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=words, limit=_LINE,
        )  # fmt: skip
    try:
        yield Load(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
