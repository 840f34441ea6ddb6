"""How a job is ordered: checked, its data put aside, one row written, one id put in the line. Every door calls this."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, Forbidden, NotFound
from hybrid.lifecycle.queue import Queue
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.files import Files, rows_suffix
from hybrid.training.jobs import JobBook, new_id
from hybrid.training.methods import find_method
from hybrid.training.reader import ROWS
from hybrid.training.recipes import RECIPE_FILE, Recipe, load_recipe
from hybrid.types import JSON

_SHORT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked for. The data are uploaded files, or for the owner of the home a `source` on its disk.

    `asked` is the request as it came: it is shown again, and tells whether two requests with one key are the same.
    """

    model: str = "base"
    training_file: str = ""
    validation_file: str | None = None
    source: Path | None = None
    name: str | None = None
    suffix: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    method: Mapping[str, Any] | None = None
    promote: bool = True
    quickstart: bool = False
    asked: Mapping[str, Any] = field(default_factory=dict)


class Orders:
    """Takes orders for one home."""

    def __init__(self, settings: Settings, *, state: State, store: AdapterStore) -> None:
        self._settings = settings
        self._home = settings.rooms
        self._store = store
        self._files = Files(self._home, state)
        self._book = JobBook(state)
        self._queue = Queue(self._home.queue)

    def submit(self, order: Order, *, caller: str, admin: bool, key: str | None = None) -> JSON:
        """A new job's row; with an idempotency `key` seen before, the row of the job that was made then.

        Raises BadRequest (a recipe key, a method), NotFound (a file), Refused (a name), Forbidden (another's
        adapter), Conflict (the key was used for another request).
        """
        book, job_id = self._book.of(caller), new_id()
        spec = self._spec(order, job_id, book, admin)
        folder = self._home.jobs / job_id
        try:
            spec["source"] = str(order.source.resolve()) if order.source else self._put_aside(order, folder, caller)
            job, is_new = book.create(spec, id=job_id, key=key)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if is_new:
            self._queue.put(job_id)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return job

    def resume(self, job_id: str, *, caller: str | None = None) -> JSON:
        """Lets a paused job wait for its turn again. Raises NotFound, Conflict."""
        job = (self._book.of(caller) if caller else self._book).want(job_id, "run")
        self._queue.put(job_id)
        return job

    def _spec(self, order: Order, job_id: str, book: JobBook, admin: bool) -> JSON:
        short = job_id.removeprefix("ftjob-")[:_SHORT]
        name = self._name(order, short, book, admin)
        overrides = dict(order.overrides)
        if order.seed is not None:
            overrides["seed"] = order.seed
        elif order.source is None:  # as OpenAI: no seed means any
            overrides.setdefault("seed", random.SystemRandom().randrange(2**31))
        recipe = load_recipe(self._home.adapters / name / RECIPE_FILE, overrides)
        find_method(recipe.method)
        return {
            "name": name,
            "model": order.model,
            "training_file": order.training_file or (order.source.name if order.source else ""),
            "validation_file": order.validation_file,
            "suffix": order.suffix,
            "seed": recipe.seed,
            "overrides": overrides,
            "hyperparameters": _hyperparameters(recipe),
            "method": order.method,
            "metadata": dict(order.metadata) if order.metadata is not None else None,
            "promote": order.promote,
            "quickstart": order.quickstart,
            "fine_tuned_model": f"ft:{self._base}:hybrid:{_word(order.suffix or '')}:{short}",
            "asked": dict(order.asked),
        }

    @property
    def _base(self) -> str:
        return _word(Path(self._settings.model).name)

    def _name(self, order: Order, short: str, book: JobBook, admin: bool) -> str:
        """The adapter that gets a new version. One that others made takes a key that may change what is served."""
        name = check_name(order.name or _word(order.suffix or "") or f"ft-{short}")
        if not admin and name in self._store.names():
            mine, _ = book.list(limit=1000)
            if name not in {job["spec"]["name"] for job in mine}:
                raise Forbidden(f"The adapter {name!r} exists; a new version of it needs a key with the scope `admin`.")
        return name

    def _put_aside(self, order: Order, folder: Path, caller: str) -> str:
        """Links the files into the job's own folder, where deleting them does not reach. Returns it, from the home."""
        data = folder / "data"
        data.mkdir(parents=True)
        suffix = rows_suffix(self._tunable("training_file", order.training_file, caller)["filename"])
        os.link(self._files.path(order.training_file, caller), data / f"train{suffix}")
        if order.validation_file is not None:
            self._tunable("validation_file", order.validation_file, caller)
            if suffix != ROWS[0]:
                raise BadRequest("A document brings its own dev split; leave this out.", param="validation_file")
            os.link(self._files.path(order.validation_file, caller), data / "dev.jsonl")
        return str(data.relative_to(self._home.root))

    def _tunable(self, param: str, file_id: str, caller: str) -> JSON:
        """The row of a file that was uploaded to train on. Raises NotFound, BadRequest."""
        try:
            row = self._files.get(file_id, caller)
        except NotFound as error:
            error.param = param
            raise
        if row["purpose"] != "fine-tune":
            raise BadRequest(f"{file_id} was uploaded for {row['purpose']!r}; training takes 'fine-tune'.", param=param)
        return row


def _hyperparameters(recipe: Recipe) -> JSON:
    """As OpenAI counts them: whole epochs, and the learning rate as a multiple of the default."""
    usual = float(Recipe.model_fields["learning_rate"].default)
    return {
        "n_epochs": max(1, round(recipe.epochs)),
        "batch_size": recipe.batch_size,
        "learning_rate_multiplier": round(recipe.learning_rate / usual, 6),
    }


def _word(text: str) -> str:
    """`text` with what cannot stand in a name replaced."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
