"""Whether what is measured was learned from: test questions among the examples that an adapter was trained on.

A card's hash cannot tell that, so the examples themselves are looked at: those on the shelf of the very version that
answered, or those that few-shot prompts are made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from hybrid.evaluation.metrics import Example
from hybrid.evaluation.tasks import Task
from hybrid.prompts import task_message
from hybrid.rooms import Home
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

SHELF = "examples.jsonl"
TRAIN = "train.jsonl"
NOTE = "`leaked` counts answers to questions that stand among the examples learned from; such a score proves nothing"


def mark_leaks(
    report: JSON, asked: Mapping[str, tuple[Task, Sequence[Example]]], outcomes: Sequence[Outcome], rooms: Home
) -> None:
    """Puts `leaked`, a number of examples, on each arm of a report that answered questions it was trained on."""
    counts: dict[tuple[str, str], int] = {}
    learned = cache(_learned)
    inputs = {name: {e.id: task.message(e) for e in examples} for name, (task, examples) in asked.items()}
    for outcome in outcomes:
        task = asked[outcome.task][0]
        if _key(inputs[outcome.task][outcome.id]) in learned(_source(outcome, task, rooms), task.instruction):
            counts[outcome.task, outcome.arm] = counts.get((outcome.task, outcome.arm), 0) + 1
    for (name, arm), count in counts.items():
        report["tasks"][name]["arms"][arm]["leaked"] = count
    if counts:
        report["notes"]["leaked"] = NOTE


def _source(outcome: Outcome, task: Task, rooms: Home) -> Path | None:
    """The file of examples that an answer drew on."""
    if outcome.adapter:
        name, _, version = outcome.adapter.partition("@")
        return rooms.adapters / name / version / SHELF
    shown = outcome.chosen or outcome.arm
    return task.folder / TRAIN if shown == f"few_shot:{task.name}" else None


def _learned(path: Path | None, instruction: str) -> frozenset[str]:
    """The questions of a file of examples; those of a task folder as they are asked."""
    if path is None or not path.is_file():
        return frozenset()
    prefix = instruction if path.name == TRAIN else ""
    with path.open(encoding="utf-8") as file:
        return frozenset(_key(task_message(prefix, json.loads(line)["input"])) for line in file if line.strip())


def _key(message: str) -> str:
    return " ".join(message.split()).casefold()
