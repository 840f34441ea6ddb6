"""How long a suite will take, told before it is started: questions, tokens and minutes by the arms' kinds.

Tokens are counted with the model's tokenizer; the rates are those of two cores with the engine's batch full.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hybrid.convene import DEFAULT
from hybrid.evaluation.asking import Offer
from hybrid.evaluation.runner import Job, Ledger
from hybrid.evaluation.tasks import Task, learnable, read_split
from hybrid.settings import MoaSettings, Settings
from hybrid.types import JSON
from hybrid.types.arm import Arm

#: tokens a second of a small model on two cores, 16 to 32 answers at once
PREFILL_PER_S, DECODE_PER_S = 1500.0, 300.0
#: an engine's start with the warming of the gate
START_S = 90.0
_FRAME_TOKENS, _SAMPLED = 31, 100
_PASSAGE_TOKENS = 140
#: an untrained model seldom stops at the answer: the share of its room that it fills
_TALKATIVE = 0.7
#: the strategies that learned, or are shown, how short an answer is
_BRIEF = frozenset(["adapter", "adapter+rag", "few_shot"])


@dataclass(frozen=True, slots=True)
class Part:
    """The questions to the arms of one kind: how many in all, how many have no outcome, and the tokens of those."""

    kind: str
    questions: int
    open: int
    prompt: int
    answer: int

    @property
    def minutes(self) -> float:
        """About how long the open ones take."""
        return (self.prompt / PREFILL_PER_S + self.answer / DECODE_PER_S) / 60

    def wire(self) -> JSON:
        """As `--json` shows it."""
        return {
            "kind": self.kind,
            "questions": self.questions,
            "open": self.open,
            "prompt_tokens": self.prompt,
            "answer_tokens": self.answer,
            "minutes": round(self.minutes, 1),
        }


def parts(
    jobs: Sequence[Job], offer: Offer, ledger: Ledger, count: Callable[[str], int], settings: Settings
) -> list[Part]:
    """The plan of a list of questions, the arms of one kind together."""
    size = _Size(count, settings, offer)
    by_kind: dict[str, list[Job]] = {}
    for job in jobs:
        by_kind.setdefault(job.arm.partition(":")[0], []).append(job)
    found = []
    for kind, asked in by_kind.items():
        new = [job for job in asked if ledger.get(job.key) is None]
        sizes = [size.of(job, job.arm) for job in new]
        prompt, answer = (round(sum(side)) for side in zip(*sizes, strict=True)) if sizes else (0, 0)
        found.append(Part(kind, len(asked), len(new), prompt, answer))
    return found


def turns(moa: MoaSettings, arm: Arm) -> list[list[str]]:
    """Whom a panel asks, round by round, by their spelling; whom the gate would choose is `auto`."""
    panel = moa.panels.get(arm.args[0] if arm.args else DEFAULT) if arm.strategy == "moa" else None
    if panel is None:
        return [["auto"] * (moa.proposers if arm.strategy == "moa" else moa.samples), ["auto"]]
    members = [proposer.arm for proposer in panel.proposers]
    closing = [panel.aggregator or members[0]]
    if panel.method == "refine":
        return [*([members[0]], members[1:2] or members[:1]) * panel.layers, closing]
    writes = panel.method in ("auto", "synthesis")
    return [*[members] * panel.layers, *([closing] if writes else [])]


class _Size:
    """Tokens of a question and of its likely answer."""

    def __init__(self, count: Callable[[str], int], settings: Settings, offer: Offer) -> None:
        self._count = cache(count)
        self._moa = settings.moa
        self._shots = settings.gate.few_shot_k
        self._passages = settings.retrieval.shown() * _PASSAGE_TOKENS
        self._adapters = offer.adapters
        self._tasks = {row.get("card", {}).get("task"): name for name, row in offer.adapters.items()}
        self._known: dict[Path, tuple[float, float]] = {}

    def of(self, job: Job, arm: str) -> tuple[float, float]:
        """(prompt, answer) of one job, asked of `arm`: all calls of one that asks others."""
        kind = "adapter" if arm in self._adapters else arm.partition(":")[0]
        if kind == "head":
            return 0.0, 0.0
        if kind in ("moa", "self_moa"):
            return self._conferred(job, Arm.parse(arm))
        asked, answered = self._usual(job.task)
        prompt = self._count(job.task.message(job.example)) + _FRAME_TOKENS
        more = {"few_shot": self._shots * (asked + answered), "rag": self._passages, "adapter+rag": self._passages}
        room = float(job.sampling["max_tokens"])
        trained = kind in _BRIEF or (kind == "auto" and job.task.name in self._tasks)
        return prompt + more.get(kind, 0.0), min(room, answered) if trained and answered else _TALKATIVE * room

    def _conferred(self, job: Job, arm: Arm) -> tuple[float, float]:
        """The same for a panel, at most: whoever is asked later reads what was said just before."""
        prompt = answer = said = 0.0
        for members in turns(self._moa, arm):
            sizes = [self.of(job, member) for member in members]
            prompt += sum(asked for asked, _ in sizes) + len(members) * said
            said = sum(told for _, told in sizes)
            answer += said
        return prompt, answer

    def _usual(self, task: Task) -> tuple[float, float]:
        """(question, answer) of a training row, on average."""
        if task.folder not in self._known:
            rows = learnable(read_split(task, "train")) if (task.folder / "train.jsonl").is_file() else ()
            seen = random.Random(0).sample(rows, min(_SAMPLED, len(rows)))
            n = max(1, len(seen))
            asked = sum(self._count(task.message(row)) for row in seen) / n
            answered = sum(self._count(row.reference) + 1 for row in seen if row.reference) / n
            self._known[task.folder] = (asked, answered)
        return self._known[task.folder]
