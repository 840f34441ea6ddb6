"""What a suite needs before it can be asked: its corpora indexed and its adapters trained, one after the other.

What exists already is left alone: a corpus by its name, an adapter by the recipe, the rows and the base on its card. A
run that was stopped in the middle of an adapter goes on from that adapter's newest checkpoint.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.evaluation.suite import Subject, Suite, folder_of
from hybrid.evaluation.tasks import CORPUS, Task, read_task
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.child import run_beside
from hybrid.lifecycle.reuse import made
from hybrid.models import ModelFiles
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.training.batches import FEWEST
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.loop import DEV_GLANCE, GLANCE_TOKENS, plan
from hybrid.training.mixture import assemble
from hybrid.training.recipes import RECIPE_FILE, Recipe, load_recipe
from hybrid.training.supervised import FINAL_TOKENS

#: (step, done, total)
Told = Callable[[str, int, int], None]

#: what two cores train in a second, prompt and answer together: rows that begin alike, and long ones that do not, such
#: as those with passages; and how much faster a measurement is
TRAIN_TOKENS_PER_S, LONG_TOKENS_PER_S, DEV_SPEED = 1000.0, 600.0, 3.0
#: opening the model, writing the version, checking it; and fitting a head
_AROUND_S, _HEAD_S = 25.0, 60.0
_FRAME_TOKENS, _SAMPLED = 31, 200
#: the strategies that nothing has to be trained for
_UNTRAINED = frozenset(["base", "prompt", "few_shot", "rag"])


@dataclass(frozen=True, slots=True)
class Order:
    """One adapter of a suite: the task it learns from, what the suite says of its recipe, and that recipe in full."""

    name: str
    task: Task
    given: Mapping[str, Any]
    recipe: Recipe

    @property
    def is_head(self) -> bool:
        """Whether a linear head comes of it and no adapter of the engine's."""
        return self.recipe.method == "head"

    def data(self) -> Dataset:
        """The rows that it learns from. Raises DataError."""
        return assemble([read_dataset(self.task.folder)], self.recipe)

    def arguments(self) -> list[str]:
        """The words of the command that trains it."""
        sets = [word for key, value in self.given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        return ["train", str(self.task.folder), "--name", self.name, "--json", "--progress-json", *sets]


def orders(suite: Suite, settings: Settings) -> list[Order]:
    """The adapters that the arms of a suite need, their recipes checked. Raises DataError, BadRequest, Refused."""
    found: list[Order] = []
    if suite.arms and {arm.partition(":")[0] for arm in suite.arms} <= _UNTRAINED:
        return found
    for wanted in suite.adapters:
        task = read_task(folder_of(wanted.task, settings))
        name = check_name(wanted.name or task.name)
        recipe = load_recipe(settings.rooms.adapters / name / RECIPE_FILE, wanted.recipe)
        found.append(Order(name, task, wanted.recipe, recipe))
    return found


def missing_corpora(suite: Suite, found: Sequence[Subject], settings: Settings, library: Library) -> list[Task]:
    """The tasks whose corpus is still to be indexed, or was not indexed to its end."""
    brought = [subject.task for subject in found if suite.corpora and subject.task.has_corpus]
    return [t for t in brought if t.name not in library.names() or _mark(settings, t).is_file()]


def missing(found: Sequence[Order], store: AdapterStore, model: ModelFiles, embedder: Embedder) -> list[Order]:
    """The orders that no version in the store is the answer to."""
    return [order for order in found if not _made(order, store, model, embedder)]


def _made(order: Order, store: AdapterStore, model: ModelFiles, embedder: Embedder) -> bool:
    versions = made(store, order.name, order.recipe, order.data, model, embedder)
    return any(version.state != "rejected" for version in versions)


def prepare(
    suite: Suite,
    found: Sequence[Subject],
    *,
    settings: Settings,
    model: ModelFiles,
    store: AdapterStore,
    library: Library,
    tell: Told,
) -> list[str]:
    """Indexes and trains what a suite needs and the home has not; returns the names of the adapters it trained.

    Training happens in a process of its own. Raises HybridError with the trainer's last words when one fails.
    """
    for task in missing_corpora(suite, found, settings, library):
        _index(task, settings, library, tell)
    todo = missing(orders(suite, settings), store, model, library.embedder)
    for number, order in enumerate(todo, 1):
        title = f"training {order.name}, {order.recipe.method} ({number} of {len(todo)})"
        tell(title, 0, 1)
        run_beside(
            order.arguments(),
            settings=settings,
            log=settings.rooms.logs / f"suite-{order.name}.log",
            told=partial(tell, title),
            failed=f"{order.name} could not be trained for the suite",
        )
    return [order.name for order in todo]


def minutes(order: Order, count: Callable[[str], int], passages: int) -> float:
    """About how long an order takes on two idle cores, from the tokens of its rows. `count` counts a text's tokens, and
    `passages` stand before a question where the recipe does not say how many."""
    if order.is_head:
        return _HEAD_S / 60
    data, recipe = order.data(), order.recipe
    dice = random.Random(0)
    rows = dice.sample(data.train, min(_SAMPLED, len(data.train)))
    each = sum(count(row.question) + count(row.answer) + _FRAME_TOKENS for row in rows) / max(1, len(rows))
    speed = TRAIN_TOKENS_PER_S
    if recipe.method == "raft":
        each += (recipe.passages or passages) * _passage_tokens(order.task, count, dice)
        speed = LONG_TOKENS_PER_S
    each = min(each, recipe.max_length)
    steps, every = plan(len(data.train), recipe)
    trained = min(steps * recipe.batch_size * recipe.accumulate, len(data.train) * recipe.epochs)
    looked_at = steps // every * _looked_at(len(data.dev), each, GLANCE_TOKENS, DEV_GLANCE)
    looked_at += _looked_at(len(data.dev), each, FINAL_TOKENS)
    looked_at += _looked_at(len(data.train), each, GLANCE_TOKENS, DEV_GLANCE)
    return ((trained * each + looked_at / DEV_SPEED) / speed + _AROUND_S) / 60


def _looked_at(rows: int, each: float, tokens: int, most: int | None = None) -> float:
    """Tokens of a measurement of so many rows of `each` tokens, bounded as the trainer bounds it."""
    seen = min(rows, most or rows)
    return min(seen * each, max(tokens, min(seen, FEWEST) * each))


def _passage_tokens(task: Task, count: Callable[[str], int], dice: random.Random) -> float:
    if not task.has_corpus:
        return 0.0
    lines = (task.folder / CORPUS).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in dice.sample(lines, min(_SAMPLED, len(lines)))]
    return sum(map(count, texts)) / max(1, len(texts))


def _mark(settings: Settings, task: Task) -> Path:
    """A file that lies there while a corpus is indexed for a suite."""
    return settings.rooms.hidden / "suites" / f"{task.name}.indexing"


def _index(task: Task, settings: Settings, library: Library, tell: Told) -> None:
    mark = _mark(settings, task)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    library.ingest(task.name, task.folder, lambda _step, done, total: tell(f"indexing {task.name}", done, total))
    mark.unlink()
