"""Answers judged by a model behind any OpenAI-compatible endpoint: a grade from 1 to 10, or which of two is better,
asked in both orders (Zheng et al. 2023). An opinion: never part of a score, off unless asked for, labelled as such.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from hybrid.errors import BadRequest, DataError
from hybrid.evaluation.measured import family
from hybrid.evaluation.statistics import estimate
from hybrid.prompts import judge_messages, task_message
from hybrid.types import JSON
from hybrid.types.outcome import Outcome
from hybrid.types.request import Message

Mode = Literal["rubric", "pairs"]
Progress = Callable[[int, int], None]

_AT_ONCE = 8
_ROOM = 300  # tokens: a reason in a sentence or two, then the verdict
_REASON = {"type": "string", "maxLength": 400}
_GRADE = {"score": {"type": "integer", "minimum": 1, "maximum": 10}}
_BETTER = {"better": {"type": "string", "enum": ["A", "B", "tie"]}}
_WORTH = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to judge: the message asked, the right answer where there is one, and what it is compared with."""

    outcome: Outcome
    question: str
    reference: str
    rival: str | None = None


class Judge:
    """A model that judges. The key is `OPENAI_API_KEY`, which local servers do without."""

    def __init__(self, url: str, model: str) -> None:
        from openai import AsyncOpenAI

        self.model = model
        self._client = AsyncOpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=2)
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> Judge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def verdict(self, case: Case) -> float | None:
        """What the answer is worth, 0 to 1: its grade, or how it does beside its rival; None where judging failed."""
        if case.rival is None:
            grade = await self._ask(judge_messages(case.question, [case.outcome.answer], case.reference), _GRADE)
            return (grade - 1) / 9 if isinstance(grade, int) and 1 <= grade <= 10 else None
        own, rival = case.outcome.answer, case.rival
        first, second = await asyncio.gather(
            self._ask(judge_messages(case.question, [own, rival], case.reference), _BETTER),
            self._ask(judge_messages(case.question, [rival, own], case.reference), _BETTER),
        )
        if first not in _WORTH or second not in _WORTH:
            return None
        return (_WORTH[first] + 1 - _WORTH[second]) / 2

    async def _ask(self, messages: Sequence[Message], wanted: Mapping[str, Any]) -> Any:
        """The verdict field of one reply; None for no reply, or one that is not what the schema says."""
        from openai import APIError

        name = next(iter(wanted))
        schema = {"type": "object", "properties": {"reason": _REASON, **wanted}, "required": ["reason", name],
                  "additionalProperties": False}  # fmt: skip
        shape: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}
        wire: Any = [message.wire() for message in messages]
        try:
            async with self._room:
                reply = await self._client.chat.completions.create(
                    model=self.model, messages=wire, response_format=shape, temperature=0, max_tokens=_ROOM
                )
            return json.loads(reply.choices[0].message.content or "")[name]
        except (APIError, ValueError, KeyError, TypeError, IndexError):
            return None


async def judged(
    judge: Judge, cases: Sequence[Case], mode: Mode, against: str = "", progress: Progress | None = None
) -> JSON:
    """The part `judge` of a report: task → arm → the mean verdict with its interval, n and errors.

    Verdicts that failed are counted and left out of the means.
    """
    told = progress or (lambda _done, _total: None)
    verdicts = await _in_turn([judge.verdict(case) for case in cases], told)
    tasks: dict[str, dict[str, list[float | None]]] = {}
    for case, worth in zip(cases, verdicts, strict=True):
        tasks.setdefault(case.outcome.task, {}).setdefault(case.outcome.arm, []).append(worth)
    return {
        "model": judge.model,
        "mode": mode,
        "against": against,
        "asked": len(cases),
        "errors": sum(worth is None for worth in verdicts),
        "tasks": {task: {a: row for a, found in arms.items() if (row := _row(found))} for task, arms in tasks.items()},
    }


async def _in_turn(asked: Sequence[Awaitable[float | None]], told: Progress) -> list[float | None]:
    done = 0

    async def one(verdict: Awaitable[float | None]) -> float | None:
        nonlocal done
        worth = await verdict
        done += 1
        told(done, len(asked))
        return worth

    return await asyncio.gather(*(one(verdict) for verdict in asked))


def _row(found: Sequence[float | None]) -> JSON:
    kept = [worth for worth in found if worth is not None]
    return {**estimate(kept).wire(), "errors": len(found) - len(kept)} if kept else {}


def cases_of(
    outcomes: Sequence[Outcome], examples: Sequence[JSON], mode: Mode, against: str = "", limit: int | None = None
) -> list[Case]:
    """What to judge in a report folder: `limit` answers of each arm on each task.

    `pairs` compares with the answers of the arm `against`, by the name that it has over all tasks. Raises DataError for
    a folder without texts, BadRequest where no task has such an arm.
    """
    rows = {(row["task"], row["id"]): row for row in examples}
    if not rows or not any(o.answer for o in outcomes):
        raise DataError("This report was written without texts, so there is nothing to judge; run `hybrid eval` again.")
    rivals = {(o.task, o.id): o.answer for o in outcomes if family(o.arm, o.task) == against and o.error is None}
    if mode == "pairs" and not rivals:
        raise BadRequest(f"No task of this report has answers of {against!r}; name an arm of it.", param="against")
    taken: dict[tuple[str, str], int] = {}
    cases = []
    for o in outcomes:
        key, row = (o.task, o.arm), rows.get((o.task, o.id))
        rival = rivals.get((o.task, o.id)) if mode == "pairs" else None
        skipped = mode == "pairs" and (rival is None or family(o.arm, o.task) == against)
        if row is None or o.error is not None or skipped or taken.get(key, 0) == limit:
            continue
        taken[key] = taken.get(key, 0) + 1
        cases.append(Case(o, task_message(row["instruction"], row["input"]), row["reference"], rival))
    return cases
