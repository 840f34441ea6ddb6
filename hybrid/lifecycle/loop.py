"""The circle without hands: what is new is measured, a gate is taught, compared with the one that serves, promoted.

    new arms ─► a few dev rows each, beside the arms measured already ─► teach ─► not worse? ─► live

Everything that was asked is kept in `eval/reports/loop`, so a round asks only what is new, and one that was cut short
goes on where it stopped. Test splits are not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from filelock import FileLock, Timeout

from hybrid.adapters.store import AdapterStore
from hybrid.boot import token_counter
from hybrid.errors import Conflict, DataError, Refused
from hybrid.evaluation import folder, report
from hybrid.evaluation.asking import Asker, Offer, default_arms
from hybrid.evaluation.inventory import home_offer
from hybrid.evaluation.measured import AUTO, Measured
from hybrid.evaluation.runner import OUTCOMES, Job, Ledger, jobs_for, known_outcomes, run, sample, token_limit
from hybrid.evaluation.suite import Subject, Suite, foreign, subjects
from hybrid.gate import bandit
from hybrid.gate.feedback import read_rewards, split
from hybrid.gate.learned import Learned
from hybrid.gate.outcomes import Lessons, joined, read_outcomes
from hybrid.gate.published import (
    FEEDBACK,
    GATE,
    learned_card,
    learned_versions,
    live_version,
    load_learned,
    promote,
    publish_bandit,
)
from hybrid.gate.teach import teach
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.asker import open_asker
from hybrid.lifecycle.measure import own_dev
from hybrid.lifecycle.replay import Desk, open_desk
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.types import JSON
from hybrid.types.arm import Arm

#: dev rows of a task that each arm is asked; an adapter on a task that it was not trained for is asked fewer
LIMIT, FOREIGN = 48, 16
BUDGET_MIN = 10.0
NAME = "loop"
_BATCH, _INFLIGHT = 16, 8
#: what the gate itself weighs, and what asks others and is dear: `hybrid eval` measures those
_UNASKED = frozenset(["mix", "moa", "self_moa"])

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round did. `new` are the arms that nobody had measured; `asked` questions are new, `known` were kept,
    `open` did not fit the budget. `gate` and `feedback` are `{"version", "promoted", "reason"}`; version None: nothing
    was taught, for the `reason`."""

    tasks: tuple[str, ...]
    new: tuple[str, ...]
    asked: int
    known: int
    open: int
    gate: JSON = field(default_factory=dict)
    feedback: JSON = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def wire(self) -> JSON:
        """As `--json` shows it."""
        return {
            "tasks": list(self.tasks),
            "new": list(self.new),
            "asked": self.asked,
            "known": self.known,
            "open": self.open,
            "gate": self.gate,
            "feedback": self.feedback,
            "notes": list(self.notes),
        }


async def loop_once(settings: Settings, budget_min: float, told: Told) -> Round:
    """One round, asking for at most `budget_min` minutes. Raises Conflict while another one is at work in this home,
    NotReady and SetupError where nobody answers."""
    offline_environment()
    with _alone(settings):
        model = await asyncio.to_thread(materialise, settings.model, settings.cache)
        embedding = await asyncio.to_thread(materialise, settings.embedder, settings.cache)
        circle = _Circle(settings, model, Embedder(embedding.path, embedding.name), told)
        return await circle.round(budget_min)


@contextlib.contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    path = settings.rooms.hidden / "locks" / "loop.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Conflict("A loop is at work in this home already; wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, slots=True)
class _Circle:
    """A home and what a round needs of it."""

    settings: Settings
    model: ModelFiles
    embedder: Embedder
    told: Told

    @property
    def out(self) -> Path:
        """The report folder that keeps what was asked."""
        return self.settings.rooms.reports / NAME

    async def round(self, budget_min: float) -> Round:
        found, notes = await asyncio.to_thread(self.subjects)
        done = await self._measure(found, budget_min)
        with open_desk(self.settings, self.embedder) as desk:
            gate = await asyncio.to_thread(self._teach, desk)
            feedback = await asyncio.to_thread(self._learn_from_use, desk)
        return replace(done, gate=gate, feedback=feedback, notes=tuple(notes))

    # --- measuring -----------------------------------------------------------------------------------------------

    def subjects(self) -> tuple[list[Subject], list[str]]:
        """The dev rows of `eval/tasks`, then those that live adapters brought; and what could not be read."""
        found: dict[str, Subject] = {}
        notes: list[str] = []
        count = token_counter(self.model)
        for path in sorted(self.settings.rooms.tasks.glob("*/dev.jsonl")):
            try:
                [subject] = subjects(Suite(tasks=(str(path.parent),), split="dev"), self.settings, count)
                found[subject.task.name] = subject
            except DataError as error:
                notes.append(error.message)
        store = AdapterStore(self.settings.rooms, State(self.settings.rooms.database), self.model.sha256)
        for name in store.names():
            live = store.alias(name)
            with contextlib.suppress(DataError):  # an adapter from elsewhere brought no dev rows
                if live is not None:
                    version = store.resolve(f"{name}@{live}")
                    brought = own_dev(version)
                    task = replace(brought.task, name=str(version.card.get("task") or name))
                    examples = replace(brought, task=task)
                    found.setdefault(task.name, Subject(task, examples, token_limit([examples], count)))
        return list(found.values()), notes

    async def _measure(self, found: Sequence[Subject], budget_min: float) -> Round:
        """Asks what is new, for as long as the budget lasts, and writes the report folder."""
        ends = time.monotonic() + budget_min * 60
        ledger = Ledger(self.out)
        lent = {s.task.name: s.task.folder for s in found if (s.task.folder / "train.jsonl").is_file()}
        opened = open_asker(
            self.settings, self.model, lent=lent, kept=lambda: self._kept(found, lent, ledger), told=self.told
        )
        try:
            async with opened as asker:
                offer = await asker.offer()
                jobs = await asyncio.to_thread(_jobs, found, offer)
                await asyncio.to_thread(self._recall, jobs, ledger)
                before = {job.arm for job in jobs if ledger.get(job.key)}
                todo = [job for job in _wanted(found, offer) if ledger.get(job.key) is None]
                known = sum(ledger.get(job.key) is not None for job in jobs)
                await self._ask(asker, todo, ledger, ends)
        finally:
            ledger.close()
        asked = sum(ledger.get(job.key) is not None for job in todo)
        await asyncio.to_thread(self._write, found, jobs, ledger, offer)
        new = dict.fromkeys(job.arm for job in todo if job.arm not in before)
        return Round(
            tasks=tuple(s.task.name for s in found), new=tuple(new), asked=asked, known=known, open=len(todo) - asked
        )

    async def _ask(self, asker: Asker, todo: Sequence[Job], ledger: Ledger, ends: float) -> None:
        for start in range(0, len(todo), _BATCH):
            if time.monotonic() >= ends:
                return
            self.told("asking", start, len(todo))
            await run(asker, todo[start : start + _BATCH], ledger, inflight=_INFLIGHT)

    def _kept(self, found: Sequence[Subject], lent: dict[str, Path], ledger: Ledger) -> Offer | None:
        """What the home offers, where every answer that is wanted is kept already."""
        state = State(self.settings.rooms.database)
        library = Library(self.settings.rooms, self.embedder, self.settings.retrieval)
        with contextlib.closing(state), contextlib.closing(library):
            offer = home_offer(self.settings, self.model, state, library, lent)
        wanted = _wanted(found, offer)
        self._recall(wanted, ledger)
        return None if any(ledger.get(job.key) is None for job in wanted) else offer

    def _recall(self, jobs: Sequence[Job], ledger: Ledger) -> None:
        """Takes over what other reports of this home know of the very same questions."""
        rooms = self.settings.rooms
        missing = [job for job in jobs if ledger.get(job.key) is None]
        folders = [path.parent for path in rooms.reports.glob(f"*/{OUTCOMES}") if path.parent != self.out]
        for path in [*sorted(folders), rooms.hidden / "measured"] if missing else []:
            other = known_outcomes(path)
            for job in missing:
                if job.key in other and ledger.get(job.key) is None:
                    ledger.add(job.key, other[job.key])
        ledger.sync()

    def _write(self, found: Sequence[Subject], jobs: Sequence[Job], ledger: Ledger, offer: Offer) -> None:
        """The report of everything that is known."""
        measured = []
        for subject in found:
            rows = [(job, ledger.get(job.key)) for job in jobs if job.task is subject.task]
            known = [(job, outcome) for job, outcome in rows if outcome is not None]
            if known:
                ids = {job.example.id for job, _ in known}
                by_arm = {arm: tuple(o for _, o in known if o.arm == arm) for arm in {o.arm: 0 for _, o in known}}
                examples = tuple(e for e in subject.split.examples if e.id in ids)
                task = subject.task
                measured.append(Measured(task.name, task.metric, examples, by_arm, task.instruction))
        ledger.close([job.key for job in jobs if ledger.get(job.key) is not None])
        if measured:
            base = str(offer.status["engine"]["model"])
            told = report.build(NAME, "dev", measured, base_model=base, gate="", adapters=offer.adapters)
            folder.write(self.out, told, measured)

    # --- teaching ------------------------------------------------------------------------------------------------

    def _teach(self, desk: Desk) -> JSON:
        """A new gate, if there is something to teach it with that no version was taught with."""
        rooms, sources = self.settings.rooms, self._sources()
        if not (self.out / OUTCOMES).is_file():
            return _nothing("nothing is measured yet")
        try:
            table = read_outcomes([self.out], teach=True)
            if sources:
                table = joined(table, read_outcomes(sources, teach=True))
            lessons = _digest([table.arms, table.ids, table.groups, table.score.tolist()])
            newest = _newest_card(self.settings, GATE)
            if newest.get("lessons") == lessons:
                return _nothing("no outcome is new", live_version(rooms))
            made = teach(
                rooms, table, self.embedder.embed_queries, self.embedder.query_digest, self.settings.cache,
                progress=self.told, veto=lambda new: self._veto(new, table, desk),
                facts={"from": [str(self.out), *map(str, sources)], "lessons": lessons},
            )  # fmt: skip
        except (DataError, Refused) as error:
            return _nothing(error.message)
        metrics = made.card["kinds"][made.card["model"]]
        row = {"version": made.version, "promoted": made.promoted, "reason": made.reason, "kind": made.card["model"]}
        return {**row, "metrics": metrics}

    def _sources(self) -> list[Path]:
        """What taught the live gate besides, as far as it is still there."""
        live = live_version(self.settings.rooms)
        card = learned_card(self.settings.rooms, GATE, live) if live else {}
        paths = [Path(name) for name in card.get("from", ())]
        return [path for path in paths if path.exists() and path.resolve() != self.out.resolve()]

    def _veto(self, new: Learned, table: Lessons, desk: Desk) -> str:
        """Why a new gate may not serve although outcomes do not speak against it; "" where it may."""
        with contextlib.suppress(Refused):
            live = load_learned(self.settings.rooms, embedder=self.embedder.query_digest)
            gone = sorted(set(live[0].memory.groups) - set(table.groups)) if live else []
            if gone:
                known = ", ".join(group or "an outcome table" for group in gone)
                return f"the live gate also knows {known}, and what taught it is gone; teach it by `hybrid gate train`"
        taught, judged = split(read_rewards(desk.state, self.embedder.dim))
        if not len(judged):
            return ""
        verdict = desk.judged(judged, desk.gate(candidate=new), desk.gate(), bandit.fit(taught))
        return f"{verdict.words}, in what people said of answers" if verdict.worse else ""

    def _learn_from_use(self, desk: Desk) -> JSON:
        """What feedback says of arms, published where it is new and not worse on the holdout."""
        rooms = self.settings.rooms
        if not self.settings.gate.adjust_within:
            return _nothing("gate.adjust_within is 0")
        taught, judged = split(read_rewards(desk.state, self.embedder.dim))
        fitted = bandit.fit(taught)
        if fitted is None:
            return _nothing(f"{len(taught)} rewards may teach; it takes {bandit.ENOUGH}")
        lessons = _digest([taught.decisions, taught.reward.tolist()])
        if _newest_card(self.settings, FEEDBACK).get("lessons") == lessons:
            return _nothing("no reward is new", live_version(rooms, FEEDBACK))
        old, new = desk.gate(), desk.gate()
        new.bandit = fitted
        verdict = desk.judged(judged, new, old, fitted)
        reason = verdict.words if verdict.worse else ""
        facts = {"n": len(taught), "lessons": lessons, "holdout": verdict.wire(), "reason": reason}
        version = publish_bandit(rooms, fitted, self.embedder.query_digest, {**facts, "promoted": not reason})
        if not reason:
            promote(rooms, FEEDBACK, version)
        return {"version": version, "promoted": not reason, "reason": reason, "holdout": verdict.wire()}


def _jobs(found: Sequence[Subject], offer: Offer) -> list[Job]:
    """Every question that could be known: all arms but the gate on all dev rows."""
    return [
        job
        for subject in found
        for arm in default_arms(subject.task, offer)
        if arm != AUTO
        for job in jobs_for(subject.task, subject.split.examples, arm, offer, subject.max_tokens)
    ]


def _wanted(found: Sequence[Subject], offer: Offer) -> list[Job]:
    """What is to be asked, in order: the first row of every task and arm, then the second, so that a budget that ends
    leaves arms that were asked alike."""
    columns: list[list[Job]] = []
    for subject in found:
        for arm in default_arms(subject.task, offer):
            if arm == AUTO or Arm.parse(arm).strategy in _UNASKED:
                continue
            limit = FOREIGN if foreign(arm, subject.task, offer) else LIMIT
            examples = sample(subject.split.examples, limit)
            columns.append(jobs_for(subject.task, examples, arm, offer, subject.max_tokens))
    return [job for row in zip_longest(*columns) for job in row if job is not None]


def _newest_card(settings: Settings, name: str) -> JSON:
    versions = learned_versions(settings.rooms, name)
    return learned_card(settings.rooms, name, versions[-1]) if versions else {}


def _nothing(reason: str, version: int | None = None) -> JSON:
    return {"version": version, "promoted": False, "reason": reason}


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:24]
