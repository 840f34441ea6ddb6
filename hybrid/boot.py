"""Builds a gateway from settings, and keeps it in step with its home while it serves.

Nothing here waits for the engine: the child starts first and loads its model while the embedder, the corpora and the
gate are made ready beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.preflight import read_base
from hybrid.adapters.store import AdapterStore
from hybrid.engine.open import open_engine
from hybrid.errors import NotReady
from hybrid.gate.decide import Decider
from hybrid.gate.enrol import Enrolment
from hybrid.gate.policy import Policy
from hybrid.gateway import Gateway
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.lending import lent
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.models import ModelFiles, is_small, materialise
from hybrid.rooms import Home
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.strategies.panel import Rater

log = logging.getLogger("hybrid.boot")
REFRESH_S = 1.0

Progress = Callable[[str, int, int], None]


@contextlib.asynccontextmanager
async def open_gateway(
    settings: Settings, progress: Progress | None = None, rater: Rater | None = None
) -> AsyncIterator[Gateway]:
    """A running gateway, whose panels ask `rater` for rewards. Raises SetupError when a model cannot be had; the
    engine's start is not waited for."""
    offline_environment()
    home = settings.rooms
    model = await asyncio.to_thread(materialise, settings.model, settings.cache, progress)
    embedding = await asyncio.to_thread(materialise, settings.embedder, settings.cache, progress)
    state = State(home.database)
    store = AdapterStore(home, state, model.sha256)
    engine = await open_engine(settings, model, lambda: store.desired(settings.engine.max_cpu_loras))
    embedder = Embedder(embedding.path, embedding.name)
    library = Library(home, embedder, settings.retrieval)
    shelves = Shelves(lambda: example_folders(home, store), embedder, home.hidden / "cache")
    enrolment = Enrolment(home, store, shelves, library, settings.cache, state.measurements)
    gateway: Gateway

    changed = asyncio.Event()

    async def reenrol() -> None:
        changed.set()  # fitting the gate takes seconds, and the next adapter must not wait for it

    loader = HotLoader(
        store,
        engine,
        base=await asyncio.to_thread(read_base, model.path, model.sha256),
        max_rank=settings.engine.max_lora_rank,
        on_change=reenrol,
        in_use=lambda name: gateway.in_use(name),
        max_loaded=settings.engine.max_cpu_loras,
        patience_s=settings.engine.first_byte_timeout_s,
    )
    gateway = Gateway(
        settings,
        state=state,
        engine=engine,
        store=store,
        loader=loader,
        library=library,
        shelves=shelves,
        decider=Decider(enrolment.gate, Policy(settings.gate), library, settings.gate),
        count_tokens=token_counter(model),
        secret=_secret(home),
        enrolment=enrolment,
        small=await asyncio.to_thread(is_small, model),
        rater=rater,
    )
    tasks = [
        asyncio.create_task(_keep_in_step(enrolment, library, changed)),
        asyncio.create_task(loader.run()),
        asyncio.create_task(gateway.journal.run()),
    ]
    try:
        yield gateway
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()
        state.close()


async def _keep_in_step(enrolment: Enrolment, library: Library, changed: asyncio.Event) -> None:
    """Warms the gate, then takes in what is published: at once where `changed` tells, else within a second."""
    while True:
        changed.clear()
        try:
            await asyncio.to_thread(library.refresh)
            await asyncio.to_thread(enrolment.refresh)
        except Exception:
            # a half-copied folder or a full disk must not stop the watching
            log.exception("the home could not be read; trying again")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), REFRESH_S)


async def wait_ready(gateway: Gateway, timeout_s: float, progress: Progress) -> None:
    """Waits until an answer would work. Raises NotReady after `timeout_s`, with the phase it is stuck in."""
    began = time.monotonic()
    while True:
        ready, phase, detail = gateway.ready()
        if ready:
            return
        progress(phase, 0, 1)
        if time.monotonic() - began > timeout_s:
            raise NotReady(f"Not ready after {timeout_s:.0f} s: {phase}. {detail} See .hybrid/logs/engine.log.")
        await asyncio.sleep(0.2)


def example_folders(home: Home, store: AdapterStore) -> Mapping[str, Path]:
    """Where each task's examples lie: a task folder, or the live version of an adapter of that name.

    An adapter's examples win, because they are what was really learned from; over both goes what is lent.
    """
    folders = {p.parent.name: p.parent for p in home.tasks.glob("*/task.json")}
    for name in store.names():
        live = store.alias(name)
        if live is not None:
            path = store.resolve(f"{name}@{live}").ref.path
            if (path / "examples.jsonl").exists():
                folders[name] = path
    return {**folders, **lent(home)}


def token_counter(model: ModelFiles) -> Callable[[str], int]:
    """Counts tokens as the base model does, with its tokenizer alone (no transformers import in the gateway)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _secret(home: Home) -> bytes:
    """This home's secret, made once, readable by its owner alone."""
    path = home.hidden / "secret"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(32))
    return path.read_bytes()
