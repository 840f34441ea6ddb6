"""The engine kept ready: whatever happens to the server, this is what the gateway holds on to.

    start ──► answers /health ──► gives a token ──► desired adapters loaded ──► ready ──► lost ──► wait, start again

A managed child that ends or hangs is restarted, after 1, 2, 4 … 30 s; at a URL the server is waited for. An adapter
that will not load is named in the status and holds nothing up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from hybrid.engine import AdapterRef, EngineStatus
from hybrid.engine.process import EngineProcess
from hybrid.engine.vllm import VllmEngine
from hybrid.errors import EngineError, HybridError, NotReady, Overloaded, Refused
from hybrid.settings import EngineSettings
from hybrid.types.event import Token
from hybrid.types.request import Message

log = logging.getLogger("hybrid.engine")

#: crashes older than this are forgiven
WINDOW_S = 600.0
LONGEST_WAIT_S = 30.0
POLL_S = 0.25

#: what vLLM puts before the words of a log line: (process) LEVEL date time [file:line]
_LOG_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?([A-Z]+:? +)?([\d-]+ [\d:]+ )?(\[\S+\] )?\s*")


class Supervisor:
    """An `Engine` that keeps `client`'s server ready. `process` is the child, or None for a server at a URL."""

    def __init__(
        self,
        client: VllmEngine,
        process: EngineProcess | None,
        desired: Callable[[], Sequence[AdapterRef]],
        settings: EngineSettings,
    ) -> None:
        self._client = client
        self._process = process
        self._desired = desired
        self._settings = settings
        self._ready = False
        self._phase, self._detail = "starting engine" if process else "waiting for engine", ""
        self._refused: dict[str, str] = {}
        self._held: set[str] = set()
        self._restarts = 0
        self._lost_at: deque[float] = deque(maxlen=settings.restart_limit + 1)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to keep the engine; returns at once."""
        self._task = asyncio.create_task(self._keep(), name="engine supervisor")

    # --- Engine ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        messages: Sequence[Message] | None = None,
        *,
        prompt: Any = None,
        adapter: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        stream: bool = True,
        request_id: str = "",
        cache_salt: str = "",
    ) -> AsyncIterator[Token]:
        """See `Engine.generate`. Refuses with NotReady, without asking, while the engine is not ready."""
        if not self._ready:
            return _refuse(self._not_ready())
        return self._client.generate(
            messages,
            prompt=prompt,
            adapter=adapter,
            sampling=sampling,
            stream=stream,
            request_id=request_id,
            cache_salt=cache_salt,
        )

    async def load(self, adapter: AdapterRef) -> None:
        """See `Engine.load`."""
        self._require_ready()
        await self._client.load(adapter)
        self._held.add(adapter.engine_name)

    async def unload(self, engine_name: str) -> None:
        """See `Engine.unload`."""
        self._require_ready()
        await self._client.unload(engine_name)
        self._held.discard(engine_name)

    async def loaded(self) -> frozenset[str]:
        """See `Engine.loaded`. Of a child nobody else can load or unload, so it need not be asked."""
        self._require_ready()
        return frozenset(self._held) if self._process else await self._client.loaded()

    async def prompt_logprobs(self, prompt: str, *, adapter: str | None = None) -> tuple[float, ...]:
        """See `Engine.prompt_logprobs`."""
        self._require_ready()
        return await self._client.prompt_logprobs(prompt, adapter=adapter)

    def status(self) -> EngineStatus:
        """See `Engine.status`. While it starts, the detail is the last line of the engine's log."""
        process, known = self._process, self._client.status()
        refused = "; ".join(f"{name} could not be loaded: {why}" for name, why in self._refused.items())
        tail = process.tail() if process and not self._ready else ()
        detail = self._detail or refused or (_LOG_PREFIX.sub("", tail[-1]) if tail else "")
        return EngineStatus(
            ready=self._ready,
            phase=self._phase,
            detail=detail,
            model=known.model,
            max_model_len=known.max_model_len,
            pids=process.pids if process else (),
            restarts=self._restarts,
            breaker=known.breaker,
            retries_refused=known.retries_refused,
            log_tail=tail,
        )

    async def close(self) -> None:
        """Stops keeping the engine, and the engine itself where it is our child."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._lose("stopped", "")
        await self._client.close()
        if self._process:
            await self._process.close()

    # --- keeping it --------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            try:
                await self._bring_up()
                await self._watch()
            except HybridError as error:
                self._lose("restarting engine" if self._process else "waiting for engine", error.message)
            except Exception as error:
                # whatever it was, the engine must come back
                log.exception("the engine's supervision failed; it goes on")
                self._lose("restarting engine", f"{type(error).__name__}: {error}")
            await self._pause()

    async def _bring_up(self) -> None:
        """From nothing to ready. Raises EngineError when the child ends or the time is over."""
        if self._process:
            await self._process.start()
            if self._phase != "degraded":
                self._detail = ""
        patience = self._settings.start_timeout_s if self._process else None
        try:
            async with asyncio.timeout(patience):
                await self._wait_for_token()
        except TimeoutError as error:
            raise EngineError(f"The engine did not start within {patience} s.") from error
        self._phase, self._detail = "loading adapters", ""
        await self._load_desired()
        self._ready, self._phase, self._detail = True, "ready", ""
        log.info("engine ready: %s", self._client.model)

    async def _wait_for_token(self) -> None:
        while True:
            if self._process:
                self._require_child()
                await self._process.look()
            if await self._client.healthy():
                self._phase, self._detail = "warming up engine", ""
                if not self._process:
                    await self._client.discover()
                await self._client.probe(self._settings.start_timeout_s)
                return
            await asyncio.sleep(POLL_S)

    async def _load_desired(self) -> None:
        """Loads what the store wants. A refusal is noted and does not block the others."""
        self._refused = {}
        self._held = set() if self._process else set(await self._client.loaded())
        for ref in await asyncio.to_thread(self._desired):
            try:
                await self._client.load(ref)
                self._held.add(ref.engine_name)
            except Refused as error:
                log.warning("%s could not be loaded: %s", ref.id, error.message)
                self._refused[ref.id] = error.message

    async def _watch(self) -> None:
        """Returns never; raises when the engine is lost. A silent engine is asked for a token; traffic is proof too."""
        failures = 0
        while True:
            await self._sleep_while_running(self._settings.probe_every_s)
            if time.monotonic() - self._client.heard < self._settings.probe_every_s:
                failures = 0
                continue
            try:
                await self._probe()
                failures = 0
            except HybridError as error:
                failures += 1
                if isinstance(error, NotReady) and not isinstance(error, Overloaded):
                    raise
                if failures >= self._settings.probe_failures:
                    raise EngineError(f"The engine hung: {failures} probes failed. {error.message}") from error

    async def _probe(self) -> None:
        await self._client.probe(self._settings.probe_timeout_s)
        if self._process:
            await self._process.look()
        else:
            await self._load_desired()  # a server at a URL may have restarted between two probes and forgot them

    async def _sleep_while_running(self, seconds: float) -> None:
        """Sleeps; raises EngineError the moment the child ends."""
        if self._process is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), seconds)
        self._require_child()

    async def _pause(self) -> None:
        """Ends what is left of the child, and waits before the next start: 1, 2, 4 … 30 s."""
        now = time.monotonic()
        self._lost_at.append(now)
        crashes = sum(now - at < WINDOW_S for at in self._lost_at)
        if self._process:
            tail = self._process.tail(8)
            await self._process.stop(grace_s=2.0)  # it is dead or hung; there is nothing to finish
            if crashes > self._settings.restart_limit:
                self._phase = "degraded"
                self._detail = (
                    f"{crashes} crashes in {WINDOW_S / 60:.0f} minutes. The engine's last words: " + " | ".join(tail)
                )
        await asyncio.sleep(LONGEST_WAIT_S if self._phase == "degraded" else min(LONGEST_WAIT_S, 2.0 ** (crashes - 1)))
        self._restarts += self._process is not None

    def _require_child(self) -> None:
        if self._process and not self._process.running:
            last = self._process.tail(1)
            how = self._process.exit_code
            raise EngineError(f"The engine ended with code {how}. Its last words: {last[0] if last else '(none)'}")

    def _lose(self, phase: str, detail: str) -> None:
        if self._ready and detail:  # closing it says nothing: it was not lost
            log.warning("engine lost: %s", detail)
        self._ready, self._phase, self._detail = False, phase, detail
        self._held = set()

    def _require_ready(self) -> None:
        if not self._ready:
            raise self._not_ready()

    def _not_ready(self) -> NotReady:
        return NotReady(f"The engine is not ready ({self._phase}). Try again in a moment.")


async def _refuse(error: HybridError) -> AsyncIterator[Token]:
    """No token, then the error: it comes where every other failure of a generation does."""
    nothing: tuple[Token, ...] = ()
    for token in nothing:
        yield token
    raise error
