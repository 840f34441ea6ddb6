"""The reconciler: what is published becomes what is served, without a restart.

Once a second it reads the store and starts a flight for every version that is not decided yet:

    staged ─► preflight ─► Engine.load ─► canary ─► candidate ─► (alias rule) ─► live; the one before it drains

The store is the truth and the engine forgets everything: what should be loaded and is not is loaded again, what was
retired or rejected is unloaded when no answer needs it. Flights are apart: a bad or slow adapter delays none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from hybrid.adapters.canary import Recording, canary
from hybrid.adapters.kinds import LORA, check_other
from hybrid.adapters.listing import MIX, PENDING, AdapterVersion
from hybrid.adapters.preflight import BaseFacts, check
from hybrid.adapters.store import AdapterStore
from hybrid.engine import Engine
from hybrid.errors import Conflict, HybridError, ModelNotFound, NotReady, Refused

log = logging.getLogger(__name__)

EVERY_S = 1.0
#: a version that breaks the engine this often is refused, so that it cannot do so for ever
MAX_FAILURES = 3
#: preflights at once: they read files and compute, and the engine needs the cores
PREFLIGHTS = 2
#: relative difference of two dev losses that another seed would explain; a smaller one is no measurement
LOSS_NOISE = 0.02


class HotLoader:
    """Keeps one engine in step with one store. `in_use` tells how many answers an adapter is making now; nobody waits
    for a load longer than `patience_s`."""

    def __init__(
        self,
        store: AdapterStore,
        engine: Engine,
        base: BaseFacts,
        max_rank: int,
        on_change: Callable[[], Awaitable[None]],
        *,
        in_use: Callable[[str], int] = lambda _: 0,
        max_loaded: int | None = None,
        patience_s: float | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._base = base
        self._max_rank = max_rank
        self._on_change = on_change
        self._in_use = in_use
        self._max_loaded = max_loaded
        self._patience_s = patience_s
        self._flights: dict[str, asyncio.Task[AdapterVersion]] = {}
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._deciding = asyncio.Lock()
        self._preflights = asyncio.Semaphore(PREFLIGHTS)
        self._served: frozenset[tuple[str, int]] = frozenset()

    async def run(self) -> None:
        """Reconciles for ever; cancelling it ends the flights too."""
        try:
            while True:
                try:
                    await self.settle()
                except Exception:
                    # a full disk or a dying engine must not end the watching
                    log.exception("adapters could not be reconciled; trying again")
                await asyncio.sleep(EVERY_S)
        finally:
            flights = list(self._flights.values())
            for flight in flights:
                flight.cancel()
            await asyncio.gather(*flights, return_exceptions=True)

    async def settle(self) -> None:
        """One pass: notices what changed, starts what is due, waits for none of the flights."""
        await asyncio.to_thread(self._store.refresh)
        await self._announce()
        await self._end_draining()
        if not self._engine.status().ready:
            return
        loaded = await self._engine.loaded()
        for version in self._store.versions():
            name = version.ref.engine_name
            if version.state in ("retired", "rejected") and name in loaded and not self._in_use(name):
                await self._engine.unload(name)
            elif version.state in PENDING and self._is_pending(version.id) and self._is_due(version.id):
                self._start(version.id, self._admit(version))
        for ref in self._store.desired(self._max_loaded):
            if ref.engine_name not in loaded and self._is_due(ref.id):
                self._start(ref.id, self._reload(self._store.resolve(ref.id)))

    async def load_now(self, spec: str) -> AdapterVersion:
        """The version that `spec` means, as it is once checked and loaded; callers of one version share the work.
        What the engine does not load is checked only.

        Raises ModelNotFound for an unknown or retired one, Refused with the reason for one that failed its checks,
        NotReady while the engine starts or when the load takes too long (it goes on), and the engine's errors.
        """
        version = self._store.resolve(spec)
        if version.state == "retired":
            raise ModelNotFound(f"{version.id} is retired; use another version of it.", param="model")
        if version.state == "rejected":
            raise Refused(f"{version.id} was refused: {version.reason}")
        pending = version.state in PENDING
        if version.kind != LORA and not pending:
            return version
        status = self._engine.status()
        if not status.ready:
            raise NotReady(f"The engine is not ready ({status.phase}); repeat in a moment.")
        if not pending and version.ref.engine_name in await self._engine.loaded():
            return version
        self._start(version.id, self._admit(version) if pending else self._reload(version))
        flight = self._flights[version.id]
        done, _ = await asyncio.wait({flight}, timeout=self._patience_s)  # it goes on when this caller is cancelled
        if not done:
            raise NotReady(f"{version.id} is still being loaded; repeat in a moment.")
        return flight.result()

    def is_loading(self, id: str) -> bool:
        """Whether a version is being checked or loaded now."""
        return id in self._flights

    def inspect(self, folder: Path) -> None:
        """Preflight of a folder that is no version yet. Raises Refused."""
        check(folder, self._base, self._max_rank)

    def _is_pending(self, id: str) -> bool:
        """Whether a version waits for its checks at this moment; a pass may have begun when it still did."""
        try:
            return self._store.resolve(id).state in PENDING
        except ModelNotFound:
            return False

    def _is_due(self, id: str) -> bool:
        """Whether to start now: one that failed before waits, and flies alone, so that no other gets the blame."""
        if id not in self._failures:
            return True
        return not self._flights and time.monotonic() >= self._not_before[id]

    def _start(self, id: str, flight: Coroutine[Any, Any, AdapterVersion]) -> None:
        """Starts a flight unless one for this version is in the air."""
        if id in self._flights:
            flight.close()
            return
        task = asyncio.create_task(flight, name=f"hotload {id}")
        self._flights[id] = task
        task.add_done_callback(lambda done: self._landed(id, done))

    def _landed(self, id: str, task: asyncio.Task[AdapterVersion]) -> None:
        del self._flights[id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("adapter %s: %s", id, error)

    async def _admit(self, version: AdapterVersion) -> AdapterVersion:
        """Takes a pending version through its checks to candidate or live. Raises Refused once it is rejected."""
        try:
            remark = await self._examine(version)
        except Refused as refusal:
            await self._mark(version, "rejected", refusal.message)
            raise
        except HybridError as error:
            await self._postpone(version, error)
            raise
        await self._mark(version, "candidate", remark)
        await self._decide(version)
        await self._announce()
        return self._store.resolve(version.id)

    async def _examine(self, version: AdapterVersion) -> str:
        """Preflight, load, canary; for what the engine does not load, its files. Raises Refused, and engine errors."""
        await self._mark(version, "preflight")
        if version.kind != LORA:
            async with self._preflights:
                await asyncio.to_thread(check_other, version.ref.path, version.card, self._base)
            return version.serve_with
        async with self._preflights:
            await asyncio.to_thread(check, version.ref.path, self._base, self._max_rank)
        recording = Recording.of(version.card)
        try:
            await self._engine.load(version.ref)
        except Refused:
            await self._engine.loaded()  # raises when the engine is gone: then the refusal says nothing of the adapter
            raise
        await self._mark(version, "loaded")
        await self._mark(version, "canary")
        return await canary(self._engine, version.ref, recording)

    async def _reload(self, version: AdapterVersion) -> AdapterVersion:
        """Loads a version that passed its checks before; one that fails is tried again later and keeps its state."""
        try:
            await self._engine.load(version.ref)
        except HybridError:
            self._wait(version.id)
            raise
        self._forgive(version.id)
        return version

    async def _postpone(self, version: AdapterVersion, error: HybridError) -> None:
        """The engine failed, not the adapter, unless it keeps happening with this one."""
        failures = self._wait(version.id)
        if failures >= MAX_FAILURES:
            await self._mark(version, "rejected", f"the engine failed {failures} times on it: {error.message}")
        elif self._store.resolve(version.id).state in PENDING:
            await self._mark(version, "staged", f"tried again soon: {error.message}")

    def _wait(self, id: str) -> int:
        """Counts a failure and puts the next try off, longer each time. Returns the count."""
        failures = self._failures[id] = self._failures.get(id, 0) + 1
        self._not_before[id] = time.monotonic() + min(2.0**failures, 60.0)
        return failures

    def _forgive(self, id: str) -> None:
        self._failures.pop(id, None)
        self._not_before.pop(id, None)

    async def _decide(self, version: AdapterVersion) -> None:
        """The alias rule: the first version takes the name; a later one takes it unless it is measured worse."""
        if version.kind != LORA or version.name == MIX:
            return
        async with self._deciding:
            await asyncio.to_thread(self._store.refresh)
            live = self._store.alias(version.name)
            if live is not None:
                current = self._store.resolve(f"{version.name}@{live}")
                if version.version < live or version.card.get("promote") is False:
                    return
                if reason := worse(version, current):
                    await self._mark(version, "candidate", reason)
                    return
            seen = self._store.revision(version.name)
            try:
                await asyncio.to_thread(self._store.promote, version.name, version.version, revision=seen)
            except Conflict as conflict:
                log.info("adapter %s stays a candidate: %s", version.id, conflict)

    async def _end_draining(self) -> None:
        for version in self._store.versions():
            if version.state == "draining" and not self._in_use(version.ref.engine_name):
                try:
                    await asyncio.to_thread(self._store.mark, version.id, "candidate", was="draining")
                except Conflict:
                    continue  # it was promoted again or retired meanwhile

    async def _announce(self) -> None:
        """Tells the gate when the names or what they mean have changed, whoever changed them."""
        served = frozenset((name, live) for name in self._store.names() if (live := self._store.alias(name)))
        if served == self._served:
            return
        self._served = served
        try:
            await self._on_change()
        except Exception:
            # the adapter serves by its name all the same; the next pass tells again
            self._served = frozenset()
            log.exception("the gate could not take in the change; trying again")

    async def _mark(self, version: AdapterVersion, state: str, reason: str = "") -> None:
        await asyncio.to_thread(self._store.mark, version.id, state, reason)


def worse(version: AdapterVersion, current: AdapterVersion) -> str:
    """Why `version` should not replace `current`: measured on the same dev split, its loss is higher by more than
    noise. "" when it may, or when the two cannot be compared."""
    ours, theirs = version.card.get("metrics"), current.card.get("metrics")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return ""
    if not ours.get("dev_sha256") or ours["dev_sha256"] != theirs.get("dev_sha256"):
        return ""
    new, old = ours.get("dev_loss"), theirs.get("dev_loss")
    if not isinstance(new, int | float) or not isinstance(old, int | float) or new <= old * (1 + LOSS_NOISE):
        return ""
    return f"its dev loss {new:.4f} is worse than {old:.4f} of {current.id}, which keeps the name."
