"""Several runs that answer a question before the one that is published: which knobs, and would more data help.

Runs of a study keep no checkpoints; what is done is in the study's files, so a study that was killed goes on after its
last finished run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybrid.adapters.kinds import LORA
from hybrid.errors import BadRequest
from hybrid.rooms import write_json
from hybrid.training.checkpoints import Checkpoints
from hybrid.training.job import Fitted, Job, Method
from hybrid.training.methods import METHODS
from hybrid.training.mixture import assemble
from hybrid.training.recipes import Recipe

#: shares of the training rows whose dev loss draws the learning curve
SHARES = (0.1, 0.3, 1.0)
#: how many times the data the curve is continued to
AHEAD = (2, 4)


def tuned(job: Job, fit: Method, trials: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the lowest dev loss of `trials` runs, and what the card says of the search.

    Optuna's TPE (Bergstra et al. 2011) proposes, its median rule prunes runs that lag behind at a dev measurement. The
    first trial is the recipe as it stands. Raises BadRequest when no trial ended with a number.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=_storage(job.folder),
        study_name=job.name or "study",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=job.recipe.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    if not study.trials:
        study.enqueue_trial({key: getattr(job.recipe, key) for key in _space(job.recipe)})
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    while (ended := len(study.get_trials(states=done))) < trials:
        job.watch.progress(phase="tuning", trial=ended + 1, trials=trials)
        study.optimize(lambda trial: _trial(job, fit, trial), n_trials=1)
    found = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    if not found:
        raise BadRequest("No trial ended with a number; start from a lower learning_rate.", param="learning_rate")
    best = study.best_trial
    told = {"trials": trials, "pruned": trials - len(found), "best": best.params, "dev_loss": round(best.value, 5)}
    return job.recipe.model_copy(update=_update(best.params)), told


def _storage(folder: Path | None) -> Any:
    """A journal file beside the run's checkpoints: a study that is killed loses the trial it was in, no other."""
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(folder / "trials.log"))) if folder else InMemoryStorage()


def _space(recipe: Recipe) -> dict[str, Any]:
    """What is searched: the rate over a decade to each side, and for LoRA its rank and dropout."""
    import optuna

    rate, batch = recipe.learning_rate, recipe.batch_size
    space: dict[str, Any] = {
        "learning_rate": optuna.distributions.FloatDistribution(rate / 10, min(rate * 10, 0.5), log=True),
        "batch_size": optuna.distributions.CategoricalDistribution(sorted({max(1, batch // 2), batch, batch * 2})),
    }
    if METHODS[recipe.method].makes == LORA:
        space["rank"] = optuna.distributions.CategoricalDistribution(sorted({max(1, recipe.rank // 2), recipe.rank}))
        space["dropout"] = optuna.distributions.CategoricalDistribution(sorted({0.0, 0.05, recipe.dropout}))
    return space


def _update(params: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA's scale follows its rank, so that the rate means the same at every rank."""
    return {**params, **({"alpha": 2.0 * params["rank"]} if "rank" in params else {})}


def _trial(job: Job, fit: Method, trial: Any) -> float:
    import optuna

    space = _space(job.recipe)
    params = {key: _suggest(trial, key, kind) for key, kind in space.items()}

    def progress(**told: Any) -> None:
        job.watch.progress(**told)
        if "dev_loss" in told and "step" in told:
            trial.report(told["dev_loss"], told["step"])
            if trial.should_prune():
                raise optuna.TrialPruned

    watch = replace(job.watch, progress=progress, checkpoints=Checkpoints(None))
    try:
        fitted = fit(replace(job, recipe=job.recipe.model_copy(update=_update(params)), watch=watch))
    except BadRequest as error:  # such a rate diverges: the search should know, and go on
        raise optuna.TrialPruned from error
    return float(fitted.metrics["dev_loss"])


def _suggest(trial: Any, key: str, kind: Any) -> Any:
    if hasattr(kind, "choices"):
        return trial.suggest_categorical(key, kind.choices)
    return trial.suggest_float(key, kind.low, kind.high, log=kind.log)


def learning_curve(job: Job, fit: Method) -> list[dict[str, float]]:
    """`{"rows", "dev_loss", "dev_exact"}` of runs on 10 and 30 % of the training rows, stratified.

    The whole is the run that is published; `predicted` continues the curve.
    """
    kept = job.folder / "curve.json" if job.folder else None
    points: list[dict[str, float]] = json.loads(kept.read_bytes()) if kept and kept.is_file() else []
    for share in SHARES[len(points) : -1]:
        rows = max(2, round(len(job.data.train_items) * share))
        job.watch.progress(phase="curve", rows=rows)
        data = assemble([job.data], job.recipe.model_copy(update={"rows": rows}))
        watch = replace(job.watch, checkpoints=Checkpoints(None))
        points.append(curve_point(fit(replace(job, data=data, watch=watch)), rows))
        if kept:
            write_json(kept, points)
    return points


def curve_point(fitted: Fitted, rows: int) -> dict[str, float]:
    """One point of the curve."""
    return {"rows": rows, **{key: fitted.metrics[key] for key in ("dev_loss", "dev_exact") if key in fitted.metrics}}


def predicted(points: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What two and four times the data would bring: `{"rows", "dev_loss"}` of the power law through the points.

    loss(n) = a + b n^-c (Hestness et al. 2017, arXiv 1712.00409). With three points the law is exact; where they do not
    fall ever more slowly no law goes through them, and nothing is predicted.
    """
    (n1, n2, n3), (y1, y2, y3) = ([p[key] for p in points] for key in ("rows", "dev_loss"))
    if not y1 > y2 > y3:
        return []
    c = _exponent((n1, n2, n3), (y1 - y2) / (y2 - y3))
    if c is None:
        return []
    b = (y2 - y3) / (n2**-c - n3**-c)
    floor = y3 - b * n3**-c
    return [{"rows": n3 * times, "dev_loss": round(max(0.0, floor + b * (n3 * times) ** -c), 5)} for times in AHEAD]


def _exponent(rows: tuple[float, float, float], ratio: float) -> float | None:
    """The c at which a power law falls `ratio` times as much between the first two points as between the last two."""
    from scipy.optimize import brentq

    def off(c: float) -> float:
        first, second, third = (n**-c for n in rows)
        return math.log((first - second) / (second - third)) - math.log(ratio)

    low, high = 1e-3, 5.0
    return float(brentq(off, low, high)) if off(low) * off(high) < 0 else None
