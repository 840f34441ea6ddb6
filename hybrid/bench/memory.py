"""`memory`: what the gateway and the engine hold in memory with few and many adapters, and whether that grows.

`hybrid serve` is started in a home of its own. Adapters of random numbers are published into it, as another process
would, and both sizes are read when 1, 8 and 32 of them serve. Then every adapter is asked in a random order, more of
them than the engine has slots for, so that they change places all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import psutil

from hybrid import reach
from hybrid.adapters.store import AdapterStore
from hybrid.bench.alone import random_adapters
from hybrid.bench.result import Goal, Result
from hybrid.bench.serving import new_home, serving, until_ok
from hybrid.errors import EngineRejected, EngineTimeout
from hybrid.models import materialise
from hybrid.rooms import Home, write_json
from hybrid.settings import Settings
from hybrid.state import State

COUNTS = (1, 8, 32)
STREAMS, TOKENS, RANK = 8, 4, 16
#: how often the sizes are read while the adapters change places
SAMPLES = 20
POLL_S, TIMEOUT_S = 0.2, 300.0
MIB = 1 << 20
#: what allocators may keep: growth beyond this share of the size is a leak
LIMIT = 0.02


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the processes hold, in MiB; pages that several of them share are counted once (where the kernel tells)."""

    gateway: float
    engine: float


async def measure(
    settings: Settings, *, requests: int, out: Path | None, progress: Callable[[str, int, int], None]
) -> Result:
    """Reads the sizes with 0, 1, 8 and 32 adapters, then over `requests` requests to all 32.

    Writes `memory.json` and `memory.png` into `out`. Raises NotReady when the server does not start, EngineTimeout when
    an adapter never answers.
    """
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        home = new_home(settings, Path(folder))
        model = await asyncio.to_thread(materialise, settings.model, settings.cache, progress)
        made = await asyncio.to_thread(random_adapters, Path(folder, "made"), model, COUNTS[-1], RANK)
        rows: list[dict[str, Any]] = []
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(_served(settings, home))
            session = await stack.enter_async_context(server.connect(TIMEOUT_S))
            state = stack.enter_context(contextlib.closing(await asyncio.to_thread(State, home.database)))
            store = await asyncio.to_thread(AdapterStore, home, state, model.sha256)
            rows.append({"adapters": 0, **asdict(await _sizes(server))})
            for count in COUNTS:
                progress("publishing adapters", len(rows), len(COUNTS) + SAMPLES)
                fresh = made[rows[-1]["adapters"] : count]
                for ref in fresh:
                    await asyncio.to_thread(store.adopt, ref.name, ref.path)
                for ref in fresh:
                    await _until_answered(session, ref.name)
                rows.append({"adapters": count, **asdict(await _sizes(server))})
            names = [ref.name for ref in made]
            churn = [sizes async for sizes in _churn(server, session, names, requests, progress)]
    result = _result(rows, churn, requests, {"model": model.name, "rank": RANK, "slots": settings.engine.max_loras})
    if out is not None:
        await asyncio.to_thread(_write, out, result, churn, requests)
    return result


@contextlib.asynccontextmanager
async def _served(settings: Settings, home: Home) -> AsyncIterator[reach.Server]:
    async with serving(settings, home, "--no-ui") as process:
        async with asyncio.timeout(settings.engine.start_timeout_s):
            server = await until_ok(process, home, "/readyz")
        yield server


async def _until_answered(session: aiohttp.ClientSession, name: str) -> None:
    """Waits until an adapter serves: the server checks it first."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            await _ask(session, name)
        except EngineRejected as error:
            if time.monotonic() > end:
                raise EngineTimeout(f"{name} does not answer after {TIMEOUT_S:.0f} s: {error.message}") from error
            await asyncio.sleep(POLL_S)
        else:
            return


async def _ask(session: aiohttp.ClientSession, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Say something."}], "max_tokens": TOKENS}
    async with session.post("/v1/chat/completions", json=body) as response:
        await reach.answer(response)


async def _churn(
    server: reach.Server,
    session: aiohttp.ClientSession,
    names: Sequence[str],
    requests: int,
    progress: Callable[[str, int, int], None],
) -> AsyncIterator[Sizes]:
    """The sizes before and after each of `SAMPLES` equal parts of the requests."""
    random = Random(0)
    yield await _sizes(server)
    for number in range(SAMPLES):
        progress("asking all adapters", len(COUNTS) + 1 + number, len(COUNTS) + SAMPLES)
        todo = iter(random.choices(names, k=max(1, requests // SAMPLES)))
        await asyncio.gather(*(_work(session, todo) for _ in range(STREAMS)))
        yield await _sizes(server)


async def _work(session: aiohttp.ClientSession, todo: Iterator[str]) -> None:
    for name in todo:
        await _ask(session, name)


async def _sizes(server: reach.Server) -> Sizes:
    async with server.connect() as session, session.get("/v1/status") as response:
        pids = (await reach.answer(response))["engine"]["pids"]
    return await asyncio.to_thread(lambda: Sizes(_mib([server.pid]), _mib(pids)))


def _mib(pids: Sequence[int]) -> float:
    held = 0
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # a helper that was done in between
            told = psutil.Process(pid).memory_full_info()
            held += getattr(told, "pss", told.rss)
    return round(held / MIB, 1)


def _result(rows: Sequence[dict[str, Any]], churn: Sequence[Sizes], requests: int, facts: dict[str, Any]) -> Result:
    grown = {who: _growth([getattr(sizes, who) for sizes in churn]) for who in ("gateway", "engine")}
    goals = [Goal(f"{who}: growth over the last half by its size", share, LIMIT) for who, share in grown.items()]
    each = round((rows[-1]["engine"] - rows[1]["engine"]) / (COUNTS[-1] - COUNTS[0]), 2)
    summary = {**facts, "requests": requests, "engine_mib_an_adapter": each, "after": asdict(churn[-1])}
    return Result("memory", tuple(rows), summary, tuple(goals))


def _growth(sizes: Sequence[float]) -> float:
    """How much larger the last quarter's median is than that of the third before it, as a share.

    The first half is not counted: caches fill, and allocators find their size.
    """
    quarter = max(1, len(sizes) // 4)
    before, after = statistics.median(sizes[-2 * quarter : -quarter]), statistics.median(sizes[-quarter:])
    return round(after / before - 1, 4)


def _write(out: Path, result: Result, churn: Sequence[Sizes], requests: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "memory.json", {**result.wire(), "churn": [asdict(sizes) for sizes in churn]})
    _draw(result, churn, requests, out / "memory.png")


def _draw(result: Result, churn: Sequence[Sizes], requests: int, path: Path) -> None:
    """On the left the sizes by adapters, on the right over the requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    asked = [requests * number / SAMPLES for number in range(len(churn))]
    for who in ("engine", "gateway"):
        left.plot([row["adapters"] for row in result.rows], [row[who] for row in result.rows], marker="o", label=who)
        right.plot(asked, [getattr(sizes, who) for sizes in churn], marker=".")
    left.set_ylim(bottom=0)
    left.set_xlabel("adapters")
    left.set_ylabel("MiB")
    left.legend(frameon=False)
    right.set_xlabel("requests, each to another adapter")
    figure.savefig(path, dpi=120)
