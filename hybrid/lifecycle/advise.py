"""Advice for a task folder: trains what is short, asks what is cheap, and hands the numbers to the advisor.

Everything that takes time is kept under `.hybrid/advise/`: a run that was cut short goes on, and one that is repeated
asks only what has changed. The test split is not read for any of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.adapters.kinds import HEAD
from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.boot import token_counter
from hybrid.evaluation.advice import Advice, Ahead, Measurements, Trained, markdown
from hybrid.evaluation.advisor import advise as advised
from hybrid.evaluation.asking import Asker, Offer
from hybrid.evaluation.inventory import home_offer
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.runner import Job, Ledger, jobs_for, run, sample, token_limit
from hybrid.evaluation.tasks import Learnable, Task, read_split, read_task
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.asker import open_asker
from hybrid.lifecycle.child import NICE, run_beside
from hybrid.lifecycle.scratch import Scratch, Shop, folder_of, head_recipe, lora_recipe, scratch_name
from hybrid.models import ModelFiles, materialise
from hybrid.rooms import check_name, write_json
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.mixture import assemble
from hybrid.training.study import predicted
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

#: dev examples asked of each arm
LIMIT = 100
#: questions open at once: enough to fill a small batch, few enough for a latency that means something
INFLIGHT = 8
#: standard deviation of a dev loss between two seeds, as a share of it
LOSS_NOISE = 0.01
DRAWS = 200
APPEAR_S = 120.0

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a person asked advice on. `corpus` names documents of the home beside the task's own `corpus.jsonl`."""

    folder: Path
    minutes: float = 10.0
    limit: int = LIMIT
    corpus: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)


async def advise(settings: Settings, wish: Wish, out: Path, told: Told) -> Advice:
    """Measures on the dev split, writes `advice.json` and `advice.md` into `out`, and returns the advice.

    Raises DataError (the task), SetupError (what trains ended badly), NotReady (no engine), BadRequest (a recipe key).
    """
    offline_environment()
    subject = await asyncio.to_thread(_subject, settings, wish)
    model = await asyncio.to_thread(materialise, settings.model, settings.cache)
    bench = await asyncio.to_thread(_artefacts, settings, subject, model)
    if bench.lora is None or (subject.scratch.closed and bench.head is None) or subject.scratch.corpus:
        await _prepare(settings, subject, told)
        bench = await asyncio.to_thread(_artefacts, settings, subject, model)
    asked = _Questions(settings, model, subject, bench)
    lent = {subject.task.name: subject.task.folder}
    async with open_asker(settings, model, lent=lent, kept=asked.kept, told=told) as asker:
        outcomes, notes = await asked.ask(asker, told)
    advice = await asyncio.to_thread(advised, _measurements(subject, bench, outcomes, notes))
    await asyncio.to_thread(_write, out, advice)
    return advice


def _write(out: Path, advice: Advice) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.md").write_text(markdown(advice), encoding="utf-8")
    write_json(out / "advice.json", advice.wire())


# --- what is asked about -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Subject:
    """The task, the dev examples that are asked, the documents, and what is trained for it."""

    task: Task
    examples: tuple[Example, ...]
    corpus: str
    scratch: Scratch
    data: Dataset


def _subject(settings: Settings, wish: Wish) -> _Subject:
    task = read_task(wish.folder)
    dev, data = read_split(task, "dev"), read_dataset(wish.folder)
    name = scratch_name(task.name)
    corpus = wish.corpus or (check_name(name.removeprefix("advise-"), "corpus") if task.has_corpus else "")
    known = (settings.rooms.index / corpus / "store.db").is_file()
    scratch = Scratch(
        folder=str(wish.folder.resolve()),
        name=name,
        minutes=wish.minutes,
        overrides=wish.overrides,
        corpus="" if known or wish.corpus else corpus,
        closed=bool(task.labels) or task.metric == "accuracy",
    )
    return _Subject(task, sample(dev.examples, wish.limit or None), corpus, scratch, data)


async def _prepare(settings: Settings, subject: _Subject, told: Told) -> None:
    """Trains and indexes in a process of its own. Raises HybridError with its last words."""
    folder = folder_of(settings.rooms, subject.scratch.name)
    subject.scratch.write(folder / "plan.json")
    told("preparing", 0, 1)
    await asyncio.to_thread(
        run_beside,
        ["advise-prepare", str(folder / "plan.json")],
        settings=settings,
        log=folder / "log",
        told=partial(told, "training"),
        failed="Training for the advice failed",
        nice=NICE,
    )


@dataclass(frozen=True, slots=True)
class _Artefacts:
    """What was trained."""

    lora: AdapterVersion | None
    head: AdapterVersion | None


def _artefacts(settings: Settings, subject: _Subject, model: ModelFiles) -> _Artefacts:
    store = AdapterStore(settings.rooms, State(settings.rooms.database), model.sha256)
    found = materialise(settings.embedder, settings.cache)
    shop = Shop(store, subject.scratch.name, model, Embedder(found.path, found.name))
    recipe = lora_recipe(settings.rooms, subject.scratch)
    head = shop.find(head_recipe(), subject.data) if subject.scratch.closed else None
    return _Artefacts(shop.find(recipe, assemble([subject.data], recipe)), head)


# --- asking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Questions:
    """What is to be asked, of whom ever it is."""

    settings: Settings
    model: ModelFiles
    subject: _Subject
    bench: _Artefacts

    @property
    def folder(self) -> Path:
        """Where the answers are kept."""
        return folder_of(self.settings.rooms, self.subject.scratch.name)

    def jobs(self, offer: Offer) -> list[Job]:
        """Every arm that is offered, on every example."""
        task, examples = self.subject.task, self.subject.examples
        splits: list[Learnable] = [read_split(task, "train"), read_split(task, "dev")]
        room = token_limit(splits, token_counter(self.model))
        arms = [arm for arm, name in _arms(self.subject, self.bench).items() if name in offer.models]
        return [job for arm in arms for job in jobs_for(task, examples, arm, offer, room)]

    def kept(self) -> Offer | None:
        """What this home offers, where every answer to it is kept already."""
        found = materialise(self.settings.embedder, self.settings.cache)
        library = Library(self.settings.rooms, Embedder(found.path, found.name), self.settings.retrieval)
        task, state = self.subject.task, State(self.settings.rooms.database)
        with contextlib.closing(library):
            offer = home_offer(self.settings, self.model, state, library, {task.name: task.folder})
        ledger = Ledger(self.folder)
        return offer if all(ledger.get(job.key) for job in self.jobs(offer)) else None

    async def ask(self, asker: Asker, told: Told) -> tuple[dict[str, list[Outcome]], list[str]]:
        """The outcomes of every arm that is offered, and a sentence for each that is not."""
        wanted = _arms(self.subject, self.bench)
        offer = await _offered(asker, set(wanted.values()), told)
        jobs = await asyncio.to_thread(self.jobs, offer)
        ledger = Ledger(self.folder)
        try:
            done = await run(asker, jobs, ledger, inflight=INFLIGHT, progress=lambda n, of: told("asking", n, of))
        finally:
            ledger.close()
        outcomes: dict[str, list[Outcome]] = {}
        for outcome in done:
            outcomes.setdefault(outcome.arm, []).append(outcome)
        unserved = [arm for arm, name in wanted.items() if name not in offer.models]
        why = "was not measured: it is not served; `hybrid adapters list` says why."
        return outcomes, [f"{arm} {why}" for arm in unserved]


def _arms(subject: _Subject, bench: _Artefacts) -> dict[str, str]:
    """The arms to ask → the model that must be offered for each."""
    arms = {"prompt": "prompt", f"few_shot:{subject.task.name}": f"few_shot:{subject.task.name}"}
    if bench.head:
        arms[f"head:{bench.head.name}"] = f"head:{bench.head.name}"
    if subject.corpus:
        arms[f"rag:{subject.corpus}"] = f"rag:{subject.corpus}"
    if bench.lora:
        arms[f"adapter:{bench.lora.id}"] = bench.lora.id
    if bench.lora and subject.corpus:
        arms[f"adapter+rag:{bench.lora.id}:{subject.corpus}"] = bench.lora.id
    return arms


async def _offered(asker: Asker, models: set[str], told: Told) -> Offer:
    """The offer once everything is in it that will be: what was just published is taken up within seconds."""
    ended = time.monotonic() + APPEAR_S
    while True:
        offer = await asker.offer()
        late = {name for name in models - set(offer.models) if name.startswith(("advise-", "head:", "rag:"))}
        refused = {row["name"] for row in offer.status["adapters"] if row["state"] == "rejected"}
        late = {name for name in late if name.removeprefix("head:").partition("@")[0] not in refused}
        if not late or time.monotonic() > ended:
            return offer
        told("waiting for the new versions", 0, 1)
        await asyncio.sleep(0.5)


# --- the numbers ---------------------------------------------------------------------------------------------------


def _measurements(
    subject: _Subject, bench: _Artefacts, outcomes: Mapping[str, Sequence[Outcome]], notes: Sequence[str]
) -> Measurements:
    trained: dict[str, Trained] = {}
    for arm in outcomes:
        version = bench.head if arm.startswith("head:") else bench.lora if arm.startswith("adapter") else None
        if version:
            trained[arm] = _trained(version)
    return Measurements(
        task=subject.task.name,
        metric=subject.task.metric,
        folder=str(subject.task.folder),
        labels=subject.task.labels,
        examples=subject.examples,
        outcomes=outcomes,
        trained=trained,
        corpus=subject.corpus,
        documents=str(subject.task.folder) if subject.task.has_corpus else "",
        rows=len(subject.data.train),
        notes=(*notes, *_steps_note(bench.lora)),
    )


def _steps_note(lora: AdapterVersion | None) -> list[str]:
    if lora is None:
        return []
    steps = lora.card.get("metrics", {}).get("steps", 0)
    return [f"The fine-tune is short ({steps} steps, as the minutes allow); a full `hybrid train` may reach more."]


def _trained(version: AdapterVersion) -> Trained:
    metrics: JSON = version.card.get("metrics", {})
    points = tuple(version.card.get("growth", {}).get("points", ()))
    return Trained(
        version=version.id,
        seconds=float(metrics.get("seconds", 0.0)),
        memory_mb=0.0 if version.kind == HEAD else float(metrics.get("peak_memory_mb", 0.0)),
        steps=int(metrics.get("steps", 0)),
        points=points,
        ahead=tuple(ahead(points)),
    )


def ahead(points: Sequence[Mapping[str, float]]) -> list[Ahead]:
    """Where the learning curve leads, each with the 90 % interval that the noise between seeds leaves.

    The points are drawn again with that noise; nothing is predicted where fewer than half of the draws follow a law.
    """
    said = predicted(points) if len(points) == 3 else []
    if not said:
        return []
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        noise = 1 + LOSS_NOISE * rng.standard_normal(len(points))
        shaken = [{**p, "dev_loss": p["dev_loss"] * float(f)} for p, f in zip(points, noise, strict=True)]
        if found := predicted(shaken):
            drawn.append([row["dev_loss"] for row in found])
    if len(drawn) < DRAWS / 2:
        return []
    low, high = np.percentile(np.array(drawn), (5, 95), axis=0)
    return [
        Ahead(rows=int(row["rows"]), dev_loss=row["dev_loss"], low=round(float(lo), 5), high=round(float(hi), 5))
        for row, lo, hi in zip(said, low, high, strict=True)
    ]
