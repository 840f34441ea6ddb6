"""The engine: the server that holds the base model and the adapters.

One protocol; `vllm.py` speaks it over HTTP to a real vLLM or to the scripted server, which answer alike.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hybrid.types.event import Token
from hybrid.types.request import Message

#: the file of weights in the folder of an adapter
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter as the engine knows it: `engine_name` is `name@version-sha8` and never means anything else."""

    name: str
    version: int
    sha256: str
    path: Path

    @property
    def id(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def engine_name(self) -> str:
        """The name vLLM loads it under: new weights, new name, so no cache can be stale."""
        return f"{self.id}-{self.sha256[:8]}"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What is known of the engine. `phase` is words for a user; `pids` every process of it; `breaker` closed, half_open
    or open."""

    ready: bool
    phase: str
    detail: str = ""
    model: str = ""
    max_model_len: int = 0
    pids: tuple[int, ...] = ()
    restarts: int = 0
    breaker: str = "closed"
    retries_refused: int = 0
    log_tail: tuple[str, ...] = field(default=())


@runtime_checkable
class Engine(Protocol):
    """What a strategy's `generate` verb stands on. Every method raises only `hybrid.errors`."""

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
        """Answers chat `messages` (or continues a raw `prompt`) with the base model or the adapter named.

        `adapter` is an `engine_name`. With `stream=False` one `Token` comes, whose `raw` is the whole body. Closing
        the iterator aborts the request in the engine. Raises NotReady, EngineTimeout, EngineRejected, EngineError.
        """
        ...

    async def load(self, adapter: AdapterRef) -> None:
        """Loads an adapter; loading one that is loaded does nothing. Raises Refused when the engine will not."""
        ...

    async def unload(self, engine_name: str) -> None:
        """Makes the engine forget the name (its weights go when evicted). Unknown names are no error."""
        ...

    async def loaded(self) -> frozenset[str]:
        """The adapter names (`engine_name`) that the engine serves now."""
        ...

    async def prompt_logprobs(self, prompt: str, *, adapter: str | None = None) -> tuple[float, ...]:
        """The log-probability of each token of `prompt` but the first: what the canary compares."""
        ...

    def status(self) -> EngineStatus:
        """What is known now, without asking the engine."""
        ...

    async def close(self) -> None:
        """Closes connections, and the child with all its processes where there is one."""
        ...
