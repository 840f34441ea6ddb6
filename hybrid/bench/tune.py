"""`doctor --tune`: which engine settings fit this machine, one at a time, each measured by an engine of its own.

It begins with the settings in force and goes through the axes in the order of what they usually bring. A value that
serves faster is kept for the axes to come (coordinate search); one that saves memory is kept if it costs nothing. What
is served: one stream, a crowd, and questions about one document, whose words the answers take up. The score of a try
is the geometric mean of its speeds by those of the settings in force.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit

from hybrid.bench.alone import Burst, Client, alone, answer
from hybrid.bench.result import Result
from hybrid.engine import Engine
from hybrid.engine.open import intel_openmp, on_cpu
from hybrid.errors import HybridError, SetupError
from hybrid.models import ModelFiles
from hybrid.rooms import write_json
from hybrid.settings import EngineSettings, Settings
from hybrid.types.request import Message

REPEATS = 3
#: how much faster a value must be to be kept, and how much slower one that saves memory may be
GAIN, EVEN = 1.03, 0.98
CHAT, CROWD = Burst(64, 64), Burst(48, 24, streams=48)
QUESTIONS, ANSWER = 3, 32
#: a document whose lines differ in what is asked for, of some 800 tokens
LINES = 36


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting of the engine and the values that are tried. `saves`: they cost less memory than what is set."""

    name: str
    values: tuple[Any, ...]
    saves: bool = False


@dataclass(frozen=True, slots=True)
class Try:
    """What one engine did: what was changed, tokens a second by kind of work, or why it did not serve."""

    changed: Mapping[str, Any]
    speeds: Mapping[str, float]
    error: str = ""

    def score(self, first: Try) -> float:
        """The geometric mean of the speeds by those of the first try; 0 where it failed."""
        if self.error:
            return 0.0
        return statistics.geometric_mean(self.speeds[name] / speed for name, speed in first.speeds.items())


def axes(engine: EngineSettings, model: ModelFiles) -> list[Axis]:
    """What can be tried on this machine with this model, without what is in force."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    space = _kv_cache_gb(engine, model)
    found = [
        Axis("openmp", ("gnu", "intel") if on_cpu() and _intel() else ()),
        Axis("reserved_cores", tuple(n for n in (0, 1, 2) if n < cores and on_cpu())),
        Axis("ngram", (0, 4)),
        Axis("max_num_seqs", (16, 32, 64)),
        Axis("prefix_caching", (True, False)),
        Axis("kv_cache_gb", (space,), saves=space < engine.kv_cache_gb),
    ]
    return [replace(axis, values=tuple(v for v in axis.values if v != _value(engine, axis.name))) for axis in found]


async def tune(
    settings: Settings, model: ModelFiles, *, minutes: float, progress: Callable[[str, int, int], None]
) -> Result:
    """Tries the axes until all are through or no other engine fits into `minutes`; writes nothing.

    The rows are the tries; the summary has the settings that won (`{}`: those in force). Raises NotReady and SetupError
    when the engine does not start as it is set.
    """
    began = time.monotonic()
    ends = began + minutes * 60
    plan = [(axis, value) for axis in axes(settings.engine, model) for value in axis.values]
    progress("as it is set", 0, len(plan))
    first = await _try(settings, model, {})
    if first.error:
        raise SetupError(f"The engine does not serve as it is set: {first.error}")
    tries, won, best, slowest = [first], dict[str, Any](), 1.0, time.monotonic() - began
    for number, (axis, value) in enumerate(plan):
        began = time.monotonic()
        if began + slowest > ends:
            break
        progress(f"{axis.name} = {value}", number, len(plan))
        tries.append(await _try(settings, model, {**won, axis.name: value}))
        slowest = max(slowest, time.monotonic() - began)
        score = tries[-1].score(first)
        if score > best * (EVEN if axis.saves else GAIN):
            won, best = {**won, axis.name: value}, max(best, score)
    progress("done", len(plan), len(plan))
    rows = tuple(_row(one, first) for one in tries)
    facts = {"model": model.name, "cores": os.cpu_count(), "tried": f"{len(tries) - 1} of {len(plan)}"}
    return Result("tune", rows, {**facts, "won": won, "faster": round(best, 3)}, ())


def keep(settings: Settings, result: Result) -> Path | None:
    """Writes the settings that won into `hybrid.toml`, all else in it as it was, and the numbers beside the logs.

    The file; None when what is in force won.
    """
    home = settings.rooms
    home.hidden.mkdir(parents=True, exist_ok=True)
    write_json(home.hidden / "tuned.json", result.wire())
    won = result.summary["won"]
    if not won:
        return None
    path = home.root / "hybrid.toml"
    document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.is_file() else tomlkit.document()
    section = document.setdefault("engine", tomlkit.table())
    for name, value in won.items():
        section[name] = value
    fresh = path.with_name(".hybrid.toml.new")
    fresh.write_text(tomlkit.dumps(document), encoding="utf-8")
    fresh.replace(path)
    return path


def _value(engine: EngineSettings, name: str) -> Any:
    """A setting in force; vLLM leaves one core free where nothing else is said."""
    value = getattr(engine, name)
    return 1 if name == "reserved_cores" and value is None else value


def _kv_cache_gb(engine: EngineSettings, model: ModelFiles) -> int:
    """The least that holds as many full contexts as are computed at once; what is set, where the config does not tell.

    A token's keys and values are two bfloat16 vectors a layer and head.
    """
    config = json.loads((model.path / "config.json").read_bytes())
    try:
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        each = int(2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width)
    except KeyError:
        return engine.kv_cache_gb
    return math.ceil(each * engine.max_num_seqs * engine.max_model_len / 2**30)


def _intel() -> bool:
    with contextlib.suppress(SetupError):
        return intel_openmp().is_file()
    return False


async def _try(settings: Settings, model: ModelFiles, changed: Mapping[str, Any]) -> Try:
    """One engine: each kind of work once to warm it, then as often as counts."""
    with tempfile.TemporaryDirectory(prefix="hybrid-tune-") as folder:
        engine = settings.engine.model_copy(update=dict(changed))
        alike = settings.model_copy(update={"home": Path(folder), "engine": engine})
        try:
            async with alone(alike, model) as serving:
                speeds = await _speeds(serving, model)
        except HybridError as error:
            return Try(changed, {}, error.message[:300])
    return Try(changed, speeds)


async def _speeds(engine: Engine, model: ModelFiles) -> dict[str, float]:
    client = Client(engine, model)
    works: Mapping[str, Callable[[], Any]] = {
        "chat": lambda: client.tokens_per_s(CHAT),
        "crowd": lambda: client.tokens_per_s(CROWD),
        "document": lambda: _read(engine),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(REPEATS + 1):
        for name, work in works.items():
            speed = await work()
            if number:
                found[name].append(speed)
    return {name: statistics.median(speeds) for name, speeds in found.items()}


async def _read(engine: Engine) -> float:
    """Questions about one document, one after another: the words of the answers stand in the prompt."""
    salt, began = secrets.token_hex(8), time.perf_counter()
    for question in _questions():
        await answer(engine, ANSWER, messages=question, salt=salt)
    return QUESTIONS * ANSWER / (time.perf_counter() - began)


def _questions() -> Iterator[Sequence[Message]]:
    towns = ("Lisbon", "Oslo", "Turin", "Ghent", "Porto", "Bergen")
    lines = [
        f"Order {1000 + 7 * n} left for {towns[n % len(towns)]} on day {n + 1}, in {n % 5 + 1} boxes."
        for n in range(LINES)
    ]
    document = "\n".join(lines)
    for number in range(QUESTIONS):
        asked = 1000 + 7 * (11 * number + 3)
        yield (Message("user", f"{document}\n\nRepeat the line about order {asked} and the two lines after it."),)


def _row(one: Try, first: Try) -> dict[str, Any]:
    changed = ", ".join(f"{name} = {value}" for name, value in one.changed.items())
    speeds = {f"{name}_tokens_per_s": round(one.speeds.get(name, 0.0), 1) for name in first.speeds}
    return {"changed": changed or "nothing", **speeds, "score": round(one.score(first), 3), "error": one.error}
