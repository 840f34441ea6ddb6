"""The load: a process of its own, so that what asks never shares a loop, or an interpreter, with what answers.

    python -m hybrid.bench.generator

It reads one order a line (JSON) and answers each with one line. `{"streams": [[body, …], …]}` asks each list's bodies
one after another, all lists at once, and is answered with the tokens and seconds of it. `{"body": …, "rate": r,
"seconds": s}` sends so many requests a second whatever becomes of them (an open loop), and is answered with
latencies from the moment each request was due, not from when it was sent: one that had to wait for a busy machine has
waited (coordinated omission, Tene 2013). `press` in place of `body` is for more than can be answered: those that were
refused are told apart. `url` and `headers` say whom to ask.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import uvicorn

from hybrid.bench.load import PATH
from hybrid.types import JSON

#: an answer that is not there by then has failed, in seconds
PATIENCE_S = 30.0
#: requests are sent this long before they count, in seconds: connections are made, caches are warm
WARM_S = 1.0
#: bytes at the end of a stream that hold its last two events
_TAIL = 8 << 10
#: what a failed answer raises: refused, cut off, late, or not what it should be
_FAILURES = (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError)


async def streams(session: aiohttp.ClientSession, queues: list[list[JSON]]) -> JSON:
    """`{"tokens", "seconds", "failed", "why"}`: completion tokens, and the time from the first sent to the last end."""
    tokens, failures = list[int](), list[str]()

    async def one(queue: list[JSON]) -> None:
        for body in queue:
            try:
                tokens.append(await _streamed(session, body))
            except _FAILURES as error:
                failures.append(f"{type(error).__name__}: {error}"[:300])

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for queue in queues:
            group.create_task(one(queue))
    return {"tokens": sum(tokens), "seconds": time.perf_counter() - began, **_told(failures)}


async def _streamed(session: aiohttp.ClientSession, body: JSON) -> int:
    """The completion tokens of one stream, by its own word. Raises one of _FAILURES where it is not whole."""
    tail = b""
    async with session.post(PATH, json=body) as response:
        async for piece in response.content.iter_any():
            tail = (tail + piece)[-_TAIL:]
    events = [line[5:].strip() for line in tail.splitlines() if line.startswith(b"data:")]
    if response.status != 200 or events[-1:] != [b"[DONE]"]:
        raise ValueError(f"status {response.status}, ends with {tail[-200:].decode(errors='replace')}")
    return int(json.loads(events[-2])["usage"]["completion_tokens"])


async def rate(session: aiohttp.ClientSession, body: JSON, each_s: float, seconds: float) -> JSON:
    """`{"latencies": [ms, …], "failed", "why"}` of the requests that were due every `each_s` seconds."""
    latencies, failures = list[float](), list[str]()

    async def one(due: float, counts: bool) -> None:
        why, _ = await _answered(session, body)
        if why:
            failures.append(why)
        elif counts:
            latencies.append((time.perf_counter() - due) * 1000)

    warm = round(WARM_S / each_s)
    await _in_time(each_s, warm + round(seconds / each_s), lambda number, due: one(due, number >= warm))
    return {"latencies": latencies, **_told(failures)}


async def press(session: aiohttp.ClientSession, body: JSON, each_s: float, seconds: float) -> JSON:
    """`{"answered": [ms, …], "refused": [ms, …], "failed", "why"}`; what was refused may be asked again later."""
    times: dict[str, list[float]] = {"answered": [], "refused": []}
    failures = list[str]()

    async def one(_: int, due: float) -> None:
        why, for_now = await _answered(session, body)
        if why and not for_now:
            failures.append(why)
        else:
            times["refused" if why else "answered"].append((time.perf_counter() - due) * 1000)

    await _in_time(each_s, round(seconds / each_s), one)
    return {**times, **_told(failures)}


async def _in_time(each_s: float, count: int, one: Callable[[int, float], Coroutine[Any, Any, None]]) -> None:
    """Starts `one(number, due)` whenever one is due, whatever became of those before; ends when all have."""
    start, tasks = time.perf_counter(), list[asyncio.Task[None]]()
    for number in range(count):
        due = start + number * each_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number, due)))
    await asyncio.gather(*tasks)


async def _answered(session: aiohttp.ClientSession, body: JSON) -> tuple[str, bool]:
    """Why a request failed, nothing where it did not; and whether it was only refused for now, with Retry-After."""
    try:
        async with session.post(PATH, json=body) as response:
            raw = await response.read()
    except _FAILURES as error:
        return f"{type(error).__name__}: {error}"[:300], False
    if response.status == 200 and b'"choices"' in raw:
        return "", False
    for_now = response.status in (429, 503) and "retry-after" in response.headers
    return f"status {response.status}: {raw[:200].decode(errors='replace')}", for_now


def _told(failures: list[str]) -> JSON:
    return {"failed": len(failures), "why": sorted(set(failures))[:3]}


async def obey(order: JSON) -> JSON:
    """What came of one order."""
    lines, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=order.get("patience_s", PATIENCE_S))
    async with aiohttp.ClientSession(
        order["url"], connector=lines, timeout=timeout, headers=order["headers"]
    ) as session:
        if "streams" in order:
            return await streams(session, order["streams"])
        if "press" in order:
            return await press(session, order["press"], 1 / order["rate"], order["seconds"])
        return await rate(session, order["body"], 1 / order["rate"], order["seconds"])


def main() -> None:
    """Obeys until there are no more orders."""
    gc.freeze()
    factory = uvicorn.Config("").get_loop_factory()
    with asyncio.Runner(loop_factory=factory) as runner:
        for line in sys.stdin:
            sys.stdout.write(json.dumps(runner.run(obey(json.loads(line)))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
