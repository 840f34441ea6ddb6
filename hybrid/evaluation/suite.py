"""What to measure: a suite in TOML, or task folders, and the run that turns it into a report folder."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hybrid.errors import DataError
from hybrid.evaluation import folder, report
from hybrid.evaluation.asking import Asker, Offer, chosen_arms
from hybrid.evaluation.leaks import mark_leaks
from hybrid.evaluation.measured import AUTO, Measured
from hybrid.evaluation.runner import INFLIGHT, Job, Ledger, Progress, jobs_for, run, sample, token_limit
from hybrid.evaluation.tasks import DevSplit, Learnable, Task, TestSplit, read_split, read_task
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.outcome import Outcome

DATA = "$HYBRID_DATA"


class SuiteAdapter(BaseModel):
    """An adapter that a suite needs: what it learns from, its name (the task's by default), and a recipe's keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    task: str
    name: str = ""

    @property
    def recipe(self) -> dict[str, Any]:
        """The keys beside task and name, unchecked: the trainer knows them."""
        return dict(self.model_extra or {})


class Suite(BaseModel):
    """What a suite says. `foreign_limit` is for adapters on tasks they were not trained for and for the corpus of
    another task, `limits` for all arms of a strategy (those that confer make many calls); `corpora` has the corpora
    that its tasks bring indexed under the tasks' names, and `adapters` are trained, before anything is asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = ""
    tasks: tuple[str, ...] = Field(min_length=1)
    arms: tuple[str, ...] = ()
    split: Literal["dev", "test"] = "test"
    limit: int | None = Field(None, ge=1)
    foreign_limit: int | None = Field(None, ge=1)
    limits: dict[str, Annotated[int, Field(ge=1)]] = {}
    seed: int = 0
    corpora: bool = False
    adapters: tuple[SuiteAdapter, ...] = ()


@dataclass(frozen=True, slots=True)
class Subject:
    """A task to be measured: the examples asked and the room for their answers, in tokens."""

    task: Task
    split: DevSplit | TestSplit
    max_tokens: int


def read_suite(names: Sequence[str], settings: Settings) -> Suite:
    """The suite that the words of a command mean: one suite (a name or a .toml file), or task folders.

    Raises DataError naming what is missing or wrong.
    """
    if len(names) == 1 and not (Path(names[0]) / "task.json").is_file():
        path = Path(names[0]) if names[0].endswith(".toml") else settings.rooms.suites / f"{names[0]}.toml"
        if path.is_file():
            return _from_toml(path)
    for name in names:
        if not (Path(name) / "task.json").is_file():
            known = ", ".join(sorted(p.stem for p in settings.rooms.suites.glob("*.toml"))) or "none"
            raise DataError(f"{name} is no task folder (it holds no task.json) and no suite. Suites here: {known}.")
    title = Path(names[0]).resolve().name if len(names) == 1 else "tasks"
    return Suite(name=title, tasks=tuple(names))


def _from_toml(path: Path) -> Suite:
    try:
        suite = Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path} is not valid TOML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {where!r}: {first['msg']}. The keys are {', '.join(Suite.model_fields)}.") from error
    return suite.model_copy(update={"name": suite.name or path.stem})


def folder_of(name: str, settings: Settings) -> Path:
    """A task's path as a suite writes it. Raises DataError when it needs HYBRID_DATA and there is none."""
    if name.startswith(DATA):
        if settings.data is None:
            raise DataError(f"{name} lies in {DATA}, which is not set; export HYBRID_DATA=/path/to/the/task/folders.")
        return settings.data / name.removeprefix(DATA).lstrip("/")
    path = Path(name)
    return path if path.is_absolute() or path.exists() else settings.rooms.root / path


def subjects(suite: Suite, settings: Settings, count: Callable[[str], int]) -> list[Subject]:
    """The tasks of a suite with the examples to ask. Raises DataError, also for two tasks of one name."""
    found: list[Subject] = []
    for name in suite.tasks:
        task = read_task(folder_of(name, settings))
        if any(task.name == other.task.name for other in found):
            raise DataError(f"Two tasks of this run are named {task.name!r}; outcomes are told apart by that name.")
        split: DevSplit | TestSplit = read_split(task, "dev") if suite.split == "dev" else read_split(task, "test")
        kept = type(split)(task, sample(split.examples, suite.limit, suite.seed))
        found.append(Subject(task, kept, token_limit(_known(task), count)))
    return found


def _known(task: Task) -> list[Learnable]:
    """The splits of a task that may be looked at, as far as it has them."""
    out: list[Learnable] = []
    if (task.folder / "train.jsonl").is_file():
        out.append(read_split(task, "train"))
    if (task.folder / "dev.jsonl").is_file():
        out.append(read_split(task, "dev"))
    return out


async def measure_suite(
    suite: Suite,
    found: Sequence[Subject],
    asker: Asker,
    out: Path,
    rooms: Home,
    progress: Progress | None = None,
    *,
    texts: bool = True,
    inflight: int = INFLIGHT,
) -> JSON:
    """Asks everything, writes the report folder, and returns the report. A run that was killed goes on.

    At most `inflight` questions are open at once. Without `texts` the folder ends up with ids, scores and pictures
    alone.
    """
    offer = await asker.offer()
    jobs = questions(suite, found, offer)
    ledger = Ledger(out)
    finished = False
    try:
        outcomes = await run(asker, jobs, ledger, inflight=inflight, progress=progress)
        finished = True
    finally:
        ledger.close([job.key for job in jobs] if finished else None)
    tasks = [_measured(subject, jobs, outcomes) for subject in found]
    gate = offer.status["gate"].get("version")
    base = str(offer.status["engine"]["model"])
    named = f"gate@{gate}" if gate else ""
    written = report.build(suite.name, suite.split, tasks, base_model=base, gate=named, adapters=offer.adapters)
    mark_leaks(written, {s.task.name: (s.task, s.split.examples) for s in found}, outcomes, rooms)
    await asyncio.to_thread(folder.write, out, written, tasks, texts=texts)
    return written


def questions(suite: Suite, found: Sequence[Subject], offer: Offer) -> list[Job]:
    """Everything that a suite asks of what is on offer, task by task and arm by arm. Raises DataError where that is
    nothing."""
    others = frozenset(subject.task.name for subject in found)
    jobs = [job for subject in found for job in _jobs(suite, subject, offer, others)]
    if not jobs:
        wanted = ", ".join(suite.arms) or "any arm"
        raise DataError(f"There is nothing to ask: no {wanted} is here for these tasks. `/v1/models` lists what is.")
    return jobs


def unanswered(suite: Suite, found: Sequence[Subject], offer: Offer, out: Path) -> int:
    """How many questions of a suite have no outcome in the report folder `out` yet."""
    known = Ledger(out)
    return sum(known.get(job.key) is None for job in questions(suite, found, offer))


def _jobs(suite: Suite, subject: Subject, offer: Offer, others: frozenset[str]) -> list[Job]:
    jobs: list[Job] = []
    for arm in chosen_arms(suite.arms, subject.task, offer):
        limits = [suite.limits.get(arm.partition(":")[0])]
        if foreign(arm, subject.task, offer, others - {subject.task.name}):
            limits.append(suite.foreign_limit)
        limit = min((limit for limit in limits if limit), default=None)
        examples = sample(subject.split.examples, limit, suite.seed)
        jobs += jobs_for(subject.task, examples, arm, offer, subject.max_tokens)
    return jobs


def foreign(arm: str, task: Task, offer: Offer, others: Collection[str] = ()) -> bool:
    """Whether an arm's adapter was trained for another task, or its corpus belongs to one of the `others`."""
    parsed = None if arm == AUTO else Arm.parse(arm)
    if parsed is None or (parsed.strategy == "rag" and parsed.args and parsed.args[0] in others):
        return parsed is not None
    adapter = parsed.adapter
    if adapter is None:
        return False
    card = offer.adapters.get(adapter, {}).get("card", {})
    return task.name not in (card.get("task"), adapter.partition("@")[0])


def _measured(subject: Subject, jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> Measured:
    by_arm: dict[str, list[Outcome]] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        if job.task is subject.task:
            by_arm.setdefault(job.arm, []).append(outcome)
    rows = {arm: tuple(found) for arm, found in by_arm.items()}
    task = subject.task
    return Measured(task.name, task.metric, subject.split.examples, rows, task.instruction)
