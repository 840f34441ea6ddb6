"""The engine as a child: started, watched, brought back, and never left behind. All with the scripted server."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from aiohttp import web
from peft_kit import write_adapter

from hybrid.engine import AdapterRef, Engine
from hybrid.engine.launch import MARK, die_with_parent
from hybrid.engine.open import lora_rank, open_engine, vllm_command
from hybrid.engine.process import end_leftovers
from hybrid.errors import EngineError, NotReady, SetupError
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.types.event import Token
from hybrid.types.request import Message

QUICK = {"probe_every_s": 0.2, "probe_timeout_s": 0.3, "probe_failures": 2}


@pytest.fixture
def model(tmp_path: Path) -> ModelFiles:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 1024}')
    return ModelFiles("tiny", folder, "00")


def settings_for(home: Path, kind: str = "scripted", *args: str, **engine) -> Settings:
    return Settings.load(home=home, engine={"kind": kind, "args": args, **engine})


@asynccontextmanager
async def opened(settings: Settings, model: ModelFiles, *refs: AdapterRef) -> AsyncIterator[Engine]:
    engine = await open_engine(settings, model, lambda: refs)
    try:
        yield engine
    finally:
        await engine.close()


async def until(check: Callable[[], object], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        for pause in itertools.repeat(0.02):
            if check():
                return
            await asyncio.sleep(pause)


async def ask(engine: Engine, text: str, adapter: str | None = None) -> str:
    return "".join([t.text async for t in engine.generate([Message("user", text)], adapter=adapter)])


def socket_folder(hidden: Path) -> str:
    """The folder of the engine's socket, as the record of a running engine says."""
    return str(json.loads((hidden / "engine.json").read_text())["folder"])


def there(path: str | Path) -> bool:
    return os.path.exists(path)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- a life without faults -------------------------------------------------------------------------------------------


async def test_an_engine_opens_answers_and_leaves_nothing(tmp_path: Path, model: ModelFiles) -> None:
    settings = settings_for(tmp_path)
    async with opened(settings, model) as engine:
        assert not engine.status().ready
        await until(lambda: engine.status().ready)
        status = engine.status()
        assert (status.model, status.max_model_len, status.restarts) == ("tiny", 1024, 0)
        assert await ask(engine, "Hello there") == "The base model read: Hello there"
        assert all(alive(pid) for pid in status.pids)
        folder = socket_folder(settings.rooms.hidden)
        assert os.stat(folder).st_mode & 0o777 == 0o700
        assert len(f"{folder}/engine.sock") < 100
        listening = [
            c for pid in status.pids for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"
        ]
        assert listening == []
    assert status.pids
    assert not any(alive(pid) for pid in status.pids)
    assert not there(folder)
    assert not there(settings.rooms.hidden / "engine.json")
    with pytest.raises(NotReady):
        await ask(engine, "Hello?")


async def test_the_log_of_the_run_before_is_kept(tmp_path: Path, model: ModelFiles) -> None:
    settings = settings_for(tmp_path)
    (tmp_path / "crash").write_text("first run")
    for args in (("--crash-if", str(tmp_path / "crash")), ()):
        async with opened(settings_for(tmp_path, "scripted", *args), model) as engine:
            await until(lambda engine=engine: engine.status().phase in ("ready", "restarting engine"))
    assert "first run" in (settings.rooms.logs / "engine.log.1").read_text()
    assert "first run" not in (settings.rooms.logs / "engine.log").read_text()


async def test_R17_a_slow_start_is_waited_for(tmp_path: Path, model: ModelFiles) -> None:
    async with opened(settings_for(tmp_path, "scripted", "--start-delay", "2", **QUICK), model) as engine:
        await until(lambda: engine.status().pids)
        assert engine.status().phase == "starting engine"
        with pytest.raises(NotReady, match="starting engine"):
            await ask(engine, "Hi")
        first = engine.status().pids
        await until(lambda: engine.status().ready)
        assert engine.status().restarts == 0
        assert engine.status().pids == first


async def test_A8_desired_adapters_are_there_before_ready(tmp_path: Path, model: ModelFiles) -> None:
    good, wide = write_adapter(tmp_path / "good"), write_adapter(tmp_path / "wide", rank=64)
    broken = AdapterRef("broken", 2, "0" * 64, tmp_path / "nowhere")
    async with opened(settings_for(tmp_path), model, broken, good, wide) as engine:
        await until(lambda: engine.status().ready)
        assert await engine.loaded() == {good.engine_name, wide.engine_name}
        assert "broken@2" in engine.status().detail
        assert await ask(engine, "Hi", good.engine_name) == f"{good.engine_name} answers: Hi"


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_R15_a_killed_engine_comes_back_with_its_adapters(tmp_path: Path, model: ModelFiles) -> None:
    ref = write_adapter(tmp_path / "bank")
    async with opened(settings_for(tmp_path), model, ref) as engine:
        await until(lambda: engine.status().ready)
        seen: list[Token] = []

        async def stream() -> None:
            async for token in engine.generate([Message("user", "@tokens 5000 @delay 5ms")]):
                seen.append(token)

        traffic = asyncio.create_task(stream())
        await until(lambda: len(seen) > 3)
        first = engine.status().pids
        os.kill(first[0], signal.SIGKILL)
        with pytest.raises(EngineError):
            await traffic
        await until(lambda: not engine.status().ready, 1)
        with pytest.raises(NotReady):
            await ask(engine, "Hi")
        held: list[frozenset[str]] = []
        await until(lambda: engine.status().ready)
        held.append(await engine.loaded())
        assert held == [{ref.engine_name}]
        assert engine.status().restarts == 1
        assert not set(first) & set(engine.status().pids)
        assert await ask(engine, "Hi", ref.engine_name)


async def test_R15_a_crash_loop_is_degraded_and_says_why(tmp_path: Path, model: ModelFiles) -> None:
    (tmp_path / "crash").write_text("RuntimeError: no such device")
    settings = settings_for(tmp_path, "scripted", "--crash-if", str(tmp_path / "crash"), restart_limit=1)
    async with opened(settings, model) as engine:
        await until(lambda: engine.status().phase == "degraded")
        assert "no such device" in engine.status().detail
        assert engine.status().restarts == 1
        assert not engine.status().ready


async def test_R16_a_hung_engine_is_found_and_replaced(tmp_path: Path, model: ModelFiles) -> None:
    async with opened(settings_for(tmp_path, first_byte_timeout_s=30, **QUICK), model) as engine:
        await until(lambda: engine.status().ready)
        first = engine.status().pids
        hung = asyncio.create_task(ask(engine, "@hang"))
        await until(lambda: not engine.status().ready)
        assert "hung" in engine.status().detail
        with pytest.raises(EngineError):
            await hung
        await until(lambda: engine.status().ready)
        assert engine.status().pids != first
        assert await ask(engine, "Hi")


async def test_R14_a_killed_gateway_leaves_no_engine(tmp_path: Path, model: ModelFiles) -> None:
    script = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from hybrid.engine.open import open_engine
        from hybrid.models import ModelFiles
        from hybrid.settings import Settings

        async def main():
            settings = Settings.load(home=Path({str(tmp_path)!r}), engine={{"kind": "scripted"}})
            engine = await open_engine(settings, ModelFiles("tiny", Path({str(model.path)!r}), "00"), lambda: ())
            while not engine.status().ready:
                await asyncio.sleep(0.02)
            print(*engine.status().pids, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
    """)
    gateway = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    pids = [int(pid) for pid in (await gateway.stdout.readline()).split()]
    assert pids
    gateway.kill()
    await gateway.wait()
    await until(lambda: not any(alive(pid) for pid in pids), 5)
    left = socket_folder(tmp_path / ".hybrid")
    assert there(left)
    async with opened(settings_for(tmp_path), model) as engine:  # and the next start sweeps up
        await until(lambda: engine.status().ready)
        assert not there(left)


def test_R14_leftovers_are_ended_and_strangers_are_not(tmp_path: Path) -> None:
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    left, stranger = (psutil.Process(s.pid) for s in sleepers)
    record = tmp_path / "engine.json"
    gone = [2**22 + 1, 1.0]
    family = [[left.pid, left.create_time()], [stranger.pid, stranger.create_time() - 5], gone]
    record.write_text(json.dumps({"gateway": gone, "folder": str(tmp_path / "x"), "processes": family}))
    end_leftovers(record)
    assert not alive(left.pid)
    assert alive(stranger.pid)
    assert not record.exists()
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()


def test_R14_only_children_of_ours_are_tied_to_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARK, raising=False)
    die_with_parent()
    wanted = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(wanted))  # PR_GET_PDEATHSIG
    assert wanted.value == 0


async def test_a_child_whose_gateway_died_first_does_not_start() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hybrid.engine.launch", "this", env={**os.environ, MARK: "1"}
    )
    assert await child.wait() == 1


# --- a server at a URL -----------------------------------------------------------------------------------------------


class Upstream:
    """A server that knows /v1/models and chat, and can be told to hang or to restart without its adapters."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.awake.set()
        self.adapters: list[str] = []

    async def models(self, _request: web.Request) -> web.Response:
        cards = [{"id": "big", "max_model_len": 512}, *({"id": a, "parent": "big"} for a in self.adapters)]
        return web.json_response({"object": "list", "data": cards})

    async def chat(self, _request: web.Request) -> web.Response:
        await self.awake.wait()
        return web.json_response({"choices": [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]})

    async def load(self, request: web.Request) -> web.Response:
        self.adapters.append((await request.json())["lora_name"])
        return web.Response(text="ok")

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/load_lora_adapter", self.load)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"{site.name}/v1/"
        finally:
            self.awake.set()
            await runner.cleanup()


async def test_a_server_at_a_url_is_discovered_and_given_its_adapters(tmp_path: Path, model: ModelFiles) -> None:
    upstream, ref = Upstream(), write_adapter(tmp_path / "bank")
    async with upstream.serve() as url, opened(settings_for(tmp_path, url, **QUICK), model, ref) as engine:
        await until(lambda: engine.status().ready)
        assert (engine.status().model, engine.status().max_model_len, engine.status().pids) == ("big", 512, ())
        assert upstream.adapters == [ref.engine_name]
        upstream.adapters.clear()  # it restarted between two probes
        await until(lambda: upstream.adapters == [ref.engine_name])
        assert engine.status().ready


async def test_R16_a_hung_server_at_a_url_is_unready_until_it_wakes(tmp_path: Path, model: ModelFiles) -> None:
    upstream = Upstream()
    async with upstream.serve() as url, opened(settings_for(tmp_path, url, **QUICK), model) as engine:
        await until(lambda: engine.status().ready)
        upstream.awake.clear()
        await until(lambda: not engine.status().ready)
        upstream.awake.set()
        await until(lambda: engine.status().ready)


async def test_a_server_that_comes_later_is_waited_for(tmp_path: Path, model: ModelFiles) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with opened(settings_for(tmp_path, f"http://127.0.0.1:{port}"), model) as engine:
        await asyncio.sleep(0.1)
        assert (engine.status().ready, engine.status().phase) == (False, "waiting for engine")
        app = web.Application()
        upstream = Upstream()
        app.router.add_get("/v1/models", upstream.models)
        app.router.add_post("/v1/chat/completions", upstream.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await until(lambda: engine.status().ready)
        await runner.cleanup()


# --- how vLLM is started ---------------------------------------------------------------------------------------------


def test_the_launch_line_is_private_and_has_headroom(tmp_path: Path, model: ModelFiles) -> None:
    wide = write_adapter(tmp_path / "wide", rank=40)
    settings = settings_for(tmp_path, "vllm", "--seed", "1", max_model_len=4096)
    argv, env = vllm_command(settings, model, lambda: (wide,))
    flags = dict(itertools.pairwise(argv))
    assert flags["--max-model-len"] == "1024"  # what the model was made for
    assert flags["--max-lora-rank"] == "64"  # the next that vLLM allows
    assert flags["--served-model-name"] == "tiny"
    assert argv[-2:] == ["--seed", "1"]
    assert {"--enable-lora", "--disable-fastapi-docs", "--enable-request-id-headers"} <= set(argv)
    assert not {"--host", "--port", "--api-key", "--trust-remote-code"} & set(argv)
    assert env["VLLM_PLUGINS"].split(",")[0].startswith("hybrid_")
    assert "resolver" not in env["VLLM_PLUGINS"]
    assert env["HF_HUB_OFFLINE"] == env["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(("need", "rank"), [((), 32), ((8,), 32), ((33,), 64), ((300,), 320)])
def test_the_rank_limit_is_one_that_vllm_allows(tmp_path: Path, need: tuple[int, ...], rank: int) -> None:
    refs = [write_adapter(tmp_path / f"r{r}", rank=r) for r in need]
    assert lora_rank(32, refs) == rank


async def test_what_cannot_start_is_said_at_once(tmp_path: Path, model: ModelFiles) -> None:
    with pytest.raises(SetupError, match="KV_CACHE_GB"):
        await open_engine(settings_for(tmp_path, "vllm", kv_cache_gb=100_000), model, lambda: ())
    with pytest.raises(SetupError, match="scripted"):
        await open_engine(settings_for(tmp_path, "vlm"), model, lambda: ())


def test_the_scripted_server_is_light() -> None:
    heavy = "{'torch', 'vllm', 'transformers', 'numpy', 'fastapi'}"
    look = f"import hybrid.engine.scripted, sys; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
