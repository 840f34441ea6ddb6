"""The loop every gradient method shares: schedule, clipping, dev loss, early stop, the best weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hybrid.errors import BadRequest
from hybrid.training.batches import Encoded, Pack, batches, packs
from hybrid.training.kernels import fast_loss
from hybrid.training.recipes import Recipe

if TYPE_CHECKING:
    from torch import Tensor

CLIP = 1.0
#: dev rows measured while training; the final numbers come from all of them
DEV_GLANCE = 200

#: logits [A, vocabulary] of a pack's answer places
Forward = Callable[[Pack], "Tensor"]


class Progress(Protocol):
    """Told `step`, `steps`, `loss`, `tokens_per_s`, `eta_s` at every step, and `dev_loss` when it was measured."""

    def __call__(self, **told: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """How well answers are predicted, teacher-forced. `exact` is the share of rows a greedy decoder would get whole."""

    loss: float
    token_accuracy: float
    exact: float


@dataclass(slots=True)
class Report:
    """What a run did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    best_step: int = 0
    stopped_early: bool = False
    curve: list[Mapping[str, float]] = field(default_factory=list)


def measure(forward: Forward, rows: Sequence[Encoded]) -> Measured:
    """Mean loss in nats an answer token, the share of tokens right, the share of answers right throughout."""
    import torch

    loss = right = whole = 0.0
    tokens = sum(len(row.answer) for row in rows)
    with torch.no_grad():
        for pack in packs(rows):
            logits = forward(pack).float()
            targets = pack.targets.to(logits.device)
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            hits = (logits.argmax(-1) == targets).cpu()
            right += float(hits.sum())
            whole += float(torch.ones(pack.rows).scatter_reduce(0, pack.owners, hits.float(), "amin").sum())
    return Measured(loss / tokens, right / tokens, whole / len(rows))


def optimise(
    forward: Forward,
    parameters: Sequence[Tensor],
    train: Sequence[Encoded],
    dev: Sequence[Encoded],
    recipe: Recipe,
    progress: Progress,
) -> Report:
    """Trains `parameters` in place and leaves the best of them there.

    Raises BadRequest when the loss stops being a number.
    """
    import torch

    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    steps, every = plan(len(train), recipe)
    feed = batches(train, recipe.batch_size, recipe.seed)
    best = _Best(parameters, recipe)
    report = Report()
    losses: list[float] = []
    start = time.monotonic()
    for step in range(1, steps + 1):
        rows = [row for _ in range(recipe.accumulate) for row in next(feed)]
        losses.append(_backward(forward, rows, step))
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, steps, recipe.warmup_ratio)
        optimiser.step()
        optimiser.zero_grad()
        report.tokens += sum(row.length for row in rows)
        told: dict[str, float] = {"loss": losses[-1]}
        if step % every == 0 or step == steps:
            told["dev_loss"] = best.offer(step, measure(forward, dev[:DEV_GLANCE]).loss)
            report.curve.append({"step": step, "loss": _recent(losses), "dev_loss": told["dev_loss"]})
        elapsed = time.monotonic() - start
        per_s = report.tokens / elapsed
        progress(step=step, steps=steps, tokens_per_s=per_s, eta_s=elapsed / step * (steps - step), **told)
        if best.exhausted and step < steps:
            report.stopped_early = True
            break
    best.restore()
    report.steps, report.seconds = step, time.monotonic() - start
    report.train_loss, report.best_step = _recent(losses), best.step
    return report


def plan(rows: int, recipe: Recipe) -> tuple[int, int]:
    """(optimiser steps, steps between dev measurements) of a run over `rows` rows."""
    epoch = math.ceil(rows / (recipe.batch_size * recipe.accumulate))
    steps = max(1, math.ceil(epoch * recipe.epochs))
    steps = min(steps, recipe.max_steps or steps)
    return steps, recipe.eval_every or max(1, epoch // 2)


def rate(step: int, steps: int, warmup_ratio: float) -> float:
    """The share of the peak rate at a step (from 1): a linear climb, then a cosine down to nearly nothing."""
    climb = max(1, round(steps * warmup_ratio))
    if step <= climb:
        return step / climb
    return 0.5 * (1 + math.cos(math.pi * (step - climb) / (steps - climb + 1)))


def _backward(forward: Forward, rows: Sequence[Encoded], step: int) -> float:
    """Accumulates the gradient of the mean loss an answer token over all rows; returns that mean."""
    scale = 1 / sum(len(row.answer) for row in rows)
    total = 0.0
    for pack in packs(rows):
        logits = forward(pack)
        loss = fast_loss()(logits, pack.targets.to(logits.device), scale)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    if not math.isfinite(total):
        raise BadRequest(
            f"The loss is no number any more at step {step}; use a lower learning_rate.", param="learning_rate"
        )
    return total


def _recent(losses: Sequence[float], window: int = 20) -> float:
    last = losses[-window:]
    return sum(last) / len(last)


class _Best:
    """The best weights so far (a LoRA's are small enough to copy), and how long ago that was."""

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe) -> None:
        self._parameters = parameters
        self._patience = recipe.patience if recipe.early_stop else 0
        self._kept: list[Tensor] = []
        self._loss = math.inf
        self._misses = 0
        self.step = 0

    def offer(self, step: int, loss: float) -> float:
        """Keeps the weights if the dev loss is a new best. Returns the loss."""
        if loss < self._loss:
            self._loss, self.step, self._misses = loss, step, 0
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
        else:
            self._misses += 1
        return loss

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return 0 < self._patience <= self._misses

    def restore(self) -> None:
        """Puts the best weights back."""
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.data.copy_(kept)
