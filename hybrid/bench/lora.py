"""`lora`: what adapters cost on this machine, with our vLLM plugin and with vLLM's own products.

Two engines are started in turn, one with the plugin and one without, each more than once. In every round each burst of
requests is asked of the base model and then of random adapters, or the other way round, so that what disturbs the
machine disturbs both; a ratio is of two measurements next to one another. The first round of a start does not count.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybrid.bench.alone import Burst, Client, alone, random_adapters
from hybrid.bench.result import Goal, Result, ratio
from hybrid.engine import AdapterRef
from hybrid.models import ModelFiles, materialise
from hybrid.rooms import write_json
from hybrid.settings import Settings

PLUGIN, STOCK = "plugin", "stock"
SLOTS, ADAPTERS = 4, 8
ANSWER = 48


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table: how many times slower than the base prefill is, or what share of its speed decoding has."""

    name: str
    burst: Burst
    limit: float

    @property
    def slower(self) -> bool:
        """Whether the ratio is the base's speed by the adapters'."""
        return self.burst.answer == 1


CASES = (
    Case("prefill of 1,024 tokens, one adapter", Burst(1024, 1, 1, 1), 1.10),
    Case("prefill of 64 tokens, one adapter", Burst(64, 1, 1, 1), 1.25),
    Case("decode, 16 streams over 4 adapters", Burst(16, ANSWER, 16, 4), 0.85),
    Case(f"decode, 8 streams over 8 adapters with {SLOTS} slots", Burst(16, ANSWER, 8, 8), 0.60),
    Case("decode, one stream", Burst(16, ANSWER, 1, 1), 0.85),
)
#: the case whose base speeds tell what the plugin costs where there is no adapter
BARE = CASES[2]
LEAST_BARE = 0.99


@dataclass(slots=True)
class Speeds:
    """Tokens a second of one case in one kind of engine, a round each."""

    base: list[float] = field(default_factory=list)
    adapters: list[float] = field(default_factory=list)

    def ratio(self, case: Case) -> dict[str, Any]:
        """The base's speed by the adapters', or theirs by its own."""
        pair = (self.base, self.adapters) if case.slower else (self.adapters, self.base)
        return ratio(*pair, digits=3)


#: by kind of engine, then by case
Found = Mapping[str, Mapping[str, Speeds]]


async def measure(
    settings: Settings,
    *,
    rounds: int,
    starts: int,
    rank: int,
    out: Path | None,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Starts each engine `starts` times and asks every case `rounds` times of each start, with adapters of `rank`.

    Writes `lora.json` and `lora.png` into `out`. Raises SetupError and NotReady without an engine.
    """
    found: Found = {who: {case.name: Speeds() for case in CASES} for who in (PLUGIN, STOCK)}
    turns = [who for number in range(starts) for who in ((PLUGIN, STOCK) if number % 2 == 0 else (STOCK, PLUGIN))]
    steps = len(turns) * (rounds + 1)
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        model = await asyncio.to_thread(materialise, settings.model, settings.cache, progress)
        made = await asyncio.to_thread(random_adapters, Path(folder, "made"), model, ADAPTERS, rank)
        for turn, who in enumerate(turns):
            progress(f"starting {who}", turn * (rounds + 1), steps)

            def tell(number: int, turn: int = turn, who: str = who) -> None:
                progress(who, turn * (rounds + 1) + number, steps)

            alone_with = _engine(settings, Path(folder, f"home-{turn}"), who, rank)
            await _start(alone_with, model, made, rounds, found[who], tell)
    facts = {"model": model.name, "rank": rank, "rounds": rounds, "starts": starts, "slots": SLOTS}
    result = _result(found, facts)
    if out is not None:
        await asyncio.to_thread(_write, out, result, found)
    return result


def _engine(settings: Settings, home: Path, who: str, rank: int) -> Settings:
    """The settings of this home, with four slots and with or without the plugin."""
    changed = {"cpu_lora": who == PLUGIN, "max_loras": SLOTS, "max_cpu_loras": 2 * ADAPTERS, "max_lora_rank": rank}
    return settings.model_copy(update={"home": home, "engine": settings.engine.model_copy(update=changed)})


async def _start(
    settings: Settings,
    model: ModelFiles,
    adapters: Sequence[AdapterRef],
    rounds: int,
    speeds: Mapping[str, Speeds],
    tell: Callable[[int], None],
) -> None:
    """One start: every case in every round, base and adapters next to one another."""
    async with alone(settings, model, adapters) as engine:
        client = Client(engine, model, adapters)
        for number in range(rounds + 1):
            tell(number)
            for case in CASES:
                bursts = [replace(case.burst, adapters=0), case.burst]
                pace = {}
                for burst in bursts if number % 2 else bursts[::-1]:
                    pace[burst.adapters > 0] = await client.tokens_per_s(burst)
                if number:
                    speeds[case.name].base.append(pace[False])
                    speeds[case.name].adapters.append(pace[True])


def _result(found: Found, facts: Mapping[str, Any]) -> Result:
    rows, goals = [], []
    for case in CASES:
        ours, stock = (found[who][case.name] for who in (PLUGIN, STOCK))
        here, there = ours.ratio(case), stock.ratio(case)
        rows.append(_row(case.name, here, there, ours.adapters, stock.adapters, ours.base))
        unit = "times slower than base" if case.slower else "of base"
        goals.append(Goal(f"{case.name}: {unit}", here["median"], case.limit, at_least=not case.slower))
    on, off = (found[who][BARE.name].base for who in (PLUGIN, STOCK))
    bare = ratio(on, off, digits=3)
    name = f"base model, {BARE.burst.streams} streams: plugin on against off"
    rows.append(_row(name, bare, {"median": 1.0, "ci95": [1.0, 1.0]}, on, off, off))
    goals.append(Goal(name, bare["median"], LEAST_BARE, at_least=True))
    return Result("lora", tuple(rows), facts, tuple(goals))


def _row(
    name: str,
    ours: Mapping[str, Any],
    stock: Mapping[str, Any],
    our_speeds: Sequence[float],
    stock_speeds: Sequence[float],
    base: Sequence[float],
) -> dict[str, Any]:
    return {
        "what": name,
        "plugin": ours["median"],
        "plugin_ci95": ours["ci95"],
        "stock": stock["median"],
        "stock_ci95": stock["ci95"],
        "plugin_tokens_per_s": round(statistics.median(our_speeds), 1),
        "stock_tokens_per_s": round(statistics.median(stock_speeds), 1),
        "base_tokens_per_s": round(statistics.median(base), 1),
    }


def _write(out: Path, result: Result, found: Found) -> None:
    out.mkdir(parents=True, exist_ok=True)
    speeds = {
        who: {name: {"base": s.base, "adapters": s.adapters} for name, s in cases.items()}
        for who, cases in found.items()
    }
    write_json(out / "lora.json", {**result.wire(), "tokens_per_s": speeds})
    _draw(found, out / "lora.png")


def _draw(found: Found, path: Path) -> None:
    """Each case's share of the base's speed: bars are medians, dots are rounds, lines are the goals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, case in enumerate(CASES):
        for side, (who, colour) in enumerate(((PLUGIN, "C0"), (STOCK, "C1"))):
            speeds = found[who][case.name]
            shares = [theirs / base for theirs, base in zip(speeds.adapters, speeds.base, strict=True)]
            at = place + 0.4 * side - 0.2
            axes.bar(at, statistics.median(shares), 0.38, color=colour, alpha=0.7, label=None if place else who)
            axes.plot([at] * len(shares), shares, ".", color="black", markersize=4)
        goal = 1 / case.limit if case.slower else case.limit
        axes.plot([place - 0.4, place + 0.4], [goal, goal], ":", color="grey")
    axes.axhline(1, color="black", linewidth=0.5)
    axes.set_xticks(range(len(CASES)), [re.sub(", | (?=over|with)", "\n", case.name) for case in CASES], fontsize=8)
    axes.set_ylabel("speed by the base model's")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
