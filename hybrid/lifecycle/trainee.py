"""What a job's own process does: look at the data, or train on them, and write down how far it is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.errors import DataError, HybridError
from hybrid.knowledge.embed import Embedder
from hybrid.models import materialise
from hybrid.settings import Settings, offline_environment, share_cores
from hybrid.state import State
from hybrid.training.control import Stopped, Wanted
from hybrid.training.data import read_dataset
from hybrid.training.jobs import JobBook
from hybrid.training.run import train
from hybrid.types import JSON

#: how often a row is written, and read
_WRITE_S, _READ_S = 1.0, 0.5
_PROGRESS = ("step", "steps", "loss", "dev_loss", "tokens_per_s", "eta_s")


def check_job(settings: Settings, job_id: str) -> None:
    """Reads a job's files and says whether they can be trained on: `queued`, or `failed` with the reason.

    Raises NotFound.
    """
    book = JobBook(State(settings.rooms.database))
    job = book.get(job_id)
    with _failing(book, job_id):
        read_dataset(source_of(settings, job))
        book.validated(job_id)


def run_job(settings: Settings, job_id: str) -> None:
    """Trains a queued job to what it publishes; the server that serves it writes `succeeded`. Raises NotFound."""
    book = JobBook(State(settings.rooms.database))
    if not book.claim(job_id, os.getpid()):
        return
    offline_environment()
    share_cores()
    diary = Diary(book, job_id)
    try:
        with _failing(book, job_id), diary:
            result = _train(settings, book.get(job_id), diary)
            diary.close(result)
            book.published(job_id, result)
    except Stopped:
        book.stopped(job_id)


def source_of(settings: Settings, job: JSON) -> Path:
    """Where a job's data are: below the home, or where the owner of the home pointed."""
    return settings.rooms.root / str(job["spec"]["source"])


def _train(settings: Settings, job: JSON, diary: Diary) -> JSON:
    spec = job["spec"]
    model = materialise(settings.model, settings.cache)
    store = AdapterStore(settings.rooms, State(settings.rooms.database), model.sha256)
    version = made_by(store, job["id"])
    if version is None:
        embedding = materialise(settings.embedder, settings.cache)
        done = train(
            source_of(settings, job),
            settings=settings,
            name=spec["name"],
            overrides=spec["overrides"],
            progress=diary.told,
            store=store,
            embedder=Embedder(embedding.path, embedding.name),
            model=model,
            control=diary,
            facts={"job": job["id"], "fine_tuned_model": spec["fine_tuned_model"], "promote": spec["promote"]},
        )
        assert done is not None  # noqa: S101  only members of a team that do not lead get nothing
        version = store.resolve(f"{done.adapter}@{done.version}")
    metrics = dict(version.card.get("metrics", {}))
    return {
        "adapter": version.name,
        "version": version.version,
        "kind": version.card.get("kind", "lora"),
        "metrics": metrics,
        "trained_tokens": metrics.get("tokens"),
    }


def made_by(store: AdapterStore, job_id: str) -> AdapterVersion | None:
    """What a job has published: training it again after a crash would publish it twice."""
    return next((version for version in store.versions() if version.card.get("job") == job_id), None)


@contextlib.contextmanager
def _failing(book: JobBook, job_id: str) -> Iterator[None]:
    """Turns what cannot be mended by trying again into the job's end. What nobody foresaw passes."""
    try:
        yield
    except Stopped:
        raise
    except DataError as error:
        book.fail(job_id, error.message, code="invalid_training_file", param="training_file")
    except HybridError as error:
        book.fail(job_id, error.message, code=error.code, param=error.param)
    except OSError as error:
        book.fail(job_id, f"{error}. Look at the disk that holds the home, then submit it again.", code="disk_error")


class Diary:
    """Writes what the trainer tells into the job's row, about once a second, and reads there what is wanted."""

    def __init__(self, book: JobBook, job_id: str) -> None:
        self._book = book
        self._id = job_id
        self._steps: list[JSON] = []
        self._newest: Mapping[str, Any] = {}
        self._written = self._read = float("-inf")
        self._wanted: Wanted = "run"

    def __enter__(self) -> Diary:
        return self

    def __exit__(self, *_error: object) -> None:
        self._write()

    def wanted(self) -> Wanted:
        """As `Control`: what the row says, read at most twice a second."""
        now = time.monotonic()
        if now - self._read >= _READ_S:
            self._read = now
            self._wanted = self._book.wanted(self._id)
        return self._wanted

    def told(self, **told: Any) -> None:
        """As `Progress`."""
        if "checkpoint" in told:
            self._write()
            metrics = {"step": told["checkpoint"], "train_loss": told.get("loss"), "valid_loss": told.get("dev_loss")}
            self._book.add_checkpoint(self._id, told["checkpoint"], told["path"], metrics)
        elif "step" in told:
            self._steps.append(_metrics(told))
            self._newest = {"phase": "training"} | {key: told[key] for key in _PROGRESS if key in told}
            if time.monotonic() - self._written >= _WRITE_S:
                self._write()
        elif "phase" in told:
            self._newest = {**self._newest, "phase": told["phase"]}
            self._write()

    def close(self, result: JSON) -> None:
        """The last checkpoint of a job is what it published."""
        self._write()
        measured = result["metrics"]
        last = {"step": measured.get("steps", 0), "valid_loss": measured.get("dev_loss")}
        self._book.add_checkpoint(self._id, int(last["step"]), f"{result['adapter']}@{result['version']}", last)

    def _write(self) -> None:
        self._written = time.monotonic()
        steps, self._steps = self._steps, []
        if steps:
            self._book.add_metrics(self._id, steps)
        if self._newest:
            self._book.progress(self._id, **self._newest)


def _metrics(told: Mapping[str, Any]) -> JSON:
    found = {"step": told["step"], "total_steps": told.get("steps"), "train_loss": told["loss"]}
    return found | ({"valid_loss": told["dev_loss"]} if told.get("dev_loss") is not None else {})
