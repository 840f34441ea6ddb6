"""What advice trains and indexes in a process of its own: a head, a short LoRA with its learning curve, a corpus.

The versions carry a name of their own and never take it as an alias, so nobody is served by them who does not name
them. What is there already, from the same data by the same recipe, is used again.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid.adapters.kinds import HEAD, check_other
from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.preflight import read_base
from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.reuse import made
from hybrid.models import ModelFiles, materialise
from hybrid.rooms import Home, write_json
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.control import Stopped, Wanted
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.loop import Progress, plan
from hybrid.training.recipes import Recipe, load_recipe
from hybrid.training.run import train
from hybrid.training.study import SHARES

#: steps that are timed, after the first, which is slower
TIMED = 3
#: of the time budget; the rest goes to loading and to measuring on dev
FOR_STEPS = 0.7
FEWEST_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scratch:
    """What to make: of which task folder, under which name, in how many minutes. `corpus` names one to be indexed."""

    folder: str
    name: str
    minutes: float
    overrides: Mapping[str, Any] = field(default_factory=dict)
    corpus: str = ""
    closed: bool = False

    def write(self, path: Path) -> None:
        """As the process that does it reads it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Scratch:
        """What `write` wrote."""
        return cls(**json.loads(path.read_bytes()))


def scratch_name(task: str) -> str:
    """The name of a task's scratch versions."""
    return "advise-" + re.sub(r"[^A-Za-z0-9_-]+", "-", task)[:48].strip("-")


def folder_of(home: Home, name: str) -> Path:
    """Where the plan, the answers and the log of a piece of advice are kept."""
    return home.hidden / "advise" / name


def prepare(settings: Settings, scratch: Scratch, progress: Progress) -> None:
    """Makes what is missing. Raises what training and indexing raise."""
    model = materialise(settings.model, settings.cache)
    embedding = materialise(settings.embedder, settings.cache)
    bench = _Bench(settings, scratch, model, Embedder(embedding.path, embedding.name), progress)
    if scratch.corpus:
        progress(phase="indexing")
        Library(settings.rooms, bench.embedder, settings.retrieval).ingest(scratch.corpus, Path(scratch.folder))
    if scratch.closed:
        with contextlib.suppress(BadRequest):  # too many answers for labels after all: there is no head to measure
            bench.head()
    bench.lora()


@dataclass(frozen=True, slots=True)
class Shop:
    """Where a task's scratch versions are kept, and what they stand on."""

    store: AdapterStore
    name: str
    model: ModelFiles
    embedder: Embedder

    def find(self, recipe: Recipe, data: Dataset) -> AdapterVersion | None:
        """The newest version that this recipe made of these rows, the dev rows among them: its curve is theirs."""
        versions = made(self.store, self.name, recipe, lambda: data, self.model, self.embedder)
        return next((v for v in versions if v.card.get("metrics", {}).get("dev_sha256") == data.dev_sha256), None)


def lora_recipe(home: Home, scratch: Scratch) -> Recipe:
    """The recipe of the short fine-tune, its steps as they were planned (0: not yet)."""
    kept = folder_of(home, scratch.name) / "steps.json"
    recipe = load_recipe(None, scratch.overrides)
    if recipe.max_steps or not kept.is_file():
        return recipe
    planned = json.loads(kept.read_bytes())
    return recipe.model_copy(update={"max_steps": planned.get(_key(scratch, recipe), 0)})


def head_recipe() -> Recipe:
    """The recipe of the head."""
    return load_recipe(None, {"method": HEAD})


def _key(scratch: Scratch, recipe: Recipe) -> str:
    return json.dumps([scratch.minutes, recipe.model_dump(mode="json")], sort_keys=True)


def steps_within(rows: int, recipe: Recipe, step_s: float, budget_s: float) -> int:
    """The most steps a run may take so that it and the learning curve's smaller runs fit in `budget_s` seconds."""
    runs = [plan(max(2, round(rows * share)), recipe)[0] for share in SHARES]
    fitting = (n for n in range(max(runs), 0, -1) if sum(min(run, n) for run in runs) * step_s <= budget_s)
    return max(min(FEWEST_STEPS, max(runs)), next(fitting, 1))


class _Bench:
    """The models and the data of one scratch."""

    def __init__(
        self, settings: Settings, scratch: Scratch, model: ModelFiles, embedder: Embedder, progress: Progress
    ) -> None:
        self.embedder = embedder
        self._settings, self._scratch, self._model, self._progress = settings, scratch, model, progress
        self._store = AdapterStore(settings.rooms, State(settings.rooms.database), model.sha256)
        self._shop = Shop(self._store, scratch.name, model, embedder)
        self._data = read_dataset(Path(scratch.folder))

    def head(self) -> None:
        """Fits the head, and takes it through its checks: no engine loads it."""
        if self._shop.find(head_recipe(), self._data):
            return
        self._train({"method": HEAD}, self._progress)
        version = self._store.versions(self._scratch.name)[-1]
        check_other(version.ref.path, version.card, read_base(self._model.path, self._model.sha256))
        self._store.mark(version.id, "candidate", version.serve_with)

    def lora(self) -> None:
        """Trains as many steps as the budget allows, and the points of the learning curve."""
        recipe = lora_recipe(self._settings.rooms, self._scratch)
        if not recipe.max_steps:
            recipe = self._planned(recipe)
        if self._shop.find(recipe, self._data):
            return
        self._train({**self._scratch.overrides, "max_steps": recipe.max_steps}, self._progress, growth=True)

    def _planned(self, recipe: Recipe) -> Recipe:
        """The recipe with the steps that fit, timed on a few; kept, so that a second call plans alike."""
        rows = len(self._data.train)
        steps, _ = plan(rows, recipe)
        if steps > FEWEST_STEPS:
            stopwatch = _Stopwatch(self._progress)
            with contextlib.suppress(Stopped):
                self._train({**self._scratch.overrides, "early_stop": False}, stopwatch, stopwatch)
            steps = steps_within(rows, recipe, stopwatch.step_s, self._scratch.minutes * 60 * FOR_STEPS)
        kept = folder_of(self._settings.rooms, self._scratch.name) / "steps.json"
        known = json.loads(kept.read_bytes()) if kept.is_file() else {}
        write_json(kept, {**known, _key(self._scratch, recipe): steps})
        return recipe.model_copy(update={"max_steps": steps})

    def _train(
        self, overrides: Mapping[str, Any], progress: Progress, control: _Stopwatch | None = None, growth: bool = False
    ) -> None:
        more: dict[str, Any] = {"control": control, "fresh": True} if control else {}
        train(
            Path(self._scratch.folder),
            settings=self._settings,
            name=self._scratch.name,
            overrides=overrides,
            progress=progress,
            store=self._store,
            embedder=self.embedder,
            model=self._model,
            growth=growth,
            facts={"promote": False},
            **more,
        )


class _Stopwatch:
    """Lets a run take a few steps and stops it: a `Control` and a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._times: list[float] = []

    def wanted(self) -> Wanted:
        """As `Control`."""
        return "cancel" if len(self._times) > TIMED else "run"

    def __call__(self, **told: Any) -> None:
        if "step" in told:
            self._times.append(time.monotonic())
        elif "phase" in told:
            self._progress(phase="timing")

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return (self._times[-1] - self._times[0]) / (len(self._times) - 1)
