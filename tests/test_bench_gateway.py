"""`hybrid bench gateway`: its load, its sides, and a small run of all of it."""

from __future__ import annotations

import asyncio
import json
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from server_kit import make_home
from typer.testing import CliRunner

from hybrid.bench import gateway, generator
from hybrid.bench.gateway import Lane
from hybrid.bench.load import PATH, loading
from hybrid.bench.sides import ENGINE, OURS, RIVAL, litellm_version
from hybrid.cli.bench import app
from hybrid.errors import BadRequest, SetupError

USAGE = {"choices": [], "usage": {"completion_tokens": 5}}


@asynccontextmanager
async def answering(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose chat requests are answered by `handler`."""
    fake = web.Application()
    fake.router.add_post(PATH, handler)
    async with TestServer(fake) as server, aiohttp.ClientSession(str(server.make_url(""))) as session:
        yield session


async def test_a_request_that_had_to_wait_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "WARM_S", 0.0)
    one_at_a_time = asyncio.Lock()

    async def slow(_request: web.Request) -> web.Response:
        async with one_at_a_time:
            await asyncio.sleep(0.02)
        return web.json_response({"choices": []})

    async with answering(slow) as session:
        told = await generator.rate(session, {}, 0.01, 0.2)
    assert (len(told["latencies"]), told["failed"]) == (20, 0)
    assert max(told["latencies"]) > 200, "the last was due after 190 ms and answered after 400"


async def test_what_fails_is_counted_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "WARM_S", 0.0)
    asked: list[int] = []

    async def every_other(_request: web.Request) -> web.Response:
        asked.append(1)
        return web.json_response({"choices": []}, status=200 if len(asked) % 2 else 503)

    async with answering(every_other) as session:
        told = await generator.rate(session, {}, 0.01, 0.1)
    assert (len(told["latencies"]), told["failed"]) == (5, 5)
    assert told["why"][0].startswith("status 503")


async def test_a_stream_that_breaks_off_counts_no_tokens() -> None:
    async def chat(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"data: {}\n\n" + f"data: {json.dumps(USAGE)}\n\n".encode())
        if (await request.json())["whole"]:
            await answer.write(b"data: [DONE]\n\n")
        return answer

    async with answering(chat) as session:
        told = await generator.streams(session, [[{"whole": True}, {"whole": True}], [{"whole": False}]])
    assert (told["tokens"], told["failed"]) == (10, 1)
    assert told["seconds"] > 0
    assert "ends with" in told["why"][0]


def lane(name: str, speed: float, latencies: list[list[float]], failed: int = 0) -> Lane:
    turns = [{"tokens": speed, "seconds": 1.0, "failed": 0} for _ in range(3)]
    return Lane(name, turns, {50.0: latencies}, {50.0: failed})


def test_what_is_added_is_told_from_asking_directly() -> None:
    direct = lane(ENGINE, 100, [[21.0, 22.0, 23.0], [22.0]])
    ours = lane(OURS, 98, [[23.0, 24.0, 25.0], [24.0]])
    rival = lane(RIVAL, 49, [[], []], failed=4)
    result = gateway.tell([direct, ours, rival], {})
    told = {row["side"]: row for row in result.rows}
    assert (told[OURS]["p50_ms"], told[OURS]["added_p50_ms"]) == (24.0, 2.0)
    low, high = told[OURS]["added_p50_ci95"]
    assert low <= 2.0 <= high
    assert (told[RIVAL]["failed"], told[RIVAL]["p50_ms"], told[RIVAL]["added_p99_ci95"]) == (4, None, None)
    assert result.summary["times"] == {
        ENGINE: {"median": 0.98, "ci95": [0.98, 0.98]},
        RIVAL: {"median": 2.0, "ci95": [2.0, 2.0]},
    }
    assert all(goal.met for goal in result.goals)
    assert {goal.limit for goal in result.goals} == {0.97, 1.0, 0, 5, 20}
    json.dumps(result.wire(), allow_nan=False)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def rival(tmp_path: Path) -> Path:
    """An environment's `bin` whose `litellm` answers without asking anybody."""
    folder = tmp_path / "rival" / "bin"
    folder.mkdir(parents=True)
    script(folder / "python", "#!/bin/sh\necho 1.2.3\n")
    scripted = f'exec "{sys.executable}" -m hybrid.engine.scripted --model base'
    script(folder / "litellm", f'#!/bin/sh\ntest "$1" = --config && test -s "$2" && shift 2\n{scripted} "$@"\n')
    return folder


async def test_a_small_run_asks_everybody_and_writes_what_came_of_it(
    tmp_path: Path, rival: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "REST_S", 0.0)
    settings = make_home(tmp_path / "home")
    monkeypatch.setenv("HYBRID_MODEL", settings.model)  # for the server that is started
    result = await gateway.measure(
        settings, litellm=rival, streams=2, tokens=5, rates=[40], seconds=0.5, rounds=1, out=tmp_path / "out",
        progress=lambda *_: None,
    )  # fmt: skip
    assert [(row["side"], row["n"], row["failed"]) for row in result.rows] == [
        (name, 20, 0) for name in (ENGINE, OURS, RIVAL)
    ], result.summary["why"]
    assert all(row["p50_ms"] >= gateway.UPSTREAM_MS for row in result.rows)
    assert result.summary["litellm"] == "1.2.3"
    assert result.summary["streams_failed"] == {ENGINE: 0, OURS: 0, RIVAL: 0}
    written = json.loads((tmp_path / "out" / "gateway.json").read_text())
    assert {key: written[key] for key in result.wire()} == json.loads(json.dumps(result.wire()))
    assert [turn["tokens"] for turns in written["turns"].values() for turn in turns] == [2 * gateway.ASKS * 5] * 3
    assert (tmp_path / "out" / "gateway.png").read_bytes().startswith(b"\x89PNG")


async def test_without_litellm_it_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"pip install 'litellm\[proxy\]'"):
        await litellm_version(tmp_path)


async def test_a_load_that_dies_is_told_in_its_own_words(tmp_path: Path) -> None:
    async with loading(tmp_path / "log") as running:
        with pytest.raises(SetupError, match=r"(?s)ended before.*KeyError"):
            await running.ask("http://127.0.0.1:9", {}, nothing=True)


@pytest.mark.parametrize("wrong", ["x", "", "0", "-5", "1e9"])
def test_rates_are_numbers_that_one_process_can_ask(wrong: str) -> None:
    done = CliRunner().invoke(app, ["gateway", f"--rates={wrong}"])
    assert isinstance(done.exception, BadRequest)
