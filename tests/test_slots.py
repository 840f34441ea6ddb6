"""More adapters than the engine keeps in memory (row A7): it reads the files of the others again in the midst of its
work, and dies where they are gone. The scripted engine does as vLLM does, with two places."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from adapters_kit import filling
from server_kit import TOKEN, Running, chat, make_home, running, until

from hybrid.adapters.preflight import read_base

#: an answer that has been admitted, and whose tokens are long in coming
SLOW = "@delay 600ms\nhello"


@contextlib.asynccontextmanager
async def crowded(home: Path, names: str) -> AsyncIterator[Running]:
    """A server with an adapter of each name; its engine must not have died at the end."""
    async with running(make_home(home, engine={"max_loras": 2, "max_cpu_loras": 2, "max_mixes": 1})) as server:
        base, gateway = read_base(Path(server.settings.model)), server.gateway
        for seed, name in enumerate(names):
            await asyncio.to_thread(gateway.store.publish, name, filling(base, seed=seed))
            await gateway.loader.load_now(f"{name}@1")
        before = gateway.engine.status()
        yield server
        now = gateway.engine.status()
        assert (now.ready, now.restarts, now.pids) == (True, 0, before.pids)


async def ask(server: Running, model: str, text: str = "hello") -> tuple[int, str]:
    """The status, and what was said."""
    status, body, _ = await server.post("/v1/chat/completions", chat(text, model=model))
    return status, body["choices"][0]["message"]["content"] if status == 200 else body["error"]["code"]


async def admitted(server: Running, model: str) -> asyncio.Task[tuple[int, str]]:
    """An answer that the engine has begun to make."""
    task = asyncio.create_task(ask(server, model, SLOW))

    async def begun() -> bool:
        return (await server.engine_log())["active"] == 1

    await until(begun)
    return task


async def test_A7_files_stay_for_whom_the_engine_has_admitted(tmp_path: Path) -> None:
    async with crowded(tmp_path, "abcde") as server:
        await round_robin(server, "abcde")
        await retire_under_an_answer(server, "a", others="bcde")
        await mixes_make_room(server, tmp_path / "adapters" / "mix")


async def round_robin(server: Running, names: str) -> None:
    before = (await server.engine_log())["reads"]
    for name in names * 3:
        assert f"{name}@1" in (await ask(server, name))[1]
    assert (await server.engine_log())["reads"] == before + 3 * len(names)  # each had been pushed out


async def retire_under_an_answer(server: Running, name: str, others: str) -> None:
    version = server.gateway.store.resolve(name)
    waiting = await admitted(server, name)
    told = await server.post("/v1/unload_lora_adapter", {"lora_name": name}, authorization=f"Bearer {TOKEN}")
    assert told[0] == 200
    assert await ask(server, name) == (404, "model_not_found")
    for other in others:
        assert f"{other}@1" in (await ask(server, other))[1]
    assert f"{name}@1" in (await waiting)[1]

    async def forgotten() -> bool:
        return version.ref.engine_name not in await server.gateway.engine.loaded()

    await until(forgotten)
    assert (version.ref.path / "adapter_model.safetensors").is_file()


async def mixes_make_room(server: Running, room: Path) -> None:
    """Where one mix is kept, its place is another's once no answer needs it, and its files go with it."""
    store = server.gateway.store
    waiting = await admitted(server, "mix:b=1,c=1")
    assert await ask(server, "mix:c=1,d=1") == (503, "overloaded")
    for name in "bcd":
        assert (await ask(server, name))[0] == 200
    assert "mix@1" in (await waiting)[1]

    async def is_made() -> bool:
        return "mix@2" in (await ask(server, "mix:c=1,d=1"))[1]

    await until(is_made)
    assert not (room / "1").exists()

    async def crowd(n: int) -> set[int]:
        seen = set()
        for i in range(6):
            share = (3 * n + i) % 9 + 1
            seen.add((await ask(server, f"mix:b={share},d={10 - share}"))[0])
            seen |= {(await ask(server, version.id))[0] for version in store.versions("mix")[-1:]}
        return seen

    seen = set().union(*await asyncio.gather(*(crowd(n) for n in range(3))))
    assert 200 in seen
    assert seen <= {200, 404, 503}  # made, taken away already, or no place now
