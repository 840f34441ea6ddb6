"""The loop's hands: trains what has a recipe and no version yet, in the background, giving way to every request.

The trainer is a child process (`hybrid train`), niced, stopped while a request runs and continued after it. What it
publishes reaches the running server as any other publication does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.engine.launch import MARK
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.state import State

log = logging.getLogger("hybrid.lifecycle")
IDLE_S = 0.5
NICE = 15


class Quickstart:
    """The first hour of a home: the corpora that have documents are indexed, the adapters that have a recipe trained.

    `busy` says how many requests are in flight; `ready` whether the engine answers: training waits for both.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        state: State,
        store: AdapterStore,
        library: Library,
        busy: Callable[[], int],
        ready: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._home: Home = settings.rooms
        self._state = state
        self._store = store
        self._library = library
        self._busy = busy
        self._ready = ready

    async def run(self) -> None:
        """Does what is left to do, once. A failure of one job is recorded and the next goes on."""
        for folder in sorted(self._home.index.glob("*/documents")):
            await self._index(folder.parent.name, folder)
        while not self._ready():  # noqa: ASYNC110  readiness is asked of the engine, nothing announces it
            await asyncio.sleep(IDLE_S)
        for recipe in sorted(self._home.adapters.glob("*/recipe.toml")):
            name = recipe.parent.name
            task = self._home.tasks / name
            if task.is_dir() and not self._store.versions(name):
                await self._train(name, task)

    async def _index(self, name: str, folder: Path) -> None:
        if name in self._library.names():  # a look for changes, mostly none: no job to show
            await asyncio.to_thread(self._library.ingest, name, folder)
            return
        with self._job("index", name) as tell:
            await asyncio.to_thread(
                self._library.ingest, name, folder, progress=lambda _step, done, total: tell(step=done, steps=total)
            )

    async def _train(self, name: str, task: Path) -> None:
        with self._job("train", name) as tell:
            async for line in self._child(task, name):
                tell(**line)

    @contextlib.contextmanager
    def _job(self, kind: str, name: str) -> Any:
        job = f"job-{uuid.uuid4().hex[:12]}"
        row: dict[str, Any] = {"kind": kind, "spec": {"name": name}, "created": time.time()}
        self._state.put_job(job, **row, status="running", progress={})

        def tell(**progress: Any) -> None:
            self._state.put_job(job, **row, status="running", progress=progress)

        try:
            yield tell
        except asyncio.CancelledError:
            self._state.put_job(job, **row, status="cancelled")
            raise
        except Exception as error:
            log.exception("the %s of %s failed", kind, name)
            self._state.put_job(job, **row, status="failed", error=str(error))
        else:
            self._state.put_job(job, **row, status="succeeded", progress={"step": 1, "steps": 1})

    async def _child(self, task: Path, name: str) -> AsyncIterator[Mapping[str, Any]]:
        """Runs the trainer and yields its progress lines. Raises RuntimeError with its last words when it fails."""
        argv = [sys.executable, "-m", "hybrid.engine.launch", "hybrid.cli"]
        argv += ["train", str(task), "--name", name, "--json", "--progress-json"]
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HYBRID_HOME": str(self._home.root), MARK: str(os.getpid())},
            start_new_session=True,
        )
        os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
        assert child.stdout is not None  # noqa: S101  both are pipes, as asked for above
        assert child.stderr is not None  # noqa: S101
        errors = asyncio.create_task(child.stderr.read())
        yielding = asyncio.create_task(self._give_way(child))
        try:
            async for line in child.stdout:
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
            if await child.wait() != 0:
                raise RuntimeError((await errors).decode(errors="replace").strip()[-500:] or "the trainer failed")
        finally:
            yielding.cancel()
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
            await errors

    async def _give_way(self, child: asyncio.subprocess.Process) -> None:
        """Stops the trainer while requests run: on two cores it would halve their speed."""
        stopped = False
        quiet_since = time.monotonic()
        while True:
            now = time.monotonic()
            if self._busy():
                quiet_since = now
            wanted = now - quiet_since < IDLE_S
            if wanted != stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGSTOP if wanted else signal.SIGCONT)
                stopped = wanted
            await asyncio.sleep(0.1)
