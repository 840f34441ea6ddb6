"""More is asked than can be answered: by everybody at once, or by one key (rows R10, R11)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from server_kit import TOKEN, Running, chat, make_home, running, until

PATH = "/v1/chat/completions"
PLACES = 4
#: an answer takes half a second, and a request comes every ten milliseconds
SLOW, EVERY_S, ASKED = "@tokens 5 @delay 100ms", 0.01, 60


async def stalled(server: Running, count: int, key: str) -> list[asyncio.Task[Any]]:
    """Requests that the engine never ends, once they are in flight."""
    before = server.inflight
    tasks = [
        asyncio.create_task(server.post(PATH, chat("@tokens 3 @stall 1"), authorization=f"Bearer {key}"))
        for _ in range(count)
    ]
    await until(lambda: server.inflight == before + count)
    return tasks


async def test_R10_what_does_not_fit_is_refused_and_what_fits_is_answered_whole(tmp_path: Path) -> None:
    async with running(make_home(tmp_path, server={"max_inflight": PLACES})) as server:
        held: list[int] = []

        async def one() -> tuple[int, Any, Any]:
            answer = await server.post(PATH, chat(SLOW))
            held.append(server.inflight)
            return answer

        before = (await server.engine_log())["seen"]
        tasks = []
        for _ in range(ASKED):
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(EVERY_S)
        answers = await asyncio.gather(*tasks)
        whole = [body for status, body, _ in answers if status == 200]
        refused = [
            (status, body["error"]["code"], sent["retry-after"]) for status, body, sent in answers if status != 200
        ]
        assert {body["choices"][0]["message"]["content"] for body in whole} == {"t0 t1 t2 t3 t4"}
        assert len(whole) >= PLACES
        assert set(refused) == {(503, "overloaded", "1")}
        assert max(held) <= PLACES
        assert (await server.engine_log())["seen"] == before + len(whole), "what was refused never reached the engine"
        await until(lambda: server.inflight == 0)
        assert (await server.post(PATH, chat("hi")))[0] == 200
        assert await server.metric('hybrid_rejected_total{reason="overloaded"}') == len(refused)


async def test_R11_a_key_that_floods_is_refused_and_another_is_served(tmp_path: Path) -> None:
    async with running(make_home(tmp_path, server={"max_inflight_per_key": 3})) as server:
        flood, calm = (str(server.keys().create(name)["key"]) for name in ("flood", "calm"))
        stuck = await stalled(server, 3, flood)
        for _ in range(10):
            status, body, headers = await server.post(PATH, chat("more"), authorization=f"Bearer {flood}")
            assert (status, body["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "1")
            assert "x-should-retry" not in headers
            assert (await server.post(PATH, chat("hi"), authorization=f"Bearer {calm}"))[0] == 200
        assert await server.metric('hybrid_rejected_total{reason="rate_limit_exceeded"}') == 10
        stuck += await stalled(server, 5, TOKEN)  # the owner of the home has no such limit
        for task in stuck:
            task.cancel()
        await until(lambda: server.inflight == 0)
        assert (await server.post(PATH, chat("hi"), authorization=f"Bearer {flood}"))[0] == 200
