"""`hybrid eval`: every arm on held-out tasks, into a report folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hybrid import reach
from hybrid.adapters.store import AdapterStore
from hybrid.boot import open_gateway, token_counter
from hybrid.cli.ask import wait_ready
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.evaluation.asking import Asker, GatewayAsker, Offer, Remembered, ServerAsker, shown_settings
from hybrid.evaluation.inventory import home_offer
from hybrid.evaluation.runner import INFLIGHT
from hybrid.evaluation.suite import Subject, Suite, measure_suite, read_suite, subjects, unanswered
from hybrid.evaluation.words import markdown
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.lifecycle.suite_adapters import Told, prepare
from hybrid.lifecycle.suite_plan import Plan, planned
from hybrid.models import ModelFiles, materialise
from hybrid.rooms import Home
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.types import JSON

#: while everything is asked at once a gate may take its time: its choice is measured, not the queue before it
_GATE_DEADLINE_MS = 10_000.0
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
        report = home.remembered(suite, found, out, texts)
        if report is None:
            asking = _Asking(suite, found, out, texts, inflight, progress)
            report = asyncio.run(_measure(settings, model, asking))
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

    def remembered(self, suite: Suite, found: Sequence[Subject], out: Path, texts: bool) -> JSON | None:
        """The report of a run whose outcomes are all kept already: nothing is started for it."""
        if self.settings.engine.kind.startswith("http") or reach.find(self.settings.rooms.server_file) is not None:
            return None  # what is offered there is asked there
        offer = self._offer(found)
        if unanswered(suite, found, offer, out):
            return None
        return asyncio.run(measure_suite(suite, found, Remembered(offer), out, self.settings.rooms, texts=texts))

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


@dataclass(frozen=True, slots=True)
class _Asking:
    """What is asked, where the answers go, and who is told how far it is."""

    suite: Suite
    found: Sequence[Subject]
    out: Path
    texts: bool
    inflight: int
    tell: Told

    async def of(self, asker: Asker, home: Home) -> JSON:
        """The report, once everything is answered."""

        def told(done: int, total: int) -> None:
            self.tell("asking", done, total)

        return await measure_suite(
            self.suite, self.found, asker, self.out, home, told, texts=self.texts, inflight=self.inflight
        )


async def _measure(settings: Settings, model: ModelFiles, asking: _Asking) -> JSON:
    server = reach.find(settings.rooms.server_file)
    if server is not None:
        async with server.connect() as session:
            return await asking.of(ServerAsker(session, shown_settings(settings), model.sha256), settings.rooms)
    say("No server runs in this home; starting an engine for this run (`hybrid serve` keeps it running).")
    patient = settings.gate.model_copy(update={"deadline_ms": _GATE_DEADLINE_MS})
    async with open_gateway(settings.model_copy(update={"gate": patient}), asking.tell) as gateway:
        for name, folder in _lent(asking.found).items():
            gateway.shelves.lend(name, folder)
        await wait_ready(gateway, settings.engine.start_timeout_s, asking.tell)
        arms = asking.suite.arms
        if not arms or {arm.partition(":")[0] for arm in arms} - _WITHOUT_EMBEDDER:
            await gateway.embed(["."])  # loaded now, so that no answer's latency holds its start
        return await asking.of(GatewayAsker(gateway, model.sha256), settings.rooms)
