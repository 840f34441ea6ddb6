"""An engine alone on the machine, adapters made of random numbers, and requests of exact lengths.

What a benchmark of the engine stands on: nothing of the gateway is in between, no prompt comes twice, and every answer
has as many tokens as were asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hybrid.adapters.preflight import read_base
from hybrid.engine import AdapterRef, Engine
from hybrid.engine.open import open_engine
from hybrid.errors import EngineError, NotReady
from hybrid.models import ModelFiles
from hybrid.rooms import sha256_file, write_json
from hybrid.settings import Settings
from hybrid.types.request import Message

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that begin together: `streams` of them, each with so many tokens of prompt and answer.

    They are spread over so many `adapters`; 0: the base model answers all.
    """

    prompt: int
    answer: int
    streams: int = 1
    adapters: int = 0

    @property
    def tokens(self) -> int:
        """What is counted: the tokens of the answers, or of the prompts where an answer is one token."""
        return self.streams * (self.answer if self.answer > 1 else self.prompt)


@contextlib.asynccontextmanager
async def alone(settings: Settings, model: ModelFiles, adapters: Sequence[AdapterRef] = ()) -> AsyncIterator[Engine]:
    """An engine of these settings, ready, its adapters loaded. Raises NotReady, with its own words, if it fails."""
    engine = await open_engine(settings, model, lambda: adapters)
    try:
        await _ready(engine, settings.engine.start_timeout_s)
        if missing := {ref.engine_name for ref in adapters} - await engine.loaded():
            raise NotReady(f"The engine did not load {', '.join(sorted(missing))}: {engine.status().detail}")
        yield engine
    finally:
        await engine.close()


async def _ready(engine: Engine, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while not (status := engine.status()).ready:
        if status.phase in ("restarting engine", "degraded") or time.monotonic() > end:
            raise NotReady(f"The engine does not start ({status.phase}): {status.detail}")
        await asyncio.sleep(POLL_S)


class Client:
    """Asks an engine for bursts, with prompts drawn from a seed."""

    def __init__(self, engine: Engine, model: ModelFiles, adapters: Sequence[AdapterRef] = (), seed: int = 0) -> None:
        self._engine, self._adapters, self._random = engine, adapters, Random(seed)
        config = json.loads((model.path / "config.json").read_bytes())
        self._vocabulary = int({**config, **config.get("text_config", {})}["vocab_size"])

    async def tokens_per_s(self, burst: Burst) -> float:
        """How fast a burst is served. Raises EngineError for an answer of another length, and the engine's errors."""
        names = [ref.engine_name for ref in self._adapters[: burst.adapters]]
        prompts = [self._random.choices(range(self._vocabulary), k=burst.prompt) for _ in range(burst.streams)]
        asked = [
            answer(self._engine, burst.answer, prompt=prompt, adapter=names[number % len(names)] if names else None)
            for number, prompt in enumerate(prompts)
        ]
        began = time.perf_counter()
        await asyncio.gather(*asked)
        return burst.tokens / (time.perf_counter() - began)


async def answer(
    engine: Engine,
    tokens: int,
    *,
    messages: Sequence[Message] | None = None,
    prompt: Any = None,
    adapter: str | None = None,
    salt: str = "",
) -> None:
    """A greedy answer of exactly `tokens` tokens. Without a `salt` nothing of its prompt is found in a cache."""
    sampling = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0}
    said, salt = 0, salt or secrets.token_hex(8)
    async for token in engine.generate(
        messages, prompt=prompt, adapter=adapter, sampling=sampling, stream=False, cache_salt=salt
    ):
        said += token.usage.completion_tokens if token.usage else 0
    if said != tokens:
        raise EngineError(f"The engine answered {said} tokens where {tokens} were asked for; nothing can be compared.")


def random_adapters(folder: Path, model: ModelFiles, count: int, rank: int) -> list[AdapterRef]:
    """`count` PEFT folders below `folder`, with random numbers for every linear layer of the model.

    They change what it says and keep it finite. Raises SetupError for a model without linear layers.
    """
    shapes = read_base(model.path, model.sha256).shapes
    return [_random_adapter(folder / f"random-{number}", shapes, rank, number) for number in range(count)]


def _random_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> AdapterRef:
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    tensors = {}
    for module, (outputs, inputs) in shapes.items():
        drawn = {"A": random.normal(0, inputs**-0.5, (rank, inputs)), "B": random.normal(0, 0.02, (outputs, rank))}
        for name, matrix in drawn.items():
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = matrix.astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "bias": "none",
    }
    write_json(folder / "adapter_config.json", config)
    return AdapterRef(folder.name, 1, sha256_file(folder / "adapter_model.safetensors"), folder)
