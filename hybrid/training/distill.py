"""Distillation: a small model learns what a stronger one says.

`distill` is sequence-level (Kim and Rush 2016, arXiv 1606.07947): the teacher, behind any OpenAI-compatible endpoint,
answers the training inputs, and its answers are learned. `distill_logits` (Hinton et al. 2015, arXiv 1503.02531)
learns the probabilities of a local teacher with the same tokenizer, mixed with the answers themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.errors import BadRequest, EngineError
from hybrid.models import materialise
from hybrid.training import lora
from hybrid.training.base import forward_of, load_base
from hybrid.training.batches import Encoded, Pack, packs
from hybrid.training.control import Stopped
from hybrid.training.data import BAD_LIMIT
from hybrid.training.endpoint import Endpoint, Said
from hybrid.training.formats import Example
from hybrid.training.job import Fitted, Job
from hybrid.training.objective import Forward
from hybrid.training.start import take_up
from hybrid.training.supervised import Learner, fit_answers

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("hybrid.training")
#: what the teacher said so far, in the run's own folder
ANSWERS = "answers.jsonl"
#: questions at a time: once too many have failed, the rest are not asked
_AT_ONCE = 8


def fit(job: Job) -> Fitted:
    """Asks the teacher, then trains on what it said; dev keeps its references. Raises EngineError where more than 5 %
    of the questions get no answer; what was answered is kept for the next try."""
    recipe = job.recipe
    if not recipe.teacher.startswith(("http://", "https://")) or not recipe.teacher_model:
        raise BadRequest(
            "distill asks a teacher: set teacher to its URL (ending in /v1) and teacher_model to its name.",
            param="teacher",
        )
    team = job.watch.team
    said = team.agree(asyncio.run(_Class(job).ask()) if team.leads else None)
    taught = [replace(row, answer=answer) for row, answer in zip(job.data.train, said, strict=True) if answer]
    agreed = sum(row.answer == answer for row, answer in zip(job.data.train, said, strict=True))
    fitted = lora.fit(replace(job, data=replace(job.data, train=tuple(taught))))
    told = {
        "answers": len(taught),
        "failed": len(said) - len(taught),
        "equal_to_reference": round(agreed / len(said), 4),
    }
    return replace(fitted, metrics={**fitted.metrics, "teacher": told})


class _Class:
    """The teacher and the answers it gave."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._path = job.folder / ANSWERS if job.folder else None
        self._said = _kept(self._path)
        self._failed = 0
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def ask(self) -> list[str]:
        """The teacher's answer to each training row, "" where it gave none."""
        rows = self._job.data.train
        async with Endpoint(self._job.recipe.teacher, self._job.recipe.teacher_model) as teacher:
            found = await asyncio.gather(*(self._one(teacher, row) for row in rows), return_exceptions=True)
        failures = [problem for problem in found if isinstance(problem, BaseException)]
        for problem in failures:
            if not isinstance(problem, EngineError):
                raise problem
        answers = ["" if isinstance(said, BaseException) else said for said in found]
        if (missing := answers.count("")) > BAD_LIMIT * len(rows):
            why = failures[0] if failures else "it gave empty answers"
            raise EngineError(
                f"The teacher left {missing} of {len(rows)} questions unanswered, more than {BAD_LIMIT:.0%} ({why}). "
                "Run the same command again: what it answered is kept."
            )
        if missing:
            log.warning("left out: %d of %d rows that the teacher did not answer.", missing, len(rows))
        return answers

    async def _one(self, teacher: Endpoint, row: Example) -> str:
        key = hashlib.sha256(json.dumps(row.key, ensure_ascii=False).encode()).hexdigest()
        if key in self._said:
            return self._said[key]
        async with self._room:
            said = await self._heard(teacher, row)
        if said.text and self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answer": said.text}, ensure_ascii=False) + "\n")
        if (wanted := self._job.watch.control.wanted()) != "run":
            raise Stopped(wanted, 0)
        return said.text

    async def _heard(self, teacher: Endpoint, row: Example) -> Said:
        if self._failed > BAD_LIMIT * len(self._job.data.train):
            raise EngineError("it was not asked any more")
        try:
            return await teacher.ask(row.messages, temperature=0, max_tokens=self._job.recipe.max_length)
        except EngineError:
            self._failed += 1
            raise


def _kept(path: Path | None) -> dict[str, str]:
    """The answers of an earlier try; a line that a kill cut short is asked again."""
    found: dict[str, str] = {}
    if path is None or not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[row["key"]] = row["answer"]
        except ValueError:
            continue
    return found


def fit_logits(job: Job) -> Fitted:
    """LoRA against a local teacher's probabilities. Raises BadRequest for a teacher with another tokenizer."""
    if not job.recipe.teacher:
        raise BadRequest(
            "distill_logits learns from a local model: set teacher to its folder or name.", param="teacher"
        )
    base, tokenizer, train, dev = lora.opened(job)
    files = materialise(job.recipe.teacher, job.settings.cache)
    teacher, theirs = load_base(files, job.recipe.precision)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise BadRequest(
            f"{files.name} has another tokenizer than {job.model.name}, so their probabilities cannot be compared; "
            "choose a teacher of the same family, or method distill.", param="teacher",
        )  # fmt: skip
    model = lora.adapted(base, job.recipe, job.model.name)
    take_up(model, job)
    text = lora.canary_text(job, tokenizer)
    learner = Learner(
        model, lora.lora_groups(model, job.recipe), lambda f: lora.save_adapter(model, tokenizer, text, f)
    )
    objective = Taught(
        forward_of(model), forward_of(teacher.eval()), job.recipe.distill_temperature, job.recipe.distill_weight
    )
    fitted = fit_answers(job, learner, train, dev, objective=objective)
    return replace(fitted, metrics={**fitted.metrics, "dev_teacher_kl": round(objective.apart(dev), 5)})


@dataclass(frozen=True, slots=True)
class Taught:
    """w · τ² · KL(teacher ‖ student), both softened by τ, + (1 − w) · cross-entropy, summed over answer tokens."""

    student: Forward
    teacher: Forward
    temperature: float
    share: float

    def weight(self, rows: Sequence[Encoded]) -> float:
        """Answer tokens."""
        return float(sum(len(row.answer) for row in rows))

    def backward(self, rows: Sequence[Encoded], scale: float) -> float:
        """One forward pass of the teacher and one there and back of the student a pack."""
        total = 0.0
        for pack in packs(rows):
            kl, entropy = self._parts(pack)
            loss = (self.share * kl + (1 - self.share) * entropy) * scale
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def total(self, rows: Sequence[Encoded]) -> float:
        """Summed over answer tokens."""
        import torch

        with torch.no_grad():
            found = [self._parts(pack) for pack in packs(rows)]
        return sum(float(self.share * kl + (1 - self.share) * entropy) for kl, entropy in found)

    def apart(self, rows: Sequence[Encoded]) -> float:
        """τ² · KL(teacher ‖ student) of an answer token at the mean, in nats."""
        import torch

        with torch.no_grad():
            return sum(float(self._parts(pack)[0]) for pack in packs(rows)) / self.weight(rows)

    def _parts(self, pack: Pack) -> tuple[Tensor, Tensor]:
        import torch

        with torch.no_grad():
            wanted = self.teacher(pack).float()
        logits = self.student(pack).float()
        shared = min(logits.shape[-1], wanted.shape[-1])  # the rest is padding of the embedding matrix
        entropy = torch.nn.functional.cross_entropy(logits, pack.targets.to(logits.device), reduction="sum")
        soft = (logits[:, :shared] / self.temperature).log_softmax(-1)
        target = (wanted[:, :shared] / self.temperature).log_softmax(-1)
        kl = torch.nn.functional.kl_div(soft, target, reduction="sum", log_target=True)
        return kl * self.temperature**2, entropy
