"""What is published becomes what is served, and what is broken does not (rows A2, A3, A4, A8), over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from adapters_kit import filling, make_adapter, make_base

from hybrid.adapters.canary import PROMPTS
from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.preflight import BaseFacts
from hybrid.adapters.store import AdapterStore
from hybrid.engine import WEIGHTS, AdapterRef, Engine
from hybrid.engine.open import open_engine
from hybrid.engine.vllm import VllmEngine
from hybrid.errors import HybridError, ModelNotFound, NotReady, Refused
from hybrid.models import ModelFiles
from hybrid.rooms import Home, sha256_file
from hybrid.settings import EngineSettings, Settings
from hybrid.state import State
from hybrid.types.request import Message


@pytest.fixture
def base(tmp_path: Path) -> BaseFacts:
    return make_base(tmp_path / "base")


@pytest.fixture
def store(tmp_path: Path):
    state = State(tmp_path / "home" / ".hybrid" / "state.db")
    yield AdapterStore(Home(tmp_path / "home"), state)
    state.close()


@contextlib.asynccontextmanager
async def scripted(socket: Path) -> AsyncIterator[tuple[VllmEngine, asyncio.subprocess.Process]]:
    """The scripted server in its own process, and the client of it."""
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hybrid.engine.scripted", "--uds", str(socket), "--max-lora-rank", "64"
    )
    engine = VllmEngine(f"unix:{socket}", EngineSettings(), "scripted")
    try:
        await until(socket.exists)
        await engine.probe(10.0)
        yield engine, server
    finally:
        await engine.close()
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[VllmEngine]:
    async with scripted(tmp_path / "e.sock") as (client, _):
        yield client


class Told:
    """Counts what the gate is told."""

    def __init__(self) -> None:
        self.times = 0

    async def __call__(self) -> None:
        self.times += 1


def loader_for(store: AdapterStore, engine: Engine, base: BaseFacts, **kwargs: object) -> HotLoader:
    return HotLoader(store, engine, base, 32, kwargs.pop("on_change", Told()), **kwargs)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what is watched lives in another process
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(loader: HotLoader) -> AsyncIterator[None]:
    task = asyncio.create_task(loader.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ask(engine: Engine, ref: AdapterRef | None = None) -> str:
    tokens = engine.generate([Message("user", "hello")], adapter=ref.engine_name if ref else None, stream=False)
    return "".join([token.text async for token in tokens])


async def test_a_published_version_goes_live_by_itself(store, engine, base):
    told = Told()
    async with running(loader_for(store, engine, base, on_change=told)):
        store.publish("bank", filling(base))
        await until(lambda: store.alias("bank") == 1)
        version = store.resolve("bank")
        assert version.state == "live"
        assert version.ref.engine_name in await engine.loaded()
        assert version.id in await ask(engine, version.ref)
        await until(lambda: told.times > 0)


async def test_a_later_version_takes_the_name_and_the_old_one_drains(store, engine, base):
    busy: set[str] = set()
    loader = loader_for(store, engine, base, in_use=lambda name: int(name in busy))
    for seed in (1, 2):
        store.publish("bank", filling(base, seed=seed))
        version = await loader.load_now(f"bank@{seed}")
        busy.add(version.ref.engine_name)
    await loader.settle()
    assert [v.state for v in store.versions("bank")] == ["draining", "live"]
    busy.clear()
    await loader.settle()
    assert [v.state for v in store.versions("bank")] == ["candidate", "live"]
    assert {v.ref.engine_name for v in store.versions("bank")} == await engine.loaded()


@pytest.mark.parametrize(
    ("first", "second", "live"),
    [
        ({"dev_loss": 1.0, "dev_sha256": "d"}, {"dev_loss": 1.2, "dev_sha256": "d"}, 1),
        ({"dev_loss": 1.0, "dev_sha256": "d"}, {"dev_loss": 1.01, "dev_sha256": "d"}, 2),
        ({"dev_loss": 1.0, "dev_sha256": "d"}, {"dev_loss": 0.5, "dev_sha256": "d"}, 2),
        ({"dev_loss": 1.0, "dev_sha256": "d"}, {"dev_loss": 9.9, "dev_sha256": "e"}, 2),
        ({"dev_loss": 1.0, "dev_sha256": "d"}, {}, 2),
    ],
)
async def test_a_version_measured_worse_stays_a_candidate(store, engine, base, first, second, live):
    loader = loader_for(store, engine, base)
    for seed, metrics in enumerate((first, second), 1):
        store.publish("bank", filling(base, {"metrics": metrics}, seed=seed))
        await loader.load_now(f"bank@{seed}")
    assert store.alias("bank") == live
    assert store.resolve("bank@2").state == ("live" if live == 2 else "candidate")
    assert ("is worse than" in store.resolve("bank@2").reason) == (live == 1)


async def test_versions_published_together_leave_the_newest_with_the_name(store, engine, base):
    for seed in range(1, 5):
        store.publish("bank", filling(base, seed=seed))
    async with running(loader_for(store, engine, base)):
        await until(lambda: all(v.state in ("live", "draining", "candidate") for v in store.versions("bank")))
        await until(lambda: store.alias("bank") == 4)


async def test_load_now_is_single_flight(store, engine, base):
    loader = loader_for(store, engine, base)
    store.publish("bank", filling(base))
    results = await asyncio.gather(*(loader.load_now("bank@1") for _ in range(20)), loader.settle())
    assert {v.id for v in results if v} == {"bank@1"}
    assert await loader.load_now("bank") == store.resolve("bank")


async def test_a_caller_who_gives_up_does_not_stop_the_load_for_the_others(store, engine, base):
    loader = loader_for(store, engine, base)
    store.publish("bank", filling(base))
    impatient, patient = (asyncio.create_task(loader.load_now("bank@1")) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert (await patient).state == "live"


async def test_retired_versions_are_unloaded_when_no_answer_needs_them(store, engine, base):
    busy: set[str] = set()
    loader = loader_for(store, engine, base, in_use=lambda name: int(name in busy))
    store.publish("bank", filling(base))
    ref = (await loader.load_now("bank@1")).ref
    busy.add(ref.engine_name)
    store.retire("bank", 1)
    await loader.settle()
    assert await engine.loaded() == {ref.engine_name}
    busy.clear()
    await loader.settle()
    assert await engine.loaded() == frozenset()
    assert ref.path.is_dir()
    with pytest.raises(ModelNotFound, match="retired"):
        await loader.load_now("bank@1")


async def test_a_promotion_elsewhere_is_noticed(store, engine, base, tmp_path):
    told = Told()
    loader = loader_for(store, engine, base, on_change=told)
    for seed in (1, 2):
        store.publish("bank", filling(base, seed=seed))
        await loader.load_now(f"bank@{seed}")
    before = told.times
    other = AdapterStore(Home(tmp_path / "home"), State(tmp_path / "home" / ".hybrid" / "state.db"))
    assert other.rollback("bank") == 1
    await loader.settle()
    assert store.alias("bank") == 1
    assert told.times == before + 1


async def test_a_gate_that_fails_is_told_again_and_the_adapter_serves(store, engine, base):
    calls: list[int] = []

    async def on_change() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no embedder")

    loader = loader_for(store, engine, base, on_change=on_change)
    await loader.settle()
    store.publish("bank", filling(base))
    assert (await loader.load_now("bank@1")).state == "live"
    await loader.settle()
    assert len(calls) == 2


async def test_A2_canary_finds_what_preflight_would_have(store, engine, base, tmp_path):
    """An adapter for another base that reached the engine: its matrices change nothing."""
    stranger = make_base(tmp_path / "stranger", prefix="other.")
    store.publish("bank", filling(stranger, {"base_sha256": None}, zero_b=True))
    loader = HotLoader(store, engine, stranger, 32, Told())  # preflight believes in the stranger
    with pytest.raises(Refused, match="no effect"):
        await loader.load_now("bank@1")


async def test_A1_a_refused_stranger_never_reaches_the_engine_and_leaves_nothing(store, engine, base, tmp_path):
    loader = loader_for(store, engine, base)
    with pytest.raises(Refused, match="DoRA"):
        store.adopt("bank", make_adapter(tmp_path / "bad", base, use_dora=True), loader.inspect)
    assert store.versions() == []
    version = store.adopt("bank", make_adapter(tmp_path / "good", base), loader.inspect)
    assert (await loader.load_now(version.id)).state == "live"


async def test_A3_fifty_bad_loads_disturb_nobody(store, engine, base):
    answers: list[str] = []
    stop = asyncio.Event()
    bad = [{"r": 1024}, {"use_dora": True}, {"bias": "all"}, {"zero_b": True}, {"peft_type": "LOHA"}]
    loader = loader_for(store, engine, base)
    store.publish("good", filling(base))
    good = await loader.load_now("good@1")

    async def traffic() -> None:
        while not stop.is_set():
            answers.append(await ask(engine, good.ref))

    streams = [asyncio.create_task(traffic()) for _ in range(4)]
    for i in range(50):
        store.publish(f"bad{i}", filling(base, **bad[i % len(bad)]))
    async with running(loader):
        await until(lambda: all(v.state == "rejected" for v in store.versions() if v.name != "good"))
    await loader.settle()
    stop.set()
    await asyncio.gather(*streams)  # raises if any answer failed
    assert len(answers) > 50
    assert set(answers) == {answers[0]}
    assert all(v.reason for v in store.versions() if v.name != "good")
    assert await engine.loaded() == {good.ref.engine_name}


async def test_a_version_that_was_judged_during_a_pass_is_not_judged_again(store, engine, base, monkeypatch):
    loader = loader_for(store, engine, base)
    store.publish("old", filling(base, zero_b=True))
    with pytest.raises(Refused):
        await loader.load_now("old@1")  # the engine holds it until the next pass
    store.publish("bad", filling(base, zero_b=True))
    load, unload, go = engine.load, engine.unload, asyncio.Event()

    async def held(ref: AdapterRef) -> None:
        await go.wait()
        await load(ref)

    async def slow(name: str) -> None:
        go.set()
        await until(lambda: store.resolve("bad@1").state == "rejected" and not loader.is_loading("bad@1"))
        await unload(name)

    monkeypatch.setattr(engine, "load", held)
    monkeypatch.setattr(engine, "unload", slow)
    judged = asyncio.create_task(loader.load_now("bad@1"))
    await until(lambda: loader.is_loading("bad@1"))
    await loader.settle()
    assert not loader.is_loading("bad@1")
    with pytest.raises(Refused, match="no effect"):
        await judged


async def test_A4_an_adapter_without_effect_is_rejected_and_the_name_stays(store, engine, base):
    loader = loader_for(store, engine, base)
    store.publish("bank", filling(base))
    await loader.load_now("bank@1")
    store.publish("bank", filling(base, zero_b=True))
    with pytest.raises(Refused, match="no effect"):
        await loader.load_now("bank@2")
    assert store.alias("bank") == 1
    assert store.resolve("bank@2").state == "rejected"
    await loader.settle()
    assert [v.ref.engine_name for v in store.versions("bank")][:1] == list(await engine.loaded())
    with pytest.raises(Refused, match="was refused: the adapter has no effect"):
        await loader.load_now("bank@2")


async def test_the_engine_must_agree_with_the_trainer(store, engine, base, tmp_path):
    """The card records what PEFT computed; here, what the engine itself says of the same weights."""
    text = PROMPTS[0]
    folder = make_adapter(tmp_path / "probe", base, seed=7)
    ref = AdapterRef("probe", 1, sha256_file(folder / WEIGHTS), folder)
    await engine.load(ref)
    truth = await engine.prompt_logprobs(text, adapter=ref.engine_name)
    loader = loader_for(store, engine, base)
    cases = {
        "same": list(truth),
        "other": [x - 1.0 for x in truth],
        "short": list(truth)[:-1],
        "broken": "not numbers",
    }
    for name, logprobs in cases.items():
        store.publish(name, filling(base, {"canary": {"prompt": text, "logprobs": logprobs}}, seed=7))
    assert (await loader.load_now("same@1")).state == "live"
    for name, reason in (("other", "by 1.000 nats"), ("short", "another tokenizer"), ("broken", "canary must hold")):
        with pytest.raises(Refused, match=reason):
            await loader.load_now(f"{name}@1")


async def test_nothing_happens_while_the_engine_is_not_ready(store, base, tmp_path):
    engine = VllmEngine(f"unix:{tmp_path / 'nobody.sock'}", EngineSettings(), "scripted")
    loader = loader_for(store, engine, base)
    store.publish("bank", filling(base))
    await loader.settle()
    with pytest.raises(NotReady):
        await loader.load_now("bank@1")
    assert store.resolve("bank@1").state == "staged"
    await engine.close()


async def test_an_engine_that_dies_in_a_load_is_not_the_adapters_fault(store, base, tmp_path):
    async with scripted(tmp_path / "e.sock") as (engine, server):
        loader = loader_for(store, engine, base)
        store.publish("bank", filling(base))
        server.kill()
        await server.wait()
        with pytest.raises(HybridError):
            await loader.load_now("bank@1")
        assert store.resolve("bank@1").state == "staged"
        assert "tried again soon" in store.resolve("bank@1").reason


async def test_an_adapter_that_keeps_breaking_the_engine_is_rejected(store, base, tmp_path):
    async with scripted(tmp_path / "e.sock") as (engine, server):
        loader = loader_for(store, engine, base)
        store.publish("bank", filling(base))
        server.kill()
        await server.wait()
        for _ in range(3):
            with pytest.raises(HybridError):
                await loader.load_now("bank@1")
        assert store.resolve("bank@1").state == "rejected"
        assert "failed 3 times" in store.resolve("bank@1").reason


async def test_what_a_foreign_engine_forgot_is_loaded_again(store, base, tmp_path):
    """A server at a URL restarts without our knowledge: the reconciler sees what it lacks."""
    async with scripted(tmp_path / "e.sock") as (engine, _):
        loader = loader_for(store, engine, base)
        store.publish("bank", filling(base))
        ref = (await loader.load_now("bank@1")).ref
        await engine.unload(ref.engine_name)
        async with running(loader):
            async with asyncio.timeout(20):
                while ref.engine_name not in await engine.loaded():  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert store.resolve("bank").state == "live"


async def test_A8_after_a_crash_all_that_was_live_is_back_before_ready(store, base, tmp_path):
    settings = Settings.load(home=tmp_path / "home", engine={"kind": "scripted"})
    model = ModelFiles("scripted", tmp_path / "base", base.sha256)
    engine = await open_engine(settings, model, store.desired)
    try:
        await until(lambda: engine.status().ready)
        loader = loader_for(store, engine, base)
        for name in ("bank", "voice", "lost"):
            store.publish(name, filling(base))
            await loader.load_now(f"{name}@1")
        (store.resolve("lost").ref.path / "adapter_config.json").unlink()
        os.kill(engine.status().pids[0], signal.SIGKILL)
        await until(lambda: engine.status().restarts == 1 and engine.status().ready)
        assert await engine.loaded() == {store.resolve(name).ref.engine_name for name in ("bank", "voice")}
        assert "lost@1" in engine.status().detail
        for name in ("bank", "voice"):
            assert f"{name}@1" in await ask(engine, store.resolve(name).ref)
        assert store.resolve("lost").state == "live"  # its files may come back; the others serve on
    finally:
        await engine.close()
