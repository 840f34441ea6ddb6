"""Data in, a published version out: read, train, save, enrol. The entry that every door to training calls."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.models import ModelFiles
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.training.cards import artefact_card, hub_card
from hybrid.training.checkpoints import Checkpoints
from hybrid.training.control import RUN, Control
from hybrid.training.data import DEV_LIMIT, Dataset, read_dataset
from hybrid.training.job import Fitted, Job, Method
from hybrid.training.loop import Progress, Watch
from hybrid.training.methods import find_method
from hybrid.training.mixture import assemble
from hybrid.training.plots import draw_curve, draw_growth
from hybrid.training.recipes import RECIPE_FILE, load_recipe
from hybrid.training.study import curve_point, learning_curve, predicted, tuned
from hybrid.training.team import join_team
from hybrid.training.tensorboard import told_to_tensorboard
from hybrid.training.workspace import workspace

log = logging.getLogger("hybrid.training")
#: examples that go with an adapter, for few-shot prompts and for the gate
SHELF_LIMIT = 5000
#: rows named one by one when they are left out
TOLD = 20


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What was published: `adapter@version` in the folder `path`."""

    adapter: str
    version: int
    path: Path
    metrics: Mapping[str, Any]


def train(
    source: Path | Sequence[Path],
    *,
    settings: Settings,
    name: str | None,
    overrides: Mapping[str, Any],
    progress: Progress,
    store: AdapterStore,
    embedder: Embedder,
    model: ModelFiles,
    control: Control = RUN,
    fresh: bool = False,
    tune: int = 0,
    growth: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> TrainResult | None:
    """Trains on a task folder or data file and publishes the next version of `name` (default: the data's own name).

    Several sources are one mixture of tasks, named after them all.

    The recipe is `adapters/<name>/recipe.toml` changed by `overrides`. Nothing is published unless all of it worked.
    A run that was killed or paused goes on from its newest checkpoint when called again alike, unless `fresh`.
    With `tune` as many trials look for a better recipe first; with `growth` runs on 10 and 30 % of the rows tell what
    more data would bring. `facts` are added to the card. In a team of processes only the first publishes; the others
    return None.

    Raises DataError, BadRequest (recipe), Refused (name), Conflict (the same run elsewhere), Stopped, SetupError.
    """
    progress(phase="validating")
    adapter = check_name(name) if name else None
    sources = [source] if isinstance(source, Path) else list(source)
    found = [read_dataset(folder) for folder in sources]
    adapter = adapter or check_name(re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(data.name for data in found)))
    recipe = load_recipe(settings.rooms.adapters / adapter / RECIPE_FILE, overrides)
    parent = store.resolve(recipe.init_from) if recipe.init_from else None
    if parent:  # the alias may move before the run ends
        recipe = recipe.model_copy(update={"init_from": parent.id})
    method = find_method(recipe.method)
    data = assemble(found, recipe)
    _tell(data)
    team = join_team()
    with workspace(settings.rooms, adapter, data, recipe, model, team=team, fresh=fresh) as folder:
        with told_to_tensorboard(progress, settings.rooms.hidden / "tensorboard" / folder.name) as told:
            progress(phase="loading")
            speak, every = told if team.leads else _silence, settings.training.checkpoint_s
            watch = Watch(speak, control, Checkpoints(folder / "checkpoints"), team, every)
            start = parent.ref.path if parent else None
            job = Job(data, recipe, model, watch, embedder, settings, adapter, sources, folder, start)
            job, found_out = _study(job, method, tune, growth)
            fitted = method(job)
        if not team.leads:
            return None
        progress(phase="publishing")
        return _publish(adapter, job, fitted, store, {**found_out, **(facts or {})})


def _study(job: Job, method: Method, tune: int, growth: bool) -> tuple[Job, dict[str, Any]]:
    """The job with the recipe that its trials found, and what the card says of the runs before the one published."""
    told: dict[str, Any] = {}
    if tune:
        recipe, told["tuned"] = tuned(job, method, tune)
        job = replace(job, recipe=recipe)
    if growth:
        told["growth"] = {"points": learning_curve(job, method)}
    return job, told


def _publish(adapter: str, job: Job, fitted: Fitted, store: AdapterStore, facts: Mapping[str, Any]) -> TrainResult:
    def fill(folder: Path) -> dict[str, Any]:
        card = {**artefact_card(job, fitted, fitted.save(folder)), **facts}
        if "growth" in card:
            card["growth"] = _grown(card["growth"]["points"], fitted, job, folder / "growth.png")
        if job.data.train:  # plain texts ask nothing
            _shelf(adapter, job.data, job.embedder).write(folder)
            _write_dev(job.data, folder / "dev.jsonl")
        if fitted.curve:
            draw_curve(fitted.curve, fitted.metrics["best_step"], folder / "curve.png")
        (folder / "README.md").write_text(hub_card(adapter, card), encoding="utf-8")
        return card

    version = store.publish(adapter, fill)
    return TrainResult(version.name, version.version, version.ref.path, version.card["metrics"])


def _grown(points: list[dict[str, float]], fitted: Fitted, job: Job, picture: Path) -> dict[str, Any]:
    """The learning curve with its last point, the run that is published, and where it leads."""
    points = [*points, curve_point(fitted, len(job.data.train_items))]
    ahead = predicted(points)
    draw_growth(points, ahead, picture)
    return {"points": points, "predicted": ahead}


def _silence(**_told: Any) -> None:
    """Another process of the team speaks."""


def _tell(data: Dataset) -> None:
    """Says what was left out: nothing is dropped in silence."""
    counts = data.counts
    lines = (*counts.complaints, *counts.removed)
    for line in lines[:TOLD]:
        log.warning("left out: %s", line)
    if len(lines) > TOLD:
        log.warning("left out: %d more rows; `hybrid data check` names them all.", len(lines) - TOLD)
    if counts.duplicates:
        log.warning("left out: %d rows that repeat another.", counts.duplicates)


def _write_dev(data: Dataset, path: Path) -> None:
    """The dev rows go with the artefact, so that it can be measured wherever it is."""
    with path.open("w", encoding="utf-8") as file:
        for example in data.dev[:DEV_LIMIT]:
            row = {"id": example.id, "input": example.bare, "reference": example.answer, "meta": dict(example.meta)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _shelf(name: str, data: Dataset, embedder: Embedder) -> Shelf:
    examples = data.train[:SHELF_LIMIT]
    messages = tuple(example.question for example in examples)
    bare = tuple(example.bare for example in examples)
    vectors = embedder.embed_queries(messages)
    return Shelf(
        name=name,
        messages=messages,
        answers=tuple(example.answer for example in examples),
        vectors=vectors,
        bare=vectors if bare == messages else embedder.embed_queries(bare),
        embedder=embedder.query_digest,
    )
