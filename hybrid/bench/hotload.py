"""`hotload`: adapters are published, as another process would, while streams run; when does each answer?"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hybrid import reach
from hybrid.adapters.adopt import copy_adapter
from hybrid.adapters.listing import SERVABLE, AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.bench.result import Goal, Result
from hybrid.errors import EngineRejected, EngineTimeout, HybridError, NotFound

TOKENS = 200
POLL_S = 0.05
#: a stream that says nothing for longer has stalled
STALL_S = 10.0
#: an adapter that does not answer by then never will
TIMEOUT_S = 60.0
GOAL_S = 3.0
#: what the copy gets anew
_OWN = ("name", "version", "sha256", "created")


@dataclass(slots=True)
class Tally:
    """What became of the streams."""

    finished: int = 0
    failed: int = 0
    stalled: int = 0
    longest_gap_s: float = 0.0
    reasons: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Counts a stream that broke, and keeps the first reasons."""
        self.failed += 1
        self.reasons = [*self.reasons, reason[:200]][:5]


async def measure(
    server: reach.Server,
    store: AdapterStore,
    *,
    adapter: str | None,
    streams: int,
    repeat: int,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Publishes a copy of `adapter` (the newest that serves, without one) `repeat` times beside `streams` streams.

    The copies are retired and their folders removed at the end. Raises NotFound without an adapter, EngineTimeout
    when a copy never answers, and the server's errors.
    """
    source = _source(store, adapter)
    tally, stop, seconds = Tally(), asyncio.Event(), []
    published: list[AdapterVersion] = []
    async with server.connect() as session:
        models = ("base", source.id)
        begun = [asyncio.Event() for _ in range(streams)]
        running = [
            asyncio.create_task(_keep_streaming(session, _body(models[i % 2], i), tally, begun[i], stop))
            for i in range(streams)
        ]
        try:
            await asyncio.gather(*(event.wait() for event in begun))
            for done in range(repeat):
                progress("publishing", done, repeat)
                published.append(await asyncio.to_thread(_publish_copy, store, source))
                seconds.append(await _first_answer(session, store, published[-1]))
            stop.set()
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for version in published:
                await _remove(server, store, version)
    return _result(source, published, seconds, streams, tally)


def _result(
    source: AdapterVersion, published: list[AdapterVersion], seconds: list[float], streams: int, tally: Tally
) -> Result:
    median = round(statistics.median(seconds), 2)
    rows = ({"adapter": v.name, "seconds": round(s, 2)} for v, s in zip(published, seconds, strict=True))
    summary: dict[str, Any] = {
        "copied": source.id,
        "streams": streams,
        "median_s": median,
        "finished": tally.finished,
        "failed": tally.failed,
        "stalled": tally.stalled,
        "longest_gap_s": round(tally.longest_gap_s, 2),
        "reasons": tally.reasons,
    }
    goals = (
        Goal("streams that failed or stalled", tally.failed + tally.stalled, 0),
        Goal("median from publication to the first answer, s", median, GOAL_S),
    )
    return Result("hotload", tuple(rows), summary, goals)


def _source(store: AdapterStore, spec: str | None) -> AdapterVersion:
    if spec is not None:
        return store.resolve(spec)
    served = [version for version in store.versions() if version.state in SERVABLE]
    if not served:
        raise NotFound("This home has no adapter to copy; `hybrid train DIR` makes one, or give --adapter NAME.")
    return served[-1]


def _publish_copy(store: AdapterStore, source: AdapterVersion) -> AdapterVersion:
    def fill(staging: Path) -> dict[str, Any]:
        copy_adapter(source.ref.path, staging)
        return {key: value for key, value in source.card.items() if key not in _OWN}

    return store.publish(f"bench-{secrets.token_hex(4)}", fill)


async def _first_answer(session: aiohttp.ClientSession, store: AdapterStore, version: AdapterVersion) -> float:
    """Seconds from the moment in the card, just before the folder appears, to an answer of one token."""
    body = {"model": version.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    while True:
        with contextlib.suppress(EngineRejected):
            async with session.post("/v1/chat/completions", json=body) as response:
                await reach.answer(response)
                return time.time() - version.created
        if time.time() - version.created > TIMEOUT_S:
            await asyncio.to_thread(store.refresh)
            now = store.resolve(version.id)
            raise EngineTimeout(f"{version.id} does not answer after {TIMEOUT_S:.0f} s: {now.state}. {now.reason}")
        await asyncio.sleep(POLL_S)


async def _remove(server: reach.Server, store: AdapterStore, version: AdapterVersion) -> None:
    """Retires a copy here, whatever became of the server, has the engine drop it, and takes its files away."""
    await asyncio.to_thread(store.retire, version.name, version.version)
    with contextlib.suppress(HybridError):
        await server.post("/v1/unload_lora_adapter", {"lora_name": version.id})
    await asyncio.to_thread(shutil.rmtree, version.ref.path.parent, ignore_errors=True)


def _body(model: str, number: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell a long story about the number {number}."}],
        "stream": True,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "ignore_eos": True,
    }


async def _keep_streaming(
    session: aiohttp.ClientSession, body: dict[str, Any], tally: Tally, begun: asyncio.Event, stop: asyncio.Event
) -> None:
    """One stream after another, so that as many run all the time; the last one ends by itself after `stop`.

    `begun` is set by the first token, or failure.
    """
    timeout = aiohttp.ClientTimeout(sock_read=STALL_S)
    while not stop.is_set():
        try:
            async with session.post("/v1/chat/completions", json=body, timeout=timeout) as response:
                begun.set()
                await _read(response, tally)
        except TimeoutError:
            tally.stalled += 1
        except (aiohttp.ClientError, HybridError) as error:
            tally.fail(str(error))
            await asyncio.sleep(POLL_S)
        begun.set()


async def _read(response: aiohttp.ClientResponse, tally: Tally) -> None:
    """Reads a stream to its end. Raises TimeoutError when it stalls, HybridError when it was refused."""
    if response.status != 200:
        await reach.answer(response)
    at, last = time.monotonic(), b""
    async for line in response.content:
        if line.strip():
            now = time.monotonic()
            tally.longest_gap_s = max(tally.longest_gap_s, now - at)
            at, last = now, line.strip()
    if last == b"data: [DONE]":
        tally.finished += 1
    else:
        tally.fail(f"ended with {last.decode(errors='replace')}")
