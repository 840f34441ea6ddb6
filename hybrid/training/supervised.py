"""Learning answers from examples, whatever part of the model learns: the run, and the numbers it ends with."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.training.base import forward_of
from hybrid.training.batches import Encoded, Pack, first, packs
from hybrid.training.elsewhere import measured_elsewhere
from hybrid.training.job import Fitted, Job
from hybrid.training.loop import Group, Report, glance, optimise
from hybrid.training.objective import Forward, Measured, NextToken, Objective, measure

#: how rows become forward passes
Cut = Callable[[Sequence[Encoded]], Iterable[Pack]]
#: tokens of the dev rows whose loss ends a run: all rows of most tasks, some of those with passages
FINAL_TOKENS = 40_000


@dataclass(frozen=True, slots=True)
class Learner:
    """A model of which some parameters learn, and how what they learned is saved.

    `finish` makes of it, after training, what is measured and saved: another precision, another base, another kind.
    `cut` lays out a process's share of a batch, where that is another way than all rows'.
    """

    model: Any
    groups: Sequence[Group]
    save: Callable[[Path], dict[str, Any]]
    kind: str = "lora"
    serve_with: str = ""
    finish: Callable[[], Learner] | None = None
    cut: Cut | None = None


def fit_answers(
    job: Job,
    learner: Learner,
    train: Sequence[Encoded],
    dev: Sequence[Encoded],
    *,
    forward: Forward | None = None,
    objective: Objective | None = None,
    cut: Cut = packs,
) -> Fitted:
    """Trains on the answers of `train` and measures on `dev`, as far as `FINAL_TOKENS` go.

    `gap` is what the loss of the first training rows is below that: what was learned and does not carry over.

    `forward` defaults to the model's own over packs, `objective` to the cross-entropy of the answers, as `cut` lays
    them out. What is measured is what is saved.
    """
    answers = forward or forward_of(learner.model)

    def look(rows: Sequence[Encoded]) -> Measured:
        return measure(answers, rows, cut)

    elsewhere = measured_elsewhere(job, learner.model, look)
    report = optimise(
        objective or NextToken(answers, learner.cut or cut), learner.groups, train, dev, job.recipe, job.watch
    )
    found = run_metrics(report, learner.groups, len(train))
    if learner.finish:
        learner = learner.finish()
        answers = forward_of(learner.model)
    learner.model.eval()
    dev = first(dev, FINAL_TOKENS)
    final = look(dev)
    metrics = {
        "dev_loss": round(final.loss, 5),
        "dev_token_accuracy": round(final.token_accuracy, 4),
        "dev_exact": round(final.exact, 4),
        "dev_rows": len(dev),
        "gap": round(final.loss - look(glance(train)).loss, 5),
        **found,
        **elsewhere(),
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
