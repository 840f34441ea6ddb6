"""Learning answers from examples, whatever part of the model learns: the run, and the numbers it ends with."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.training.base import forward_of
from hybrid.training.batches import Encoded
from hybrid.training.job import Fitted, Job
from hybrid.training.loop import Group, Report, optimise
from hybrid.training.objective import Forward, NextToken, Objective, measure


@dataclass(frozen=True, slots=True)
class Learner:
    """A model of which some parameters learn, and how what they learned is saved."""

    model: Any
    groups: Sequence[Group]
    save: Callable[[Path], dict[str, Any]]
    kind: str = "lora"
    serve_with: str = ""


def fit_answers(
    job: Job,
    learner: Learner,
    train: Sequence[Encoded],
    dev: Sequence[Encoded],
    *,
    forward: Forward | None = None,
    objective: Objective | None = None,
) -> Fitted:
    """Trains on the answers of `train` and measures on all of `dev`.

    `forward` defaults to the model's own over packs, `objective` to the cross-entropy of the answers.
    """
    forward = forward or forward_of(learner.model)
    report = optimise(objective or NextToken(forward), learner.groups, train, dev, job.recipe, job.watch)
    learner.model.eval()
    final = measure(forward, dev)
    metrics = {
        "dev_loss": round(final.loss, 5),
        "dev_token_accuracy": round(final.token_accuracy, 4),
        "dev_exact": round(final.exact, 4),
        "dev_rows": len(dev),
        **run_metrics(report, learner.groups, len(train)),
    }
    return Fitted(metrics, report.curve, learner.save, learner.kind, learner.serve_with)


def run_metrics(report: Report, groups: Sequence[Group], rows: int) -> dict[str, Any]:
    """What the card says of any run of the loop."""
    return {
        "train_loss": round(report.train_loss, 5),
        "train_rows": rows,
        "trained_parameters": sum(parameter.numel() for group in groups for parameter in group.parameters),
        "tokens": report.tokens,
        "seconds": round(report.seconds, 1),
        "tokens_per_s": round(report.tokens / report.seconds, 1),
        "steps": report.steps,
        "best_step": report.best_step,
        "stopped_early": report.stopped_early,
        "resumed_from": report.resumed_from,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
