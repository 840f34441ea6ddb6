"""`hybrid eval`: every arm on held-out tasks, into a report folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hybrid.adapters.store import AdapterStore
from hybrid.boot import token_counter
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.evaluation.asking import Offer
from hybrid.evaluation.inventory import home_offer
from hybrid.evaluation.runner import INFLIGHT
from hybrid.evaluation.suite import Subject, Suite, measure_suite, read_suite, subjects, unanswered
from hybrid.evaluation.words import markdown
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.asker import open_asker
from hybrid.lifecycle.suite_adapters import Told, prepare
from hybrid.lifecycle.suite_plan import Plan, planned
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.types import JSON

_WITHOUT_EMBEDDER = {"base", "prompt", "adapter"}


def evaluate(
    what: Annotated[list[str], typer.Argument(metavar="SUITE|TASK_DIR…", help="a suite, or task folders")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the report folder; a run cut short goes on there")],
    arms: Annotated[str, typer.Option(help="a,b,…; all that apply by default")] = "",
    split: Annotated[str, typer.Option(help="dev or test [test]")] = "",
    limit: Annotated[int, typer.Option(min=0, help="examples of each task; 0 takes all")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="only tell what would be trained and asked, and how long")
    ] = False,
    texts: Annotated[bool, typer.Option("--texts/--no-texts", help="without: ids, scores and plots only")] = True,
    inflight: Annotated[int, typer.Option(min=1, help="questions open at once")] = INFLIGHT,
    json_: Annotated[bool, typer.Option("--json", help="report.json as the last line of stdout")] = False,
    progress_json: Annotated[bool, typer.Option("--progress-json", help="progress as JSON lines on stdout")] = False,
) -> None:
    """Scores every arm on held-out tasks and writes the report, with the server of this home or an engine of its own.

    hybrid eval eval/tasks/tickets --out eval/reports/tickets --limit 20
    hybrid eval quickstart --out eval/reports/quickstart
    hybrid eval real --out eval/reports/real --plan

    A suite's corpora and adapters are made first, those that the home does not have yet.
    """
    settings = Settings.load()
    offline_environment()
    suite = _suite(read_suite(what, settings), arms, split, limit)
    with bar(progress_json) as progress:
        model = materialise(settings.model, settings.cache, progress)
        embedding = materialise(settings.embedder, settings.cache, progress)
    home = _Home(settings, model, Embedder(embedding.path, embedding.name), State(settings.rooms.database))
    found = subjects(suite, settings, token_counter(model))
    if plan:
        _tell(home.plan(suite, found, out), json_)
        return
    with bar(progress_json) as progress:
        home.prepare(suite, found, progress)
        report = asyncio.run(home.measure(suite, found, _Order(out, texts, inflight), progress))
    if json_:
        data(report)
    else:
        text(markdown(report))
        say(f"The report is in {out}.")


def _suite(suite: Suite, arms: str, split: str, limit: int) -> Suite:
    """The suite with what the flags change. Raises BadRequest for a split that cannot be."""
    if split not in ("", "dev", "test"):
        raise BadRequest("--split is dev or test.", param="split")
    named = tuple(name.strip() for name in arms.split(",") if name.strip())
    changes = {"arms": named, "split": split, "limit": limit}
    return suite.model_copy(update={key: value for key, value in changes.items() if value})


@dataclass(frozen=True, slots=True)
class _Order:
    """Where the answers go, with their texts or without, and how many questions are open at once."""

    out: Path
    texts: bool
    inflight: int


@dataclass(frozen=True, slots=True)
class _Home:
    """A home without its engine."""

    settings: Settings
    model: ModelFiles
    embedder: Embedder
    state: State

    def prepare(self, suite: Suite, found: Sequence[Subject], tell: Told) -> None:
        """Makes what the suite needs and is not there."""
        if not suite.adapters and not suite.corpora:
            return
        store = AdapterStore(self.settings.rooms, self.state, self.model.sha256)
        with closing(self._library()) as library:
            prepare(suite, found, settings=self.settings, model=self.model, store=store, library=library, tell=tell)

    async def measure(self, suite: Suite, found: Sequence[Subject], order: _Order, tell: Told) -> JSON:
        """The report, of whoever can answer; where every outcome is kept already, nothing is started for it."""

        def kept() -> Offer | None:
            offer = self._offer(found)
            return None if unanswered(suite, found, offer, order.out) else offer

        def told(done: int, total: int) -> None:
            tell("asking", done, total)

        embeds = not suite.arms or bool({arm.partition(":")[0] for arm in suite.arms} - _WITHOUT_EMBEDDER)
        opened = open_asker(self.settings, self.model, lent=_lent(found), kept=kept, told=tell, embeds=embeds)
        async with opened as asker:
            return await measure_suite(
                suite, found, asker, order.out, self.settings.rooms, told, texts=order.texts, inflight=order.inflight
            )

    def plan(self, suite: Suite, found: Sequence[Subject], out: Path) -> Plan:
        """What a run would do."""
        store = AdapterStore(self.settings.rooms, self.state, self.model.sha256)
        with closing(self._library()) as library:
            count = token_counter(self.model)
            return planned(suite, found, self._offer(found), out, self.settings, self.model, store, library, count)

    def _offer(self, found: Sequence[Subject]) -> Offer:
        with closing(self._library()) as library:
            return home_offer(self.settings, self.model, self.state, library, _lent(found))

    def _library(self) -> Library:
        return Library(self.settings.rooms, self.embedder, self.settings.retrieval)


def _lent(found: Sequence[Subject]) -> dict[str, Path]:
    """The tasks whose training rows few-shot prompts are made of."""
    return {s.task.name: s.task.folder for s in found if (s.task.folder / "train.jsonl").is_file()}


def _tell(plan: Plan, as_json: bool) -> None:
    if as_json:
        data(plan.wire())
    else:
        text(str(plan))
