"""The loop every gradient method shares: schedule, clipping, dev loss, early stop, the best weights, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from hybrid.errors import BadRequest
from hybrid.training.batches import Row, Sized, batches, first
from hybrid.training.checkpoints import Checkpoint, Checkpoints
from hybrid.training.control import RUN, Control, Stopped
from hybrid.training.memory import EVERY, give_back
from hybrid.training.objective import Objective
from hybrid.training.recipes import Recipe
from hybrid.training.team import Team, placed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import AdamW

CLIP = 1.0
#: dev rows measured while training at most, and their tokens; the final numbers come from more
DEV_GLANCE, GLANCE_TOKENS = 200, 12_000
#: how many times its own duration a save waits for the next one
SAVE_SHARE = 20.0


class Progress(Protocol):
    """Told `step`, `steps`, `loss`, `tokens_per_s`, `eta_s` at every step, and `dev_loss` when it was measured.

    Told `checkpoint` (its step), `path`, `loss` and `dev_loss` when a checkpoint is complete, and `phase` at each turn.
    """

    def __call__(self, **told: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that train at `rate` times the recipe's learning rate."""

    parameters: Sequence[Tensor]
    rate: float = 1.0


@dataclass(frozen=True, slots=True)
class Watch:
    """Everything around a run that is not mathematics: who is told, who may stop it, where it is kept and how often.

    `checkpoint_s` is the seconds between checkpoints at least; 0 saves after every step.
    """

    progress: Progress
    control: Control = RUN
    checkpoints: Checkpoints = field(default_factory=lambda: Checkpoints(None))
    team: Team = field(default_factory=Team)
    checkpoint_s: float = 30.0


@dataclass(slots=True)
class Report:
    """What a run did."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float = math.nan
    best_step: int = 0
    stopped_early: bool = False
    resumed_from: int = 0
    curve: list[Mapping[str, float]] = field(default_factory=list)


def optimise(
    objective: Objective,
    groups: Sequence[Group],
    train: Sequence[Sized],
    dev: Sequence[Sized],
    recipe: Recipe,
    watch: Watch,
) -> Report:
    """Trains the groups' parameters in place and leaves the best of them there.

    Goes on from the newest complete checkpoint, to where an uninterrupted run would have come. Raises BadRequest when
    the loss stops being a number, Stopped when it is told to, SetupError when a checkpoint cannot be written.
    """
    run = _Run(objective, groups, train, dev, recipe, watch)
    run.go()
    return run.report


def plan(rows: int, recipe: Recipe) -> tuple[int, int]:
    """(optimiser steps, steps between dev measurements) of a run over `rows` rows."""
    epoch = math.ceil(rows / (recipe.batch_size * recipe.accumulate))
    steps = max(1, math.ceil(epoch * recipe.epochs))
    steps = min(steps, recipe.max_steps or steps)
    return steps, recipe.eval_every or max(1, epoch // 2)


def glance(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that are measured in passing."""
    return first(rows, GLANCE_TOKENS, most=DEV_GLANCE)


def rate(step: int, steps: int, warmup_ratio: float) -> float:
    """The share of the peak rate at a step (from 1): a linear climb, then a cosine down to nearly nothing."""
    climb = max(1, round(steps * warmup_ratio))
    if step <= climb:
        return step / climb
    return 0.5 * (1 + math.cos(math.pi * (step - climb) / (steps - climb + 1)))


class _Run:
    """One run's moving parts."""

    def __init__(
        self,
        objective: Objective,
        groups: Sequence[Group],
        train: Sequence[Sized],
        dev: Sequence[Sized],
        recipe: Recipe,
        watch: Watch,
    ) -> None:
        import torch

        self.report = Report()
        self._objective, self._recipe, self._watch = objective, recipe, watch
        self._dev = glance(dev)
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._rates = [group.rate for group in groups]
        self._optimiser = torch.optim.AdamW(
            [{"params": list(group.parameters)} for group in groups],
            lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        self._steps, self._every = plan(len(train), recipe)
        self._feed = batches(train, recipe.batch_size, recipe.seed)
        self._best = _Best(self._parameters, recipe)
        self._losses: list[float] = []
        self._start = self._saved = time.monotonic()
        self._save_took = 0.0

    def go(self) -> None:
        """Steps until the plan, patience or the control ends it; then the best weights are put back."""
        first = self._resume() + 1
        for step in range(first, self._steps + 1):
            self._heed(step - 1)
            self._step(step)
            if self._best.exhausted and step < self._steps:
                self.report.stopped_early = True
                break
            self._keep(step)
        self._best.restore()
        self.report.seconds = time.monotonic() - self._start
        self.report.train_loss, self.report.best_step = _recent(self._losses), self._best.step

    def _step(self, step: int) -> None:
        import torch

        recipe, team = self._recipe, self._watch.team
        rows = [row for batch in islice(self._feed, recipe.accumulate) for row in batch]
        share = team.share(rows)
        due = share or recipe.shard  # a split model needs every process, whether it has rows or not
        loss = self._objective.backward(share, 1 / self._objective.weight(rows)) if due else 0.0
        (loss,) = team.sum(loss)
        if not math.isfinite(loss):
            raise BadRequest(
                f"The loss is no number any more at step {step}; use a lower learning_rate.", param="learning_rate"
            )
        team.sum_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        for group, share_of_rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = share_of_rate * recipe.learning_rate * rate(step, self._steps, recipe.warmup_ratio)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._losses.append(loss)
        self.report.steps = step
        self.report.tokens += sum(row.length for row in rows)
        if step % EVERY == 0:
            give_back()
        self._tell(step, loss)

    def _tell(self, step: int, loss: float) -> None:
        told: dict[str, float] = {"loss": loss}
        if step % self._every == 0 or step == self._steps:
            told["dev_loss"] = self._best.offer(step, self._dev_loss())
            self.report.curve.append({"step": step, "loss": _recent(self._losses), "dev_loss": told["dev_loss"]})
        elapsed = time.monotonic() - self._start
        per_s = self.report.tokens / elapsed
        left = elapsed / step * (self._steps - step)
        self._watch.progress(phase="training", step=step, steps=self._steps, tokens_per_s=per_s, eta_s=left, **told)

    def _dev_loss(self) -> float:
        share = self._watch.team.share(self._dev)
        total, weight = self._watch.team.sum(
            self._objective.total(share) if share or self._recipe.shard else 0.0, self._objective.weight(share)
        )
        return total / weight

    # --- stopping and going on -------------------------------------------------------------------------------------

    def _heed(self, step: int) -> None:
        wanted = self._watch.team.agree(self._watch.control.wanted())
        if wanted == "run":
            return
        if wanted == "pause" and step:
            self._save(step)
        raise Stopped(wanted, step)

    def _keep(self, step: int) -> None:
        """Saves now and then: not so often that it shows in the throughput."""
        wait = self._watch.checkpoint_s and max(self._watch.checkpoint_s, SAVE_SHARE * self._save_took)
        due = time.monotonic() - self._saved >= wait
        if step < self._steps and self._watch.checkpoints.kept and self._watch.team.agree(due):
            self._save(step)

    def _save(self, step: int) -> None:
        import torch

        began = time.monotonic()
        team = self._watch.team
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state(), **self._best.tensors()}
        for n, parameter in enumerate(self._parameters):
            tensors[f"weight.{n}"] = parameter
            for key, value in self._optimiser.state.get(parameter, {}).items():
                tensors[f"{key}.{n}"] = value
        tensors = team.gather(tensors)
        self.report.seconds = began - self._start
        state = {"report": asdict(self.report), "losses": self._losses[-64:], "best": self._best.state()}
        if team.leads:
            path = self._watch.checkpoints.save(step, tensors, state)
            dev_loss = self.report.curve[-1]["dev_loss"] if self.report.curve else None
            self._watch.progress(checkpoint=step, path=str(path), loss=self._losses[-1], dev_loss=dev_loss)
        self._saved = time.monotonic()
        self._save_took = self._saved - began

    def _resume(self) -> int:
        """Puts everything back as the newest checkpoint has it. Returns its step (0: from the start)."""
        found = self._watch.checkpoints.newest()
        if found is None:
            return 0
        import torch

        restore(self._optimiser, self._parameters, found)
        self._best.put_back(found)
        self.report = Report(**found.state["report"])
        self.report.resumed_from = found.step
        self._losses = list(found.state["losses"])
        self._start = time.monotonic() - self.report.seconds
        torch.set_rng_state(found.tensors["rng"])
        for _ in islice(self._feed, found.step * self._recipe.accumulate):
            pass  # the order of the rows goes on where it was
        return found.step


def restore(optimiser: AdamW, parameters: Sequence[Tensor], found: Checkpoint) -> None:
    """Copies weights and moments into place."""
    for n, parameter in enumerate(parameters):
        parameter.data.copy_(placed(found.tensors[f"weight.{n}"], parameter))
        moments = {key: found.tensors.get(f"{key}.{n}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments["step"] is not None:
            optimiser.state[parameter] = {
                key: value.to(parameter.device) if key == "step" else placed(value, parameter)
                for key, value in moments.items()
                if value is not None
            }


def _recent(losses: Sequence[float], window: int = 20) -> float:
    last = losses[-window:]
    return sum(last) / len(last) if last else math.nan


class _Best:
    """The best weights so far, and how long ago that was."""

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
        for parameter, kept in zip(self._parameters, self._kept, strict=False):
            parameter.data.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """The kept weights, for a checkpoint."""
        return {f"best.{n}": kept for n, kept in enumerate(self._kept)}

    def state(self) -> dict[str, Any]:
        """The rest, for a checkpoint."""
        return {"loss": self._loss if self._kept else None, "misses": self._misses, "step": self.step}

    def put_back(self, found: Checkpoint) -> None:
        """The state as a checkpoint has it."""
        state = found.state["best"]
        self._misses, self.step = state["misses"], state["step"]
        if state["loss"] is not None:
            self._loss = state["loss"]
            self._kept = [placed(found.tensors[f"best.{n}"], p) for n, p in enumerate(self._parameters)]
