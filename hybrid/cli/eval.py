"""`hybrid eval`: every arm on held-out tasks, into a report folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hybrid import reach
from hybrid.boot import open_gateway, token_counter
from hybrid.cli.ask import wait_ready
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.evaluation.asking import GatewayAsker, ServerAsker
from hybrid.evaluation.report import markdown
from hybrid.evaluation.suite import Subject, Suite, measure_suite, read_suite, subjects
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings, offline_environment
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
    json_: Annotated[bool, typer.Option("--json", help="report.json as the last line of stdout")] = False,
) -> None:
    """Scores every arm on held-out tasks and writes the report, with the server of this home or an engine of its own.

    hybrid eval eval/tasks/tickets --out eval/reports/tickets --limit 20
    hybrid eval quickstart --out eval/reports/quickstart
    """
    settings = Settings.load()
    offline_environment()
    suite = _suite(read_suite(what, settings), arms, split, limit)
    with bar() as progress:
        model = materialise(settings.model, settings.cache, progress)
    found = subjects(suite, settings, token_counter(model))
    report = asyncio.run(_measure(settings, model, suite, found, out))
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


async def _measure(settings: Settings, model: ModelFiles, suite: Suite, found: Sequence[Subject], out: Path) -> JSON:
    with bar() as progress:

        def told(done: int, total: int) -> None:
            progress("asking", done, total)

        server = reach.find(settings.rooms.server_file)
        if server is not None:
            shown = settings.retrieval.model_dump_json() + settings.gate.model_dump_json() + settings.system_prompt
            async with server.connect() as session:
                return await measure_suite(suite, found, ServerAsker(session, shown, model.sha256), out, told)
        say("No server runs in this home; starting an engine for this run (`hybrid serve` keeps it running).")
        patient = settings.gate.model_copy(update={"deadline_ms": _GATE_DEADLINE_MS})
        async with open_gateway(settings.model_copy(update={"gate": patient}), progress) as gateway:
            for subject in found:
                if (subject.task.folder / "train.jsonl").is_file():
                    gateway.shelves.lend(subject.task.name, subject.task.folder)
            await wait_ready(gateway, settings.engine.start_timeout_s, progress)
            if not suite.arms or {arm.partition(":")[0] for arm in suite.arms} - _WITHOUT_EMBEDDER:
                await gateway.embed(["."])  # loaded now, so that no answer's latency holds its start
            return await measure_suite(suite, found, GatewayAsker(gateway, model.sha256), out, told)
