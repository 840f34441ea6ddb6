"""`eval`: the evaluator and a plain client ask one engine the same prompts, taking turns; how much of it does each use?

The evaluator is the whole of it: `runner.run` over a gateway of this process, with its strategies, scores and ledger.
The rival posts the very bodies that come of it straight to the engine's own server, as many at once, and reads nothing
but the usage. Both are greedy and have the same room for an answer; the engine is started for the comparison alone.

What the engine remembers of one prompt makes the next one faster, so no prompt comes twice: each round has rows of its
own, and each side a cache compartment of its own (`cache_salt`). Both compartments thus see the same prompts in the
same order, and what these share (an instruction, a worked example) is as often computed anew for one as for the other.
A first round, which does not count, warms both; after it the sides take turns in going first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hybrid import reach
from hybrid.bench.result import Goal, Result, ratio
from hybrid.boot import open_gateway, token_counter, wait_ready
from hybrid.engine.wire import request_body
from hybrid.errors import BadRequest, DataError, EngineError
from hybrid.evaluation.asking import GatewayAsker
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.runner import INFLIGHT, Job, Ledger, jobs_for, run, token_limit
from hybrid.evaluation.tasks import Task, read_split, read_task
from hybrid.gateway import Gateway
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.lending import lending
from hybrid.models import materialise
from hybrid.prompts import before_last_user, few_shot_messages
from hybrid.quickstart import write_tasks
from hybrid.rooms import write_json
from hybrid.settings import Settings
from hybrid.types import JSON
from hybrid.types.request import Message

ARMS = ("prompt", "few_shot")
GOAL = 0.9


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side did with one round of an arm: tokens by answer (prompt, completion), and seconds for all."""

    tokens: tuple[tuple[int, int], ...]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Prompt and completion tokens a second."""
        return sum(map(sum, self.tokens)) / self.seconds

    @property
    def answers_per_s(self) -> float:
        """Answers a second."""
        return len(self.tokens) / self.seconds

    def wire(self) -> JSON:
        """As `eval.json` keeps it."""
        prompt, completion = (sum(column) for column in zip(*self.tokens, strict=True))
        return {"answers": len(self.tokens), "prompt": prompt, "completion": completion, "seconds": self.seconds}


@dataclass(slots=True)
class Lane:
    """One arm, and the turns of both sides that count."""

    arm: str
    ours: list[Turn] = field(default_factory=list)
    engine: list[Turn] = field(default_factory=list)

    @property
    def unequal(self) -> int:
        """Prompts that were not the same for both, told by their length in tokens."""
        pairs = zip(self.ours, self.engine, strict=True)
        return sum(a[0] != b[0] for x, y in pairs for a, b in zip(x.tokens, y.tokens, strict=True))


@dataclass(frozen=True, slots=True)
class Subject:
    """A task, the rows that are asked, and the room for an answer in tokens."""

    task: Task
    examples: tuple[Example, ...]
    max_tokens: int


async def measure(
    settings: Settings,
    tasks: Sequence[Path],
    *,
    arms: Sequence[str],
    limit: int,
    rounds: int,
    out: Path | None,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Asks `limit` rows of each task a round, of its dev and test splits (the quickstart's tasks without any).

    Writes `eval.json` and `eval.png` into `out`. Raises BadRequest for an arm that is not one of ARMS, DataError for
    tasks with too few rows, SetupError and NotReady without an engine, EngineError when an answer fails.
    """
    if unknown := set(arms) - set(ARMS):
        raise BadRequest(f"Not measured here: {', '.join(sorted(unknown))}. Use {', '.join(ARMS)}.", param="arms")
    lanes = [Lane(arm) for arm in dict.fromkeys(arms)]
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        alone = settings.model_copy(update={"home": Path(folder), "system_prompt": ""})
        model = await asyncio.to_thread(materialise, settings.model, settings.cache, progress)
        rows, count = limit * (rounds + 1), token_counter(model)
        found = [_subject(one, rows, count) for one in tasks or write_tasks(alone.rooms)]
        with lending(alone.rooms, {subject.task.name: subject.task.folder for subject in found}):
            async with open_gateway(alone, progress) as gateway:
                await wait_ready(gateway, settings.engine.start_timeout_s, progress)
                async with _engine(alone) as client:
                    contest = _Contest(alone, gateway, client, found, limit)
                    for number in range(rounds + 1):
                        progress("asking", number, rounds + 1)
                        for lane in lanes:
                            await contest.turns(lane, number)
    facts = {
        "model": model.name,
        "engine": settings.engine.kind,
        "tasks": [subject.task.name for subject in found],
        "questions_a_turn": limit * len(found),
        "rounds": rounds,
        "open_at_once": INFLIGHT,
    }
    result = _result(lanes, facts)
    if out is not None:
        await asyncio.to_thread(_write, out, result, lanes)
    return result


def _subject(folder: Path, rows: int, count: Callable[[str], int]) -> Subject:
    task = read_task(folder)
    dev, train = read_split(task, "dev"), read_split(task, "train")
    examples = (*dev.examples, *read_split(task, "test").examples)
    if len(examples) < rows:
        raise DataError(
            f"{folder} has {len(examples)} rows in dev and test, and every round needs its own: {rows} in all. "
            "Take a smaller --limit or fewer --rounds."
        )
    return Subject(task, examples, token_limit([train, dev], count))


@contextlib.asynccontextmanager
async def _engine(settings: Settings) -> AsyncIterator[aiohttp.ClientSession]:
    """A plain client of the engine's own server: of its socket, or of the URL where it runs."""
    url = settings.engine.kind.rstrip("/").removesuffix("/v1")
    connector: aiohttp.BaseConnector
    if url.startswith("http"):
        connector = aiohttp.TCPConnector(limit=0)
    else:
        folder = json.loads((settings.rooms.hidden / "engine.json").read_bytes())["folder"]
        url, connector = "http://engine", aiohttp.UnixConnector(str(Path(folder) / "engine.sock"), limit=0)
    timeout = aiohttp.ClientTimeout(total=settings.engine.answer_timeout_s)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        yield session


class _Contest:
    """Both sides before one engine."""

    def __init__(
        self,
        settings: Settings,
        gateway: Gateway,
        client: aiohttp.ClientSession,
        subjects: Sequence[Subject],
        limit: int,
    ) -> None:
        self._settings, self._gateway, self._client = settings, gateway, client
        self._subjects, self._limit = subjects, limit
        self._salt = secrets.token_hex(16)
        self._asker = GatewayAsker(gateway, "")
        known = gateway.library.embedder
        # not the gateway's own, which remembers queries: it must embed them itself, in its own time
        self._embedder = Embedder(known.path, known.name)

    async def turns(self, lane: Lane, number: int) -> None:
        """A round of one arm by both sides; round 0 warms and is not kept."""
        jobs = await self._jobs(lane.arm, number)
        bodies = await asyncio.to_thread(lambda: [self._body(job) for job in jobs])
        if number % 2:
            ours, engine = await self._ours(jobs), await self._plain(bodies)
        else:
            engine, ours = await self._plain(bodies), await self._ours(jobs)
        if number:
            lane.ours.append(ours)
            lane.engine.append(engine)

    async def _jobs(self, arm: str, number: int) -> list[Job]:
        """The questions of a round."""
        offer = await self._asker.offer()
        block = slice(number * self._limit, (number + 1) * self._limit)
        jobs: list[Job] = []
        for subject in self._subjects:
            named = f"{arm}:{subject.task.name}" if arm == "few_shot" else arm
            jobs += jobs_for(subject.task, subject.examples[block], named, offer, subject.max_tokens)
        return jobs

    def _body(self, job: Job) -> tuple[str, JSON]:
        """The path and body that the gateway will send for a job, but for the cache compartment."""
        question = job.task.message(job.example)
        messages: tuple[Message, ...] = (Message("user", question),)
        if job.arm != "prompt":
            shelf, k = self._gateway.shelves.get(job.task.name), self._settings.gate.few_shot_k
            nearest = reversed(shelf.nearest(self._embedder.embed_query(question), k))
            shown = few_shot_messages((message, answer) for message, answer, _ in nearest)
            messages = before_last_user(messages, shown)
        model = self._gateway.engine.status().model
        return request_body(model, messages, None, job.sampling, False, self._salt)

    async def _ours(self, jobs: Sequence[Job]) -> Turn:
        """The evaluator's turn, with its ledger. Raises EngineError for an answer that failed."""
        ledger = Ledger(self._settings.rooms.reports / "bench")
        began = time.perf_counter()
        outcomes = await run(self._asker, jobs, ledger)
        ledger.close()
        seconds = time.perf_counter() - began
        for outcome in outcomes:
            if outcome.error:
                raise EngineError(f"An answer failed, so there is nothing to compare: {outcome.error}")
        return Turn(tuple((o.prompt_tokens, o.completion_tokens) for o in outcomes), seconds)

    async def _plain(self, bodies: Sequence[tuple[str, JSON]]) -> Turn:
        """The rival's turn: as many requests open at once as the evaluator has."""
        tokens = [(0, 0)] * len(bodies)
        todo = iter(range(len(bodies)))

        async def work() -> None:
            for n in todo:
                path, body = bodies[n]
                async with self._client.post(path, json=body) as response:
                    usage = (await reach.answer(response))["usage"]
                tokens[n] = usage["prompt_tokens"], usage["completion_tokens"]

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(INFLIGHT):
                group.create_task(work())
        return Turn(tuple(tokens), time.perf_counter() - began)


def _result(lanes: Sequence[Lane], facts: dict[str, Any]) -> Result:
    ratios = {lane.arm: ratio(_speeds(lane.ours), _speeds(lane.engine), digits=3) for lane in lanes}
    goals = [
        Goal(f"{arm}: tokens/s by the engine's own", found["median"], GOAL, at_least=True)
        for arm, found in ratios.items()
    ]
    unequal = sum(lane.unequal for lane in lanes)
    rows = tuple(_row(lane, ratios[lane.arm]) for lane in lanes)
    return Result("eval", rows, facts, (*goals, Goal("prompts that were not the same for both", unequal, 0)))


def _row(lane: Lane, found: JSON) -> JSON:
    both = {"evaluator": lane.ours, "engine": lane.engine}
    speeds = {f"{who}_tokens_per_s": round(statistics.median(_speeds(turns)), 1) for who, turns in both.items()}
    rates = {
        f"{who}_answers_per_s": round(statistics.median(turn.answers_per_s for turn in turns), 2)
        for who, turns in both.items()
    }
    return {"arm": lane.arm, **speeds, **rates, "times": found["median"], "ci95": found["ci95"]}


def _speeds(turns: Sequence[Turn]) -> list[float]:
    return [turn.tokens_per_s for turn in turns]


def _write(out: Path, result: Result, lanes: Sequence[Lane]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    turns = {
        lane.arm: {"evaluator": [t.wire() for t in lane.ours], "engine": [t.wire() for t in lane.engine]}
        for lane in lanes
    }
    write_json(out / "eval.json", {**result.wire(), "turns": turns})
    _draw(result, lanes, out / "eval.png")


def _draw(result: Result, lanes: Sequence[Lane], path: Path) -> None:
    """Tokens a second of both, and theirs by the engine's: bars and marks are medians, dots are the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for lane, row in zip(lanes, result.rows, strict=True):
        for who, turns, colour in (("evaluator", lane.ours, "C0"), ("engine", lane.engine, "C1")):
            name, speeds = f"{lane.arm}\n{who}", _speeds(turns)
            left.bar(name, statistics.median(speeds), color=colour, alpha=0.7)
            left.plot([name] * len(speeds), speeds, ".", color="black", markersize=4)
        times = [a / b for a, b in zip(_speeds(lane.ours), _speeds(lane.engine), strict=True)]
        low, high = row["ci95"]
        right.plot([lane.arm] * len(times), times, ".", color="black", markersize=4)
        right.errorbar([lane.arm], [row["times"]], [[row["times"] - low], [high - row["times"]]], fmt="_", capsize=6)
    right.axhline(GOAL, color="grey", linestyle=":")
    right.margins(x=0.5)
    right.set_ylabel("evaluator's tokens/s by the engine's")
    left.set_ylabel("tokens/s, prompt and answer")
    figure.savefig(path, dpi=120)
