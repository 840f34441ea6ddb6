"""The server as a process: how it starts, refuses to, drains, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest
from server_kit import chat, engine_log, make_home, until

SERVE = """
import sys
from pathlib import Path
from hybrid.errors import HybridError
from hybrid.server.run import serve
from hybrid.settings import Settings
home = Path(sys.argv[1])
server = {"port": int(sys.argv[2]), "ui": False, "quickstart": False, "drain_s": float(sys.argv[3])}
settings = Settings.load(home=home, model=str(home / "base"), engine={"kind": "scripted"}, server=server)
try:
    serve(settings, announce=lambda words: print(words, file=sys.stderr))
except HybridError as error:
    print(error.message, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@dataclass
class Process:
    home: Path
    popen: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.home / "said").read_text()

    @property
    def about(self) -> dict:
        return json.loads((self.home / ".hybrid" / "server.json").read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts servers in homes of their own; whatever is left of them at the end is killed."""
    begun: list[Process] = []

    def start(name: str = "home", *, port: int = 0, drain_s: float = 30) -> Process:
        home = tmp_path / name
        home.mkdir(exist_ok=True)
        make_home(home)
        with (home / "said").open("ab") as said:
            argv = [sys.executable, "-c", SERVE, str(home), str(port), str(drain_s)]
            popen = subprocess.Popen(argv, stdout=said, stderr=said, env={**os.environ, "NO_COLOR": "1"})
        begun.append(Process(home, popen))
        return begun[-1]

    yield start
    for process in begun:
        process.popen.kill()
        process.popen.wait()


async def status_of(session: aiohttp.ClientSession, url: str) -> tuple[int, dict]:
    try:
        async with session.get(url) as answer:
            return answer.status, await answer.json(content_type=None)
    except (aiohttp.ClientError, OSError):
        return 0, {}


async def ready(process: Process, session: aiohttp.ClientSession) -> str:
    async def is_ready() -> bool:
        assert process.popen.poll() is None, process.said
        try:
            return (await status_of(session, process.about["url"] + "/readyz"))[0] == 200
        except (OSError, ValueError, KeyError):
            return False

    await until(is_ready)
    return process.about["url"]


async def ended(process: Process, timeout_s: float = 20) -> int:
    await until(lambda: process.popen.poll() is not None, timeout_s)
    return process.popen.returncode


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


async def read_stream(session: aiohttp.ClientSession, url: str, text: str) -> str:
    body = {**chat(text), "stream": True}
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        return (await answer.read()).decode()


async def test_R12_told_to_stop_it_finishes_what_it_began(start) -> None:
    process = start()
    async with aiohttp.ClientSession() as session:
        url = await ready(process, session)
        pids = (await status_of(session, url + "/v1/status"))[1]["engine"]["pids"]
        assert not gone(pids)
        streams = [asyncio.create_task(read_stream(session, url, "@tokens 40 @delay 50ms")) for _ in range(20)]

        async def all_run() -> bool:
            return (await engine_log(process.home))["active"] == 20

        await until(all_run)
        process.popen.send_signal(signal.SIGTERM)

        async def draining() -> bool:
            return (await status_of(session, url + "/readyz"))[0] == 503

        await until(draining, timeout_s=2)
        assert (await status_of(session, url + "/livez"))[0] == 200
        async with session.post(url + "/v1/chat/completions", json=chat("late")) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "draining")
            assert int(answer.headers["retry-after"]) >= 1
        assert all(not s.done() for s in streams)
        for text in await asyncio.gather(*streams):
            assert text.endswith("data: [DONE]\n\n")
            assert text.count('"content": " t') == 39
        assert await ended(process) == 0
    assert gone(pids)
    with pytest.raises(ProcessLookupError):
        os.killpg(pids[0], 0)
    assert not (process.home / ".hybrid" / "server.json").exists()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_R13_told_twice_it_leaves_at_once(start, second: signal.Signals) -> None:
    process = start()
    async with aiohttp.ClientSession() as session:
        url = await ready(process, session)
        pids = (await status_of(session, url + "/v1/status"))[1]["engine"]["pids"]
        stream = asyncio.create_task(read_stream(session, url, "@tokens 1000 @delay 100ms"))
        await asyncio.sleep(0.5)
        process.popen.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert process.popen.poll() is None
        process.popen.send_signal(second)
        assert await ended(process, timeout_s=15) == 0
        assert "[DONE]" not in "".join(str(r) for r in await asyncio.gather(stream, return_exceptions=True))
    await until(lambda: gone(pids), timeout_s=5)


async def test_a_drain_has_an_end(start) -> None:
    process = start(drain_s=0.5)
    async with aiohttp.ClientSession() as session:
        url = await ready(process, session)
        stream = asyncio.create_task(read_stream(session, url, "@tokens 1000 @delay 100ms"))
        await asyncio.sleep(0.5)
        process.popen.send_signal(signal.SIGINT)
        assert await ended(process, timeout_s=15) == 0
        await asyncio.gather(stream, return_exceptions=True)


async def test_D4_a_second_server_of_a_home_is_refused_naming_the_first_and_the_lock(start) -> None:
    first = start()
    async with aiohttp.ClientSession() as session:
        url = await ready(first, session)
        assert stat.S_IMODE((first.home / ".hybrid" / "server.json").stat().st_mode) == 0o600
        assert first.about["pid"] == first.popen.pid
        second = start()
        assert await ended(second) == 3
        assert str(first.popen.pid) in second.said
        assert "server.lock" in second.said
        # a port that is taken, from another home
        third = start("other", port=int(url.rsplit(":", 1)[1]))
        assert await ended(third) == 3
        assert "is taken" in third.said
        assert not (third.home / ".hybrid" / "server.json").exists()
        assert (await status_of(session, url + "/livez"))[0] == 200
        # the owner's own key opens what a stranger's request cannot
        async with session.get(
            url + "/v1/models", headers={"authorization": f"Bearer {first.about['token']}"}
        ) as answer:
            assert answer.status == 200
