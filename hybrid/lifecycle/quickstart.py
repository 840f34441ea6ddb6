"""The first hour of a home: the corpora that have documents are indexed, the adapters that have a recipe are ordered.

Training itself is a job like any other; the runner does it, in the background, giving way to every request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.search import Library
from hybrid.lifecycle.orders import Order, Orders
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.jobs import ENDED, JobBook

log = logging.getLogger("hybrid.lifecycle")


class Quickstart:
    """What is left to do in a home, each time it is served."""

    def __init__(self, settings: Settings, *, state: State, store: AdapterStore, library: Library) -> None:
        self._home: Home = settings.rooms
        self._state = state
        self._store = store
        self._library = library
        self._orders = Orders(settings, state=state, store=store)

    async def run(self) -> None:
        """Indexes, then orders. A failure of one job is recorded and the next goes on."""
        for folder in sorted(self._home.index.glob("*/documents")):
            await self._index(folder.parent.name, folder)
        await asyncio.to_thread(self._order)

    def _order(self) -> None:
        """A job for every recipe that has data, no version and no job that is still open."""
        jobs, _ = JobBook(self._state).list(limit=1000)
        waiting = {job["spec"]["name"] for job in jobs if job["status"] not in ENDED}
        for recipe in sorted(self._home.adapters.glob("*/recipe.toml")):
            name = recipe.parent.name
            task = self._home.tasks / name
            if task.is_dir() and not self._store.versions(name) and name not in waiting:
                order = Order(source=task, name=name, quickstart=True)
                self._orders.submit(order, caller="local", admin=True)

    async def _index(self, name: str, folder: Path) -> None:
        if name in self._library.names():  # a look for changes, mostly none: no job to show
            await asyncio.to_thread(self._library.ingest, name, folder)
            return
        with self._job(name) as tell:
            await asyncio.to_thread(
                self._library.ingest, name, folder, progress=lambda _step, done, total: tell(step=done, steps=total)
            )

    @contextlib.contextmanager
    def _job(self, name: str) -> Iterator[Callable[..., None]]:
        job = f"job-{uuid.uuid4().hex[:12]}"
        row: dict[str, Any] = {"kind": "index", "spec": {"name": name}, "created": time.time()}
        self._state.put_job(job, **row, status="running", progress={})

        def tell(**progress: Any) -> None:
            self._state.put_job(job, **row, status="running", progress=progress)

        try:
            yield tell
        except asyncio.CancelledError:
            self._state.put_job(job, **row, status="cancelled")
            raise
        except Exception as error:
            log.exception("the index of %s failed", name)
            self._state.put_job(job, **row, status="failed", error=str(error))
        else:
            self._state.put_job(job, **row, status="succeeded", progress={"step": 1, "steps": 1})
