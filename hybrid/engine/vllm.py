"""The client: an `Engine` over HTTP, for whatever speaks vLLM's dialect on a UNIX socket or at a URL.

It never retries once a byte was sent, and aborts a request by closing its connection. Answers are asked for through a
breaker; probes and adapters are not. It knows nothing of processes and readiness: `supervisor.py` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from aiohttp import ClientResponse

from hybrid.engine import WEIGHTS, AdapterRef, EngineStatus
from hybrid.engine.breaker import Breaker
from hybrid.engine.transport import Transport, within
from hybrid.engine.wire import COMPLETIONS, read_body, read_cards, read_chunk, read_events, read_logprobs, request_body
from hybrid.errors import EngineError, EngineRejected, EngineTimeout, NotReady, Refused
from hybrid.rooms import sha256_file
from hybrid.settings import EngineSettings
from hybrid.types import JSON
from hybrid.types.event import Token
from hybrid.types.request import Message

#: seconds for what is not generation: an adapter's load, log-probabilities of a prompt
CONTROL_TIMEOUT_S = 120.0
LIST_TIMEOUT_S = 10.0

#: vLLM's words when it has computed NaN and cannot spell it
_NO_NAN = "not JSON compliant"

_Ask = Callable[[], tuple[str, JSON]]
_Guard = AbstractContextManager[None]


class VllmEngine:
    """`Engine` over HTTP. `address` is `unix:/path/to.sock` or `http://host:port[/v1]`; `model` the served base."""

    def __init__(
        self, address: str, settings: EngineSettings, model: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.model = model
        self.max_model_len = settings.max_model_len
        self._settings = settings
        self._breaker = Breaker(clock)
        self._http = Transport(address, clock)
        self._loading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def heard(self) -> float:
        """When the engine last computed something for us, by the clock; 0 before that."""
        return self._breaker.heard

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
        """See `Engine.generate`. Raises EngineFailing too, without asking, while the breaker is open."""
        ask = partial(request_body, adapter or self.model, messages, prompt, sampling or {}, stream, cache_salt)
        headers = {"X-Request-Id": request_id} if request_id else {}
        guard = self._breaker.attempt()
        return self._stream(ask, headers, guard) if stream else self._whole(ask, headers, guard)

    async def _whole(self, ask: _Ask, headers: Mapping[str, str], guard: _Guard) -> AsyncIterator[Token]:
        path, body = ask()
        with guard:
            token = read_body(await self._http.post(path, body, headers, timeout_s=self._settings.answer_timeout_s))
        self._breaker.answered()
        yield token

    async def _stream(self, ask: _Ask, headers: Mapping[str, str], guard: _Guard) -> AsyncIterator[Token]:
        path, body = ask()
        wait = self._settings.first_byte_timeout_s
        with guard:
            async with self._http.send("POST", path, body, headers, timeout_s=wait) as response:
                buffer = bytearray()
                while True:
                    async with within(wait, "The engine stopped answering."):
                        piece = await response.content.readany()
                    if not piece:
                        raise EngineError("The engine broke off before the answer was complete. Ask again.")
                    wait = self._settings.idle_timeout_s
                    buffer += piece
                    for data in read_events(buffer):
                        if data == b"[DONE]":
                            await _drain(response)
                            return
                        tokens = read_chunk(data)
                        self._breaker.answered()
                        for token in tokens:
                            yield token

    async def load(self, adapter: AdapterRef) -> None:
        """See `Engine.load`. One load a name at a time; never in place, and only the weights that were published."""
        name = adapter.engine_name
        async with self._loading[name]:
            if name in await self.loaded():
                return
            await asyncio.to_thread(_check_weights, adapter)
            body = {"lora_name": name, "lora_path": str(adapter.path.resolve())}
            refusal = await self._http.attempt("/v1/load_lora_adapter", body, timeout_s=CONTROL_TIMEOUT_S)
            if isinstance(refusal, NotReady):
                raise refusal
            if refusal is not None and "already been loaded" not in refusal.message:
                raise Refused(f"The engine will not load {adapter.id}: {refusal.message}")

    async def unload(self, engine_name: str) -> None:
        """See `Engine.unload`."""
        body = {"lora_name": engine_name}
        refusal = await self._http.attempt("/v1/unload_lora_adapter", body, timeout_s=CONTROL_TIMEOUT_S)
        if refusal is not None and refusal.status != 404:
            raise refusal

    async def loaded(self) -> frozenset[str]:
        """See `Engine.loaded`."""
        return frozenset(card["id"] for card in await self._cards() if card.get("parent"))

    async def discover(self) -> None:
        """Learns the base model's name and context length from the server. Raises EngineError, NotReady."""
        base = next((card for card in await self._cards() if not card.get("parent")), None)
        if base is None:
            raise EngineError("The engine lists no base model at /v1/models.")
        self.model = str(base["id"])
        self.max_model_len = base.get("max_model_len") or self.max_model_len

    async def prompt_logprobs(self, prompt: str, *, adapter: str | None = None) -> tuple[float, ...]:
        """See `Engine.prompt_logprobs`. Natural logarithms; one NaN where the weights give nothing else."""
        body = {
            "model": adapter or self.model,
            "prompt": prompt,
            "prompt_logprobs": 0,
            "add_special_tokens": False,  # as the trainer counts: the text is all there is
            "max_tokens": 1,
            "temperature": 0,
        }
        try:
            return read_logprobs(await self._http.post(COMPLETIONS, body, timeout_s=CONTROL_TIMEOUT_S))
        except EngineRejected as error:
            if _NO_NAN in error.message:
                return (math.nan,)
            raise

    async def healthy(self) -> bool:
        """Whether the server answers `/health` well. A hung engine does: `probe` is the real question."""
        try:
            async with self._http.send("GET", "/health", timeout_s=LIST_TIMEOUT_S, retry=False):
                return True
        except EngineRejected as error:
            return error.status == 404  # a server without that route
        except (EngineError, EngineTimeout, NotReady):
            return False

    async def probe(self, timeout_s: float) -> None:
        """Asks for one token, which only an engine that computes can give. Raises what went wrong.

        The breaker does not keep it back, and its answer closes it: after a restart nobody has to wait for that.
        """
        async with within(timeout_s, "The engine gives no token."):
            try:
                await self._one_token([Message("user", "Hi")], None)
            except EngineRejected:  # a base model without a chat template
                await self._one_token(None, "Hi")

    def status(self) -> EngineStatus:
        """What the client knows by itself: whether the engine has ever answered."""
        return EngineStatus(
            ready=self.heard > 0,
            phase="ready" if self.heard else "not asked yet",
            model=self.model,
            max_model_len=self.max_model_len,
            breaker=self._breaker.state,
            retries_refused=self._http.retries.refused,
        )

    async def close(self) -> None:
        """Closes the connections; requests in flight are aborted."""
        await self._http.close()

    async def _cards(self) -> list[JSON]:
        async with (
            within(LIST_TIMEOUT_S, "The engine does not list its models."),
            self._http.send("GET", "/v1/models", timeout_s=LIST_TIMEOUT_S) as response,
        ):
            return read_cards(await response.read())

    async def _one_token(self, messages: Sequence[Message] | None, prompt: str | None) -> None:
        ask = partial(request_body, self.model, messages, prompt, {"max_tokens": 1}, False, "")
        async for _ in self._whole(ask, {}, nullcontext()):
            pass


def _check_weights(adapter: AdapterRef) -> None:
    """Raises Refused unless the weights are those that were published: vLLM would serve whatever lies there."""
    try:
        found = sha256_file(adapter.path / WEIGHTS)
    except OSError as error:
        raise Refused(
            f"The engine will not load {adapter.id}: its weights cannot be read ({error.strerror}); check its files."
        ) from error
    if found != adapter.sha256:
        raise Refused(
            f"The engine will not load {adapter.id}: its weights are not those that were published. Bring the file "
            "back, or publish another version."
        )


async def _drain(response: ClientResponse) -> None:
    """Reads the end of a stream that has said everything, so that closing it does not look like an abort."""
    with contextlib.suppress(EngineTimeout):
        async with within(1.0, "The engine does not hang up."):
            await response.content.read()
