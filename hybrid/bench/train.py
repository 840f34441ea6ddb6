"""`train`: our trainer, TRL's and a plain loop learn the same rows side by side, taking turns in slices.

How each is set up, and what differs, is said in `trainers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.bench.contest import WARM_UP, Plan
from hybrid.bench.result import Goal, Result, ratio
from hybrid.errors import BadRequest, SetupError
from hybrid.models import ModelFiles
from hybrid.quickstart import write_tasks
from hybrid.rooms import Home, write_json
from hybrid.training.data import read_dataset
from hybrid.training.recipes import Recipe

OURS = "hybrid"
#: rival → how many times its tokens a second ours must reach
RIVALS = {"trl": 6.0, "plain": 1.5}
#: what two dev losses may differ by and be called equal, in nats a token
EQUAL = 0.02


@dataclass(frozen=True, slots=True)
class Slice:
    """Some steps of one trainer: prompt and answer tokens, seconds, and the dev loss after them."""

    tokens: int
    seconds: float
    dev_loss: float


@dataclass(slots=True)
class Contestant:
    """A child process, and what it has done. The first slice is the warm-up."""

    who: str
    process: asyncio.subprocess.Process
    log: Path
    slices: list[Slice] = field(default_factory=list)
    peak_mb: int = 0

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of every slice that counts."""
        return [one.tokens / one.seconds for one in self.slices[1:]]

    async def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends a line and waits for the answer. Raises SetupError with the last words of a child that ended."""
        with contextlib.suppress(ConnectionError):  # told below, with the reason
            await self.send(order)
        return await self.hear()

    async def send(self, order: dict[str, Any]) -> None:
        """One line to the child."""
        assert self.process.stdin  # noqa: S101  # it was asked for
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        await self.process.stdin.drain()

    async def hear(self) -> dict[str, Any]:
        """One line from the child."""
        assert self.process.stdout  # noqa: S101
        line = await self.process.stdout.readline()
        if not line:
            words = self.log.read_text(encoding="utf-8", errors="replace").strip()[-800:]
            raise SetupError(f"The trainer {self.who!r} ended before its work was done. It said: {words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


async def measure(
    source: Path | None,
    *,
    model: ModelFiles,
    recipe: Recipe,
    tokens: int,
    rounds: int,
    rivals: Sequence[str],
    out: Path | None,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Each trainer learns about `tokens` tokens of `source` (the quickstart's tickets without one) after a warm-up.

    In a round all train equally many steps, one after the other, in an order that rotates. Writes `train.json` and
    `train.png` into `out`. Raises DataError, BadRequest for an unknown rival, SetupError without TRL.
    """
    check(rivals)
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        task = source or write_tasks(Home(Path(folder)))[0]
        data = read_dataset(task)
        quiet = recipe.model_copy(update={"accumulate": 1})
        plan = Plan(
            who="judge", source=str(task.resolve()), model=model.name, model_path=str(model.path),
            recipe=quiet.model_dump(mode="json"), tokens=tokens, rounds=rounds, folder=folder,
        )  # fmt: skip
        async with contextlib.AsyncExitStack() as stack:
            progress("loading", 0, rounds + 1)
            judge = await stack.enter_async_context(child(plan))
            told = await judge.hear()
            before = (await judge.ask({"weights": told["weights"]}))["dev_loss"]
            racers = [await stack.enter_async_context(child(replace(plan, who=who))) for who in (OURS, *rivals)]
            await asyncio.gather(*(racer.hear() for racer in racers))
            for number in range(rounds + 1):
                progress("training", number, rounds + 1)
                steps = (told["steps"] - WARM_UP) // rounds if number else WARM_UP
                turn = number % len(racers)
                for racer in racers[turn:] + racers[:turn]:
                    await _slice(racer, judge, steps)
    facts = {
        "model": model.name,
        "data": data.name,
        "steps": told["steps"],
        "warm_up_steps": WARM_UP,
        "rounds": rounds,
        "dev_rows": told["dev_rows"],
        "dev_loss_before": round(before, 4),
        **{key: getattr(quiet, key) for key in ("batch_size", "learning_rate", "rank", "precision")},
    }
    result = _result(racers, facts)
    if out is not None:
        await asyncio.to_thread(_write, out, result, racers, before)
    return result


def check(rivals: Sequence[str]) -> None:
    """Raises BadRequest for a rival that is not known, SetupError for one that is not installed."""
    for rival in rivals:
        if rival not in RIVALS:
            raise BadRequest(f"There is no rival {rival[:80]!r}; use some of {','.join(RIVALS)}.", param="rivals")
    if "trl" in rivals and importlib.util.find_spec("trl") is None:
        raise SetupError("TRL is not installed: `pip install trl`, or leave it out with --rivals plain.")


@contextlib.asynccontextmanager
async def child(plan: Plan) -> AsyncIterator[Contestant]:
    """A trainer's process, which was told its plan and loads; killed at the end, when nothing of it is needed."""
    log = Path(plan.folder) / f"{plan.who}.log"
    with log.open("wb") as words:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hybrid.bench.trainers",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=words,
        )  # fmt: skip
    contestant = Contestant(plan.who, process, log)
    try:
        await contestant.send(asdict(plan))
        yield contestant
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _slice(racer: Contestant, judge: Contestant, steps: int) -> None:
    done = await racer.ask({"steps": steps})
    verdict = await judge.ask({"weights": done["weights"]})
    racer.slices.append(Slice(done["tokens"], done["seconds"], verdict["dev_loss"]))
    racer.peak_mb = done["peak_mb"]


def _result(racers: Sequence[Contestant], facts: dict[str, Any]) -> Result:
    ours, *rivals = racers
    ratios = {rival.who: ratio(ours.speeds, rival.speeds) for rival in rivals}
    goals = []
    for rival in rivals:
        behind = round(ours.slices[-1].dev_loss - rival.slices[-1].dev_loss, 4)
        goals += [
            Goal(f"times {rival.who}'s tokens/s", ratios[rival.who]["median"], RIVALS[rival.who], at_least=True),
            Goal(f"dev loss above {rival.who}'s after equal tokens, nats", behind, EQUAL),
            Goal(f"peak memory by {rival.who}'s", round(ours.peak_mb / rival.peak_mb, 3), 1.0),
        ]
    return Result("train", tuple(map(_row, racers)), {**facts, "times": ratios}, tuple(goals))


def _row(racer: Contestant) -> dict[str, Any]:
    return {
        "trainer": racer.who,
        "tokens_per_s": round(statistics.median(racer.speeds), 1),
        "tokens": sum(one.tokens for one in racer.slices[1:]),
        "seconds": round(sum(one.seconds for one in racer.slices[1:]), 2),
        "peak_mb": racer.peak_mb,
        "dev_loss": round(racer.slices[-1].dev_loss, 4),
    }


def _write(out: Path, result: Result, racers: Sequence[Contestant], before: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    slices = {racer.who: [asdict(one) for one in racer.slices] for racer in racers}
    write_json(out / "train.json", {**result.wire(), "slices": slices})
    _draw(racers, before, out / "train.png")


def _draw(racers: Sequence[Contestant], before: float, path: Path) -> None:
    """Dev loss against seconds of training, and tokens a second: the bar is the median, the dots are the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for racer in racers:
        seconds = np.cumsum([0.0, *(one.seconds for one in racer.slices)])
        left.plot(seconds, [before, *(one.dev_loss for one in racer.slices)], marker=".", label=racer.who)
        right.bar(racer.who, statistics.median(racer.speeds), alpha=0.7)
        right.plot([racer.who] * len(racer.speeds), racer.speeds, ".", color="black", markersize=4)
    left.set_xlabel("seconds of training")
    left.set_ylabel("dev loss, nats an answer token")
    left.legend(frameon=False)
    right.set_ylabel("tokens/s")
    figure.savefig(path, dpi=120)
