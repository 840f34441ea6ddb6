"""Data in, a published version out: read, train, save, enrol. The entry that every door to training calls."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.models import ModelFiles
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.training.cards import adapter_card, hub_card
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.job import Job
from hybrid.training.loop import Progress
from hybrid.training.methods import find_method
from hybrid.training.recipes import RECIPE_FILE, load_recipe

log = logging.getLogger("hybrid.training")
#: examples that go with an adapter, for few-shot prompts and for the gate
SHELF_LIMIT = 5000


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What was published: `adapter@version` in the folder `path`."""

    adapter: str
    version: int
    path: Path
    metrics: Mapping[str, Any]


def train(
    source: Path,
    *,
    settings: Settings,
    name: str | None,
    overrides: Mapping[str, Any],
    progress: Progress,
    store: AdapterStore,
    embedder: Embedder,
    model: ModelFiles,
) -> TrainResult:
    """Trains on a task folder or data file and publishes the next version of `name` (default: the data's own name).

    The recipe is `adapters/<name>/recipe.toml` changed by `overrides`. Nothing is published unless all of it worked.
    Raises DataError, BadRequest (recipe), Refused (name), SetupError.
    """
    adapter = check_name(name) if name else None
    data = read_dataset(source)
    adapter = adapter or check_name(re.sub(r"[^A-Za-z0-9._-]+", "-", data.name))
    recipe = load_recipe(settings.rooms.adapters / adapter / RECIPE_FILE, overrides)
    _tell(data)
    job = Job(data, recipe, model, progress)
    fitted = find_method(recipe.method)(job)

    def fill(folder: Path) -> dict[str, Any]:
        card = adapter_card(job, fitted, fitted.save(folder))
        _shelf(adapter, data, embedder).write(folder)
        (folder / "README.md").write_text(hub_card(adapter, card), encoding="utf-8")
        return card

    version = store.publish(adapter, fill)
    return TrainResult(version.name, version.version, version.ref.path, version.card["metrics"])


def _tell(data: Dataset) -> None:
    """Says what was left out: nothing is dropped in silence."""
    counts = data.counts
    for complaint in counts.complaints:
        log.warning("left out: %s", complaint)
    if counts.duplicates or counts.leaked:
        log.warning(
            "left out: %d duplicate rows, %d training rows that stand in the dev or test split too.",
            counts.duplicates, counts.leaked,
        )  # fmt: skip


def _shelf(name: str, data: Dataset, embedder: Embedder) -> Shelf:
    examples = data.train[:SHELF_LIMIT]
    messages = tuple(example.question for example in examples)
    bare = tuple(example.bare for example in examples)
    vectors = embedder.embed(messages)
    return Shelf(
        name=name,
        messages=messages,
        answers=tuple(example.answer for example in examples),
        vectors=vectors,
        bare=vectors if bare == messages else embedder.embed(bare),
        embedder=embedder.digest,
    )
