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
async def crowded(home: Path, names: str, **engine: int) -> AsyncIterator[Running]:
    """A server with an adapter of each name; its engine must not have died at the end."""
    async with running(make_home(home, engine={"max_loras": 2, "max_cpu_loras": 2, **engine})) as server:
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


async def test_A7_an_adapter_that_is_retired_still_serves_whom_the_engine_has_admitted(tmp_path: Path) -> None:
    async with crowded(tmp_path, "abcde") as server:
        reads = (await server.engine_log())["reads"]
        for name in "abcde" * 3:
            assert f"{name}@1" in (await ask(server, name))[1]
        assert (await server.engine_log())["reads"] == reads + 15  # each had been pushed out
        version = server.gateway.store.resolve("a")
        waiting = await admitted(server, "a")
        told = await server.post("/v1/unload_lora_adapter", {"lora_name": "a"}, authorization=f"Bearer {TOKEN}")
        assert told[0] == 200
        assert await ask(server, "a") == (404, "model_not_found")
        for name in "bcde":
            assert f"{name}@1" in (await ask(server, name))[1]
        assert "a@1" in (await waiting)[1]

        async def forgotten() -> bool:
            return version.ref.engine_name not in await server.gateway.engine.loaded()

        await until(forgotten)
        assert (version.ref.path / "adapter_model.safetensors").is_file()


async def test_A7_a_mix_makes_room_for_another_and_never_under_an_answer(tmp_path: Path) -> None:
    async with crowded(tmp_path, "abc", max_mixes=1) as server:
        store = server.gateway.store
        waiting = await admitted(server, "mix:a=1,b=1")
        assert await ask(server, "mix:b=1,c=1") == (503, "overloaded")
        for name in "abc":
            assert (await ask(server, name))[0] == 200
        assert "mix@1" in (await waiting)[1]

        async def is_made() -> bool:
            return "mix@2" in (await ask(server, "mix:b=1,c=1"))[1]

        await until(is_made)
        assert not (tmp_path / "adapters" / "mix" / "1").exists()

        async def crowd(n: int) -> set[int]:
            seen = set()
            for i in range(6):
                share = (3 * n + i) % 9 + 1
                seen.add((await ask(server, f"mix:a={share},c={10 - share}"))[0])
                seen |= {(await ask(server, version.id))[0] for version in store.versions("mix")[-1:]}
            return seen

        seen = set().union(*await asyncio.gather(*(crowd(n) for n in range(3))))
        assert 200 in seen
        assert seen <= {200, 404, 503}  # made, taken away already, or no place now
