"""A real server over the scripted engine: the gateway, uvicorn on a real socket, and the engine's own log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from adapters_kit import make_base
from fastapi import FastAPI
from openai import AsyncOpenAI
from tokenizers import Tokenizer, models, pre_tokenizers

from hybrid.boot import open_gateway
from hybrid.gateway import Gateway
from hybrid.keys import Keys
from hybrid.lifecycle.rating import Raters
from hybrid.server.app import create_app
from hybrid.server.run import take_port
from hybrid.settings import Settings

TOKEN = "the-servers-own-token"


def make_home(home: Path, **overrides: Any) -> Settings:
    """Settings for a small home: a base model of toy shapes, and the scripted engine, which is never probed."""
    base = home / "base"
    if not base.exists():
        make_base(base)
        words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.save(str(base / "tokenizer.json"))
    engine = {"kind": "scripted", "probe_every_s": 3600.0, **overrides.pop("engine", {})}
    server = {"port": 0, "ui": False, "quickstart": False, **overrides.pop("server", {})}
    return Settings.load(home=home, model=str(base), engine=engine, server=server, **overrides)


@dataclass
class Running:
    """A server under test and the ways to talk to it."""

    url: str
    gateway: Gateway
    app: FastAPI
    http: aiohttp.ClientSession
    settings: Settings

    @property
    def inflight(self) -> int:
        return self.app.state.house.traffic.inflight

    def client(self, key: str = "none", **more: Any) -> AsyncOpenAI:
        """The official client."""
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **more)

    def keys(self) -> Keys:
        return Keys(self.gateway.state)

    async def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any], Any]:
        """(status, JSON, headers) of a POST; bytes go as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        async with self.http.post(self.url + path, data=raw, headers=sent) as answer:
            return answer.status, await answer.json(content_type=None), answer.headers

    async def get(self, path: str, **headers: str) -> tuple[int, Any, Any]:
        async with self.http.get(self.url + path, headers=headers) as answer:
            text = await answer.text()
            is_json = answer.content_type == "application/json"
            return answer.status, json.loads(text) if is_json else text, answer.headers

    async def metric(self, line: str) -> float:
        """The value of one series, 0 where it does not exist."""
        _, text, _ = await self.get("/metrics", authorization=f"Bearer {TOKEN}")
        values = [row.rsplit(" ", 1)[1] for row in text.splitlines() if row.rsplit(" ", 1)[0] == line]
        return float(values[0]) if values else 0.0

    async def engine_log(self) -> dict[str, Any]:
        """What reached the engine."""
        return await engine_log(self.settings.rooms.root)


async def engine_log(home: Path) -> dict[str, Any]:
    """`GET /scripted/log` over the socket of the engine that belongs to a home."""
    folder = json.loads((home / ".hybrid" / "engine.json").read_text())["folder"]
    connector = aiohttp.UnixConnector(str(Path(folder) / "engine.sock"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get("http://engine/scripted/log") as answer,
    ):
        log: dict[str, Any] = await answer.json()
        return log


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """The server, ready, in this loop."""
    async with open_gateway(settings, rater=Raters(settings)) as gateway:
        app = create_app(gateway, settings, token=TOKEN)
        with take_port(settings.server) as listener:
            config = uvicorn.Config(app, http="httptools", ws="none", log_config=None, timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
            task = asyncio.create_task(server.serve([listener]))
            async with aiohttp.ClientSession() as http:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}"
                await until(lambda: server.started and gateway.ready()[0])
                yield Running(url, gateway, app, http, settings)
            server.should_exit = True
            await task


async def until(true: Callable[[], bool | Awaitable[bool]], timeout_s: float = 60) -> None:
    """Waits until something holds; fails when it never does."""
    end = time.monotonic() + timeout_s
    while True:
        held = true()
        if held if isinstance(held, bool) else await held:
            return
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.02)


def chat(text: str, **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": "base", "messages": [{"role": "user", "content": text}], **more}
