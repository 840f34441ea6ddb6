"""An engine that fails is spared, and one that cannot be reached is not asked more than usual (rows R7, R9)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from server_kit import until

from hybrid.engine import Engine
from hybrid.engine.breaker import COOLDOWN_S, FAILURES
from hybrid.engine.open import open_engine
from hybrid.engine.retries import LEAST, SHARE, WINDOW_S, RetryBudget
from hybrid.engine.transport import CONNECT_RETRIES
from hybrid.engine.vllm import VllmEngine
from hybrid.errors import EngineError, EngineFailing, EngineRejected, EngineTimeout, HybridError, NotReady
from hybrid.models import ModelFiles
from hybrid.settings import EngineSettings, Settings
from hybrid.types.request import Message

GOOD = {"choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]}


class Clock:
    """Time that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Moody:
    """A server whose answers have the status they are told to have, once they are let go; "Well" is always answered."""

    status: int = 200
    asked: int = 0
    url: str = ""
    let: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        if "Well" in await request.text():
            return web.json_response(GOOD)
        await self.let.wait()
        said = GOOD if self.status == 200 else {"error": {"message": "so it is"}}
        return web.json_response(said, status=self.status)


@pytest.fixture
async def engine() -> AsyncIterator[Moody]:
    moody = Moody()
    moody.let.set()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", moody.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    moody.url = site.name
    yield moody
    moody.let.set()
    await runner.cleanup()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(engine: Moody, clock: Clock) -> AsyncIterator[VllmEngine]:
    client = VllmEngine(engine.url, EngineSettings(answer_timeout_s=30), "base", clock)
    yield client
    await client.close()


async def ask(engine: Engine, text: str = "How are you?") -> str:
    return "".join([token.text async for token in engine.generate([Message("user", text)], stream=False)])


async def fail(engine: Engine, times: int, error: type[HybridError] = EngineError, text: str = "How are you?") -> None:
    for _ in range(times):
        with pytest.raises(error):
            await ask(engine, text)


async def test_R9_it_opens_spares_the_engine_and_closes_when_one_is_answered(
    engine: Moody, client: VllmEngine, clock: Clock
) -> None:
    engine.status = 500
    await fail(client, FAILURES - 1)
    assert client.status().breaker == "closed"
    await fail(client, 1)
    assert client.status().breaker == "open"
    with pytest.raises(EngineFailing) as spared:
        await ask(client)
    assert (spared.value.status, spared.value.code, spared.value.retry_after) == (503, "engine_failing", COOLDOWN_S)
    clock.now += COOLDOWN_S
    assert client.status().breaker == "half_open"
    await fail(client, 1)  # the one that is tried
    await fail(client, 1, EngineFailing)
    assert engine.asked == FAILURES + 1

    clock.now += COOLDOWN_S
    engine.status = 200
    engine.let.clear()
    tried = asyncio.create_task(ask(client))
    await until(lambda: engine.asked == FAILURES + 2)
    await fail(client, 3, EngineFailing)  # one is tried, and no other
    assert client.status().breaker == "half_open"
    engine.let.set()
    assert await tried == "yes"
    assert client.status().breaker == "closed"
    assert await asyncio.gather(*(ask(client) for _ in range(5))) == ["yes"] * 5
    assert engine.asked == FAILURES + 7


async def test_R9_ten_seconds_of_failure_cost_the_engine_a_few_requests(
    engine: Moody, client: VllmEngine, clock: Clock
) -> None:
    engine.status = 502
    for _ in range(1000):
        with pytest.raises((EngineError, EngineFailing)):
            await ask(client)
        clock.now += 0.01
    assert engine.asked <= FAILURES + 10 / COOLDOWN_S


async def test_R9_a_silent_engine_opens_it(engine: Moody, clock: Clock) -> None:
    client = VllmEngine(engine.url, EngineSettings(answer_timeout_s=0.1), "base", clock)
    engine.let.clear()
    await fail(client, FAILURES, EngineTimeout)
    await fail(client, 1, EngineFailing)
    await client.close()


@pytest.mark.parametrize("status", [400, 404, 422, 429, 503])
async def test_R9_refusals_and_a_full_queue_do_not_count(engine: Moody, client: VllmEngine, status: int) -> None:
    engine.status = status
    await fail(client, 2 * FAILURES, HybridError)
    assert engine.asked == 2 * FAILURES
    assert client.status().breaker == "closed"


async def test_R9_clients_that_leave_do_not_count(engine: Moody, client: VllmEngine, clock: Clock) -> None:
    async def leave() -> None:
        asked, leaving = engine.asked, asyncio.create_task(ask(client))
        await until(lambda: engine.asked > asked)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving

    engine.let.clear()
    for _ in range(2 * FAILURES):
        await leave()
    assert client.status().breaker == "closed"
    engine.let.set()
    engine.status = 500
    await fail(client, FAILURES)
    clock.now += COOLDOWN_S
    engine.let.clear()
    await leave()  # it was the one that was tried: the next one is, at once
    engine.let.set()
    engine.status = 400
    await fail(client, 1, EngineRejected)  # and so it is with a refusal
    engine.status = 200
    assert await ask(client) == "yes"


async def test_R9_an_engine_that_answers_others_is_not_broken(engine: Moody, client: VllmEngine, clock: Clock) -> None:
    engine.status = 500
    for _ in range(FAILURES):
        await fail(client, FAILURES - 1)
        assert await ask(client, "Well?") == "yes"
        clock.now += 1
    engine.let.clear()
    asked = engine.asked
    failing = [asyncio.create_task(ask(client)) for _ in range(2 * FAILURES)]
    await until(lambda: engine.asked == asked + 2 * FAILURES)
    assert await ask(client, "Well?") == "yes"
    engine.let.set()
    ends = await asyncio.gather(*failing, return_exceptions=True)
    assert {type(end) for end in ends} == {EngineError}
    assert client.status().breaker == "closed"


async def test_R9_a_probe_is_asked_whatever_the_state_and_closes_it(engine: Moody, client: VllmEngine) -> None:
    engine.status = 500
    await fail(client, FAILURES)
    with pytest.raises(EngineError):
        await client.probe(30)
    assert client.status().breaker == "open"
    engine.status = 200
    await client.probe(30)
    assert await ask(client) == "yes"


async def test_R9_after_a_restart_nobody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.engine.breaker.COOLDOWN_S", 3600.0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    settings = Settings.load(home=tmp_path, engine={"kind": "scripted", "probe_every_s": 3600.0})
    engine = await open_engine(settings, ModelFiles("tiny", folder, "00"), lambda: ())
    try:
        await until(lambda: engine.status().ready)
        await fail(engine, FAILURES, EngineError, "@status 500 out of order")
        await fail(engine, 1, EngineFailing)
        assert (engine.status().ready, engine.status().breaker) == (True, "open")
        os.kill(engine.status().pids[0], signal.SIGKILL)
        await until(lambda: engine.status().ready and engine.status().restarts == 1)
        assert engine.status().breaker == "closed"
        assert await ask(engine, "Hello") == "The base model read: Hello"
    finally:
        await engine.close()


# --- retries ---------------------------------------------------------------------------------------------------------


def test_R7_a_quiet_server_may_retry_and_a_busy_one_for_a_fifth(clock: Clock) -> None:
    budget = RetryBudget(clock)
    assert [budget.retry() for _ in range(LEAST + 1)] == [True] * LEAST + [False]
    clock.now += WINDOW_S
    for _ in range(100):
        budget.request()
    assert sum(budget.retry() for _ in range(100)) == 20
    assert budget.refused == 1 + 80
    clock.now += WINDOW_S
    assert sum(budget.retry() for _ in range(100)) == LEAST


@given(st.lists(st.tuples(st.booleans(), st.floats(0, WINDOW_S / 3)), max_size=120))
def test_R7_no_window_holds_more_retries_than_a_fifth_of_its_requests(steps: list[tuple[bool, float]]) -> None:
    clock = Clock()
    budget, requests, retries = RetryBudget(clock), list[float](), list[float]()

    def recent(times: list[float]) -> int:
        return sum(at > clock.now - WINDOW_S for at in times)

    for again, pause in steps:
        clock.now += pause
        if not again:
            budget.request()
            requests.append(clock.now)
        elif budget.retry():
            retries.append(clock.now)
            assert recent(retries) <= max(LEAST, SHARE * recent(requests))
        else:
            assert recent(retries) + 1 > max(LEAST, SHARE * recent(requests))


async def test_R7_an_engine_that_is_gone_is_not_asked_more_than_usual(tmp_path: Path, clock: Clock) -> None:
    client = VllmEngine(f"unix:{tmp_path}/none.sock", EngineSettings(), "base", clock)
    for _ in range(2 * LEAST):
        assert not await client.healthy()  # asked in a loop, so never twice: it takes nothing of the budget
    assert client.status().retries_refused == 0
    await fail(client, FAILURES, NotReady)
    assert client.status().retries_refused == FAILURES - LEAST // CONNECT_RETRIES
    await fail(client, 1, EngineFailing)
    await client.close()
