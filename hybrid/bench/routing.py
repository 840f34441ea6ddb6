"""`routing`: questions of several tasks, each with the arms that should get them, through /v1/route one by one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from hybrid import reach
from hybrid.bench.result import Goal, Result
from hybrid.errors import BadRequest, DataError
from hybrid.prompts import task_message
from hybrid.types.arm import Arm

WARM_UPS = 5
SEED = 0
GOAL_SHARE, GOAL_MS = 0.97, 15.0


@dataclass(frozen=True, slots=True)
class Owned:
    """A task folder and the arms of which one should get its questions."""

    folder: Path
    arms: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Owned:
        """`DIR=ARM[,ARM…]`, where a bare adapter's name means `adapter:NAME`. Raises BadRequest."""
        folder, _, arms = text.partition("=")
        names = [name.strip() for name in arms.split(",") if name.strip()]
        if not folder or not names:
            raise BadRequest(f"{text!r} is not DIR=ARM: give a task folder and the arm, or arms, that own it.")
        return cls(Path(folder), frozenset(map(_arm, names)))


@dataclass(frozen=True, slots=True)
class Routed:
    """One answer of /v1/route: the arm, and what deciding took in milliseconds, as the server measured it."""

    arm: str
    ms: float


async def measure(
    server: reach.Server,
    tasks: Sequence[Owned],
    *,
    limit: int,
    bare: bool,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Routes up to `limit` test rows of each task, drawn with a fixed seed; `bare` leaves the instruction out.

    Raises DataError for a folder that is no task folder, EngineRejected and NotReady from the server.
    """
    questions = {task: _questions(task.folder, limit, bare) for task in tasks}
    routed: dict[Owned, list[Routed]] = {task: [] for task in tasks}
    total = sum(map(len, questions.values()))
    async with server.connect() as session:
        for number in range(WARM_UPS):  # not of the questions: the server remembers what it has embedded
            await _route(session, f"Warm-up {number}")
        for task, texts in questions.items():
            for text in texts:
                routed[task].append(await _route(session, text))
                progress("routing", sum(map(len, routed.values())), total)
    hits = sum(_hits(task, found) for task, found in routed.items())
    times = _times([one for found in routed.values() for one in found])
    share = round(hits / total, 4)
    return Result(
        "routing",
        tuple(_row(task, found) for task, found in routed.items()),
        {"n": total, "right": hits, "share": share, "ci95": wilson(hits, total), "route_ms": times, "bare": bare},
        (
            Goal("share that got an arm of its own task", share, GOAL_SHARE, at_least=True),
            Goal("median of a decision, ms", times["p50"], GOAL_MS),
        ),
    )


async def _route(session: aiohttp.ClientSession, text: str) -> Routed:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    async with session.post("/v1/route", json=body) as response:
        decision = (await reach.answer(response))["decision"]
        return Routed(decision["arm"], float(response.headers["x-hybrid-route-ms"]))


def _row(task: Owned, found: Sequence[Routed]) -> dict[str, Any]:
    hits = _hits(task, found)
    return {
        "task": task.folder.resolve().name,
        "n": len(found),
        "right": hits,
        "share": round(hits / len(found), 4),
        "ci95": wilson(hits, len(found)),
        "route_ms": _times(found),
        "confused": dict(Counter(one.arm for one in found if one.arm not in task.arms).most_common()),
    }


def _hits(task: Owned, found: Sequence[Routed]) -> int:
    return sum(one.arm in task.arms for one in found)


def _times(found: Sequence[Routed]) -> dict[str, float]:
    p50, p95 = np.percentile([one.ms for one in found], (50, 95))
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2)}


def wilson(hits: int, n: int) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927, doi 10.2307/2276774)."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return [round(float(interval.low), 4), round(float(interval.high), 4)]


def _questions(folder: Path, limit: int, bare: bool) -> list[str]:
    """User messages of the test split, as a client of the task sends them."""
    try:
        instruction = "" if bare else json.loads((folder / "task.json").read_bytes()).get("instruction", "")
        lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        inputs = [json.loads(line)["input"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is no task folder with task.json and test.jsonl ({error}).") from error
    if not inputs:
        raise DataError(f"{folder / 'test.jsonl'} holds no rows; give a task that has a test split.")
    drawn = random.Random(SEED).sample(inputs, min(limit, len(inputs)))
    return [task_message(instruction, text) for text in drawn]


def _arm(name: str) -> str:
    try:
        return str(Arm.parse(name))
    except ValueError:
        return f"adapter:{name}"
