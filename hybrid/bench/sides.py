"""Who is asked: an engine itself, our gateway before it, and a rival's gateway before it, each a process of its own.

The engine listens on a port of this machine, because the rival cannot ask a UNIX socket; ours asks it there, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from hybrid.bench.load import PATH
from hybrid.bench.serving import last_words, new_home, serving, until_ok
from hybrid.engine.launch import MARK
from hybrid.engine.open import scripted_command, vllm_command
from hybrid.engine.vllm import VllmEngine
from hybrid.errors import NotReady, SetupError
from hybrid.keys import Keys
from hybrid.models import materialise
from hybrid.rooms import write_json
from hybrid.settings import EngineSettings, Settings
from hybrid.state import State
from hybrid.types import JSON

ENGINE, OURS, RIVAL = "engine", "hybrid", "litellm"
POLL_S = 0.25
#: how long a process may take to end by itself
GRACE_S = 20.0


@dataclass(frozen=True, slots=True)
class Side:
    """One that is asked: where, with which key, and under which name it knows the base model."""

    name: str
    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


@contextlib.asynccontextmanager
async def stand(settings: Settings, folder: Path, litellm: Path | None) -> AsyncIterator[list[Side]]:
    """The engine of the settings and the gateways before it, all ready: LiteLLM's where the `bin` folder of an
    environment with it is given. Logs and homes are in `folder`.

    Raises SetupError and NotReady, with the last words of a process that did not come up.
    """
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(_engine(settings, folder))
        sides = [engine, await stack.enter_async_context(_ours(settings, folder, engine))]
        if litellm is not None:
            sides.append(await stack.enter_async_context(_rival(settings, folder, engine, litellm)))
        yield sides


@contextlib.asynccontextmanager
async def _engine(settings: Settings, folder: Path) -> AsyncIterator[Side]:
    kind = settings.engine.kind
    if kind.startswith("http"):
        url = kind.rstrip("/").removesuffix("/v1")
        yield Side(ENGINE, url, await _base(url, settings.engine))
        return
    model = await asyncio.to_thread(materialise, settings.model, settings.cache)
    command = scripted_command if kind == "scripted" else vllm_command
    argv, env = await asyncio.to_thread(command, settings, model, lambda: ())
    where, url = _free_port()
    argv = [sys.executable, "-m", "hybrid.engine.launch", *argv, *where]
    async with _process(argv, {**env, MARK: str(os.getpid())}, folder / "engine.log") as process:
        side = Side(ENGINE, url, model.name)
        await _until_it_answers(side, process, folder / "engine.log", settings.engine.start_timeout_s)
        yield side


@contextlib.asynccontextmanager
async def _ours(settings: Settings, folder: Path, engine: Side) -> AsyncIterator[Side]:
    """The server as it is, asked with a key like anyone's."""
    home = new_home(settings, folder)
    async with serving(settings, home, "--no-ui", "--engine", engine.url) as process:
        async with asyncio.timeout(settings.engine.start_timeout_s):
            server = await until_ok(process, home, "/readyz")
        key = await asyncio.to_thread(new_key, home.database, "bench")
        yield Side(OURS, server.url, "base", {"authorization": f"Bearer {key}"})


@contextlib.asynccontextmanager
async def _rival(settings: Settings, folder: Path, engine: Side, litellm: Path) -> AsyncIterator[Side]:
    """LiteLLM's proxy with one model, everything else as it comes; it does not start without a key of its own."""
    key = f"sk-{secrets.token_hex(16)}"
    where, url = _free_port()
    known: JSON = {"model": f"hosted_vllm/{engine.model}", "api_base": f"{engine.url}/v1", "api_key": "none"}
    config = folder / "litellm.yaml"
    write_json(config, {"model_list": [{"model_name": "base", "litellm_params": known}]})  # JSON is YAML, too
    argv = [str(litellm / "litellm"), "--config", str(config), *where]
    # the list of prices that comes with it: it would fetch a newer one at its start
    env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": key}
    async with _process(argv, env, folder / "litellm.log") as process:
        side = Side(RIVAL, url, "base", {"authorization": f"Bearer {key}"})
        await _until_it_answers(side, process, folder / "litellm.log", settings.engine.start_timeout_s)
        yield side


async def litellm_version(bin_: Path) -> str:
    """The version of LiteLLM in an environment, by its `bin` folder. Raises SetupError where there is none."""
    if not (bin_ / "litellm").is_file():
        raise SetupError(
            f"{bin_} holds no `litellm`. Make an environment for it, `python -m venv litellm-env && "
            "litellm-env/bin/pip install 'litellm[proxy]'`, and give --litellm litellm-env/bin."
        )
    ask = "from importlib.metadata import version; print(version('litellm'))"
    process = await asyncio.create_subprocess_exec(str(bin_ / "python"), "-c", ask, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    return said.decode().strip()


@contextlib.asynccontextmanager
async def _process(argv: Sequence[str], env: Mapping[str, str], log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that leads its own group; ended with all that it started."""
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            *argv, env={**os.environ, **env}, stdout=words, stderr=words, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _until_it_answers(side: Side, process: asyncio.subprocess.Process, log: Path, patience_s: float) -> None:
    """Waits for a first answer, which is all that being ready means. Raises NotReady with the last words."""
    body = {"model": side.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    said = "nothing"
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s), aiohttp.ClientSession(side.url, headers=side.headers) as session:
            while process.returncode is None:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.post(PATH, json=body) as response:
                        if response.status == 200:
                            return
                        said = (await response.text())[:300]
                await asyncio.sleep(POLL_S)
    raise NotReady(f"{side.name} does not answer (it said {said}). Its log ends with: {last_words(log)}")


async def _base(url: str, settings: EngineSettings) -> str:
    """The base model of a server that runs. Raises NotReady, EngineError."""
    client = VllmEngine(url, settings)
    try:
        await client.discover()
    finally:
        await client.close()
    return client.model


def new_key(database: Path, name: str) -> str:
    """A key of a home, as anyone could have one."""
    state = State(database)
    try:
        return str(Keys(state).create(name)["key"])
    finally:
        state.close()


def _free_port() -> tuple[list[str], str]:
    """(the flags that say where to listen, the URL of it)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--host", "127.0.0.1", "--port", str(port)], f"http://127.0.0.1:{port}"
