"""`gateway`: what the way through the gateway costs, beside asking the engine itself, and beside LiteLLM's proxy.

Two questions. Does it hold many streams back: so many at once, one after the other, all tokens counted by the engine?
And what does it add to an answer: requests at a fixed rate, whatever becomes of the earlier ones, to the scripted
engine, which answers after 20 ms? What is added is counted from the median of asking that engine directly, at the same
rate in the same run, so that the load's and the engine's own share is in neither. Everybody takes turns, in an order
that rotates; the load is a process of its own on the same machine (`generator.py`).
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.bench.load import Load, loading
from hybrid.bench.result import DRAWS, Goal, Result, ratio
from hybrid.bench.sides import ENGINE, OURS, RIVAL, Side, litellm_version, stand
from hybrid.errors import EngineError
from hybrid.rooms import write_json
from hybrid.settings import Settings
from hybrid.types import JSON

UPSTREAM_MS = 20
#: our tokens a second by those of asking directly, and by the rival's
GOALS = {ENGINE: 0.97, RIVAL: 1.0}
#: requests a second → what may be added, in ms, by quantile
ADDED: Mapping[float, Mapping[str, float]] = {50: {"p50": 5, "p99": 20}, 100: {"p99": 30}}
QUANTILES = {"p50": 0.5, "p99": 0.99}
#: answers that each stream asks for in a turn
ASKS = 2
#: between two turns: what the one before it left undone ends, in seconds
REST_S = 1.0


@dataclass(slots=True)
class Lane:
    """One side and what came of its turns: the streams that count, and for each rate a list of latencies a round."""

    name: str
    streams: list[JSON] = field(default_factory=list)
    latencies: dict[float, list[list[float]]] = field(default_factory=dict)
    failed: dict[float, int] = field(default_factory=dict)
    why: set[str] = field(default_factory=set)

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each turn."""
        return [turn["tokens"] / turn["seconds"] for turn in self.streams]

    def took(self, rate: float, told: JSON) -> None:
        """Keeps what came of a turn at a rate."""
        self.latencies.setdefault(rate, []).append(told["latencies"])
        self.failed[rate] = self.failed.get(rate, 0) + told["failed"]
        self.why |= set(told["why"])

    def quantile(self, rate: float, q: float) -> float | None:
        """In ms, over all rounds; None where nothing was answered."""
        pooled = [latency for latencies in self.latencies[rate] for latency in latencies]
        return float(np.quantile(pooled, q)) if pooled else None


async def measure(
    settings: Settings,
    *,
    litellm: Path | None,
    streams: int,
    tokens: int,
    rates: Sequence[float],
    seconds: float,
    rounds: int,
    out: Path | None,
    progress: Callable[[str, int, int], None],
) -> Result:
    """`streams` streams of `tokens` tokens from the engine of the settings, then `rates` requests a second for
    `seconds` each from the scripted one, `rounds` times. `litellm` is the `bin` folder of an environment with it.

    Writes `gateway.json` and `gateway.png` into `out`. Raises SetupError and NotReady without an engine or LiteLLM.
    """
    facts: JSON = {"engine": settings.engine.kind, "model": Path(settings.model).name}
    if litellm is not None:
        facts["litellm"] = await litellm_version(litellm)
    lanes = {name: Lane(name) for name in (ENGINE, OURS, *([RIVAL] if litellm else []))}
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        async with loading(Path(folder) / "load.log") as load:
            progress("starting", 0, 1)
            with tempfile.TemporaryDirectory(dir=folder) as home:
                async with stand(settings, Path(home), litellm) as sides:
                    contest = _Contest(load, sides, lanes, rounds, progress)
                    await contest.streams(streams, tokens, settings.engine.answer_timeout_s)
            with tempfile.TemporaryDirectory(dir=folder) as home:
                async with stand(_scripted(settings), Path(home), litellm) as sides:
                    await _Contest(load, sides, lanes, rounds, progress).at(rates, seconds)
    result = tell(list(lanes.values()), facts | {"streams": streams, "rounds": rounds})
    if out is not None:
        await asyncio.to_thread(_write, out, result, list(lanes.values()))
    return result


def _scripted(settings: Settings) -> Settings:
    engine = settings.engine.model_copy(update={"kind": "scripted", "args": ()})
    return settings.model_copy(update={"engine": engine})


@dataclass(frozen=True, slots=True)
class _Contest:
    """All sides before one engine, and the load that asks them in turns."""

    load: Load
    sides: Sequence[Side]
    lanes: Mapping[str, Lane]
    rounds: int
    progress: Callable[[str, int, int], None]

    async def streams(self, streams: int, tokens: int, patience_s: float) -> None:
        """Rounds of streams; the first one warms and is not kept. No prompt comes twice.

        Raises EngineError when a side answers none of them.
        """
        salt = secrets.token_hex(16)  # the gateway gives its callers compartments of the prefix cache, too
        for number in range(self.rounds + 1):
            self.progress("streaming", number, self.rounds + 1)
            for side in self._turned(number):
                own = {"model": side.model, **({"cache_salt": salt} if side.name == ENGINE else {})}
                first = number * streams * ASKS
                asked = [range(first + i * ASKS, first + (i + 1) * ASKS) for i in range(streams)]
                queues = [[{**_story(n, tokens), **own} for n in numbers] for numbers in asked]
                told = await self.load.ask(side.url, side.headers, streams=queues, patience_s=patience_s)
                if not told["tokens"]:
                    raise EngineError(f"{side.name} answered no stream: {'; '.join(told['why'])}")
                if number:
                    self.lanes[side.name].streams.append(told)
                    self.lanes[side.name].why |= set(told["why"])

    async def at(self, rates: Sequence[float], seconds: float) -> None:
        """Rounds of requests at each rate."""
        asked = [{"role": "user", "content": f"@tokens 1 @delay {UPSTREAM_MS}ms"}]
        for number in range(self.rounds):
            for step, rate in enumerate(rates):
                self.progress(f"{rate:g} requests/s", number * len(rates) + step, self.rounds * len(rates))
                for side in self._turned(number):
                    order = {"body": {"model": side.model, "messages": asked}, "rate": rate, "seconds": seconds}
                    self.lanes[side.name].took(rate, await self.load.ask(side.url, side.headers, **order))
                    await asyncio.sleep(REST_S)

    def _turned(self, number: int) -> list[Side]:
        """The order of a round: everybody goes first as often."""
        turn = number % len(self.sides)
        return [*self.sides[turn:], *self.sides[:turn]]


def _story(number: int, tokens: int) -> JSON:
    """A stream of exactly so many tokens, which says at its end how many it had."""
    return {
        "messages": [{"role": "user", "content": f"Tell a long story about the number {number}."}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }


def tell(lanes: Sequence[Lane], facts: JSON) -> Result:
    """What came of all turns; the engine's lane is the first, ours the second."""
    engine, ours = lanes[0], lanes[1]
    times = {lane.name: ratio(ours.speeds, lane.speeds, digits=3) for lane in lanes if lane is not ours}
    rows = tuple(_row(lane, engine, rate) for rate in engine.latencies for lane in lanes)
    goals = [
        Goal(f"{name}: our tokens/s by its", found["median"], GOALS[name], at_least=True)
        for name, found in times.items()
    ]
    for row in rows:
        if row["side"] == OURS:
            goals += _goals(row)
    summary = {
        **facts,
        "upstream_ms": UPSTREAM_MS,
        "tokens_per_s": {lane.name: round(statistics.median(lane.speeds), 1) for lane in lanes},
        "times": times,
        "streams_failed": {lane.name: sum(turn["failed"] for turn in lane.streams) for lane in lanes},
        "why": sorted(set().union(*(lane.why for lane in lanes)))[:5],
    }
    goals.append(Goal("streams of ours that failed", summary["streams_failed"][OURS], 0))
    return Result("gateway", rows, summary, tuple(goals))


def _row(lane: Lane, engine: Lane, rate: float) -> JSON:
    """One side at one rate. `added` is from the median of asking directly, with its interval over rounds."""
    usual = engine.quantile(rate, 0.5)
    row: JSON = {"rate": rate, "side": lane.name, "n": sum(map(len, lane.latencies[rate])), "failed": lane.failed[rate]}
    for name, q in QUANTILES.items():
        row[f"{name}_ms"] = _rounded(lane.quantile(rate, q))
    for name, q in QUANTILES.items():
        found = lane.quantile(rate, q)
        row[f"added_{name}_ms"] = None if found is None or usual is None else round(found - usual, 2)
        row[f"added_{name}_ci95"] = _interval(lane.latencies[rate], engine.latencies[rate], q)
    return row


def _goals(row: JSON) -> list[Goal]:
    rate = row["rate"]
    found = [Goal(f"requests that failed at {rate:g}/s", row["failed"], 0)]
    for name, limit in ADDED.get(rate, {}).items():
        if row[f"added_{name}_ms"] is not None:  # where nothing was answered, that is what is missed
            found.append(Goal(f"{name} added at {rate:g}/s, ms", row[f"added_{name}_ms"], limit))
    return found


def _interval(ours: Sequence[Sequence[float]], direct: Sequence[Sequence[float]], q: float) -> list[float] | None:
    """95 % of the differences over rounds drawn with replacement, whole rounds at a time: requests of one round
    share its weather. None where a round was left without an answer."""
    if not all(map(len, (*ours, *direct))):
        return None
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS // 50):
        drawn = rng.integers(len(ours), size=len(ours))
        mine, usual = (np.concatenate([rounds[i] for i in drawn]) for rounds in (ours, direct))
        found.append(np.quantile(mine, q) - np.median(usual))
    low, high = np.percentile(found, (2.5, 97.5))
    return [round(float(low), 2), round(float(high), 2)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _write(out: Path, result: Result, lanes: Sequence[Lane]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    turns = {lane.name: lane.streams for lane in lanes}
    rounds = {
        lane.name: {f"{rate:g}": list(map(_told, found)) for rate, found in lane.latencies.items()} for lane in lanes
    }
    write_json(out / "gateway.json", {**result.wire(), "turns": turns, "latencies": rounds})
    _draw(result, lanes, out / "gateway.png")


def _told(latencies: Sequence[float]) -> JSON:
    """One round in a few numbers, in ms."""
    if not latencies:
        return {"n": 0}
    found = dict(
        zip(("p10", "p50", "p90", "p99", "max"), np.quantile(latencies, (0.1, 0.5, 0.9, 0.99, 1)), strict=True)
    )
    return {"n": len(latencies), **{name: round(float(value), 2) for name, value in found.items()}}


def _draw(result: Result, lanes: Sequence[Lane], path: Path) -> None:
    """Tokens a second (bars are medians, dots rounds), and what each adds to an answer at each rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for lane, colour in zip(lanes, ("C1", "C0", "C2"), strict=False):
        left.bar(lane.name, statistics.median(lane.speeds), color=colour, alpha=0.7)
        left.plot([lane.name] * len(lane.speeds), lane.speeds, ".", color="black", markersize=4)
        rows = [row for row in result.rows if row["side"] == lane.name and row["added_p99_ms"] is not None]
        for name, style in (("p50", "-"), ("p99", "--")) if lane.name != ENGINE else ():
            added: list[Any] = [row[f"added_{name}_ms"] for row in rows]
            right.plot(
                [row["rate"] for row in rows], added, style, marker="o", color=colour, label=f"{lane.name} {name}"
            )
    left.set_ylabel("tokens/s, all streams together")
    right.set_xlabel("requests/s, open loop")
    right.set_ylabel("ms added to an answer")
    right.set_yscale("log")
    right.legend()
    figure.savefig(path, dpi=120)
