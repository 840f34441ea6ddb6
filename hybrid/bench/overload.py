"""`overload`: one key asks three times what it may have answered, for a while, and another key asks now and then.

The server is a real one over the scripted engine, which answers the first key after a second: so that key can have as
many answers a second as it may have requests in flight, and both sides know what is too much. Requests come at a fixed
rate, whatever becomes of the earlier ones, and times count from when each was due (`generator.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil

from hybrid import reach
from hybrid.bench.load import Load, loading
from hybrid.bench.result import Goal, Result
from hybrid.bench.serving import new_home, serving, until_ok
from hybrid.bench.sides import new_key
from hybrid.settings import Settings
from hybrid.types import JSON

#: times what the key may have answered
OVER = 3
#: what the engine takes for an answer of the flood, and for one of the other key, in seconds
ANSWER_S, QUICK_S = 1.0, 0.02
#: requests a second of the other key, and of the first one afterwards
NOW_AND_THEN = 5.0
#: how long the first key asks on after the flood
AFTER_S = 5.0
LOOK_S = 0.25


async def measure(settings: Settings, *, seconds: float, progress: Callable[[str, int, int], None]) -> Result:
    """The other key alone, then beside the flood, each for `seconds`, then the first key once the flood is over.

    Raises NotReady, with the server's last words, when it does not come up.
    """
    places = settings.server.max_inflight_per_key
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        logs = Path(folder)
        home = new_home(settings, logs)
        async with (
            serving(settings, home, "--no-ui", "--engine", "scripted") as process,
            loading(logs / "flood.log") as many,
            loading(logs / "other.log") as few,
        ):
            async with asyncio.timeout(settings.engine.start_timeout_s):
                server = await until_ok(process, home, "/readyz")
            keys = [await asyncio.to_thread(new_key, home.database, name) for name in ("flood", "other")]
            flood, other = (_Asker(load, server, key) for load, key in zip((many, few), keys, strict=True))
            progress("alone", 0, 3)
            alone = await other.now_and_then(seconds)
            progress("flood", 1, 3)
            async with _watched(server.pid) as memory:
                pressed, beside = await asyncio.gather(
                    flood.press(OVER * places / ANSWER_S, seconds), other.now_and_then(seconds)
                )
            progress("afterwards", 2, 3)
            after = await flood.now_and_then(AFTER_S)
    facts = {"places": places, "rate": OVER * places / ANSWER_S, "seconds": seconds}
    return tell(alone, pressed, beside, after, memory, facts)


class _Asker:
    """A key and the process that asks with it."""

    def __init__(self, load: Load, server: reach.Server, key: str) -> None:
        self._load = load
        self._server = server
        self._headers = {"authorization": f"Bearer {key}"}

    async def now_and_then(self, seconds: float) -> JSON:
        """Requests that are answered soon."""
        order = {"body": _body(QUICK_S), "rate": NOW_AND_THEN, "seconds": seconds}
        return await self._load.ask(self._server.url, self._headers, **order)

    async def press(self, rate: float, seconds: float) -> JSON:
        """Requests of which most are too many."""
        order = {"press": _body(ANSWER_S), "rate": rate, "seconds": seconds}
        return await self._load.ask(self._server.url, self._headers, **order)


def _body(seconds: float) -> JSON:
    return {"model": "base", "messages": [{"role": "user", "content": f"@tokens 1 @delay {seconds * 1000:.0f}ms"}]}


@contextlib.asynccontextmanager
async def _watched(pid: int) -> AsyncIterator[list[int]]:
    """The resident bytes of a process, before the block and every moment in it."""
    process = psutil.Process(pid)
    held = [process.memory_info().rss]

    async def look() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            held.append(process.memory_info().rss)

    looking = asyncio.create_task(look())
    try:
        yield held
    finally:
        looking.cancel()


def tell(
    alone: JSON, pressed: JSON, beside: JSON, after: JSON, memory: Sequence[int], facts: Mapping[str, float]
) -> Result:
    """What came of all of it. `memory` is in bytes, its first number from before the flood."""
    rows = (
        _row("other key, alone", alone["latencies"], alone["failed"]),
        _row("other key, beside the flood", beside["latencies"], beside["failed"]),
        _row("flood, answered", pressed["answered"], pressed["failed"]),
        _row("flood, refused", pressed["refused"], 0),
        _row("first key, afterwards", after["latencies"], after["failed"]),
    )
    quiet, beside_it, answered, refused, again = rows
    grown = (max(memory) - memory[0]) / 2**20
    failed = sum(row["failed"] for row in rows)
    goals = [Goal("requests that were neither answered nor refused with Retry-After", failed, 0)]
    if answered["n"] and refused["n"] and quiet["n"] and beside_it["n"] and again["n"]:
        share = answered["n"] / (facts["places"] / ANSWER_S * facts["seconds"])
        goals += [
            Goal("answers to the flood, of those it may have", round(share, 3), 0.9, at_least=True),
            Goal("slowest refusal, ms", refused["max_ms"], 1000),
            Goal(
                "p99 of an answer to the flood, by the engine's time", round(answered["p99_ms"] / 1000 / ANSWER_S, 2), 2
            ),
            Goal("p99 of the other key, by its p99 alone", round(beside_it["p99_ms"] / quiet["p99_ms"], 2), 2),
            Goal("slowest answer to the first key afterwards, ms", again["max_ms"], 5000),
        ]
    goals.append(Goal("memory that the flood adds, MiB", round(grown, 1), 100))
    told = {**facts, "why": sorted({*alone["why"], *pressed["why"], *beside["why"], *after["why"]})[:5]}
    return Result("overload", rows, told, tuple(goals))


def _row(what: str, latencies: Sequence[float], failed: int) -> JSON:
    """One kind of request, in ms; nothing but its name where there was none."""
    row: JSON = {"requests": what, "n": len(latencies), "failed": failed}
    for name, q in {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}.items():
        row[name] = round(float(np.quantile(latencies, q)), 2) if latencies else None
    return row
