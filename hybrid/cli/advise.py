"""`hybrid advise`: prompt, retrieve or fine-tune? Measured on a task's dev split, answered in a page."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from hybrid.cli.say import bar, data, say, text
from hybrid.cli.watch import reporter
from hybrid.evaluation.advice import markdown
from hybrid.lifecycle.advise import LIMIT, Wish
from hybrid.lifecycle.advise import advise as measure
from hybrid.lifecycle.scratch import Scratch, prepare
from hybrid.settings import Settings, offline_environment, share_cores
from hybrid.training.recipes import parse_sets


def advise(
    folder: Annotated[Path, typer.Argument(metavar="TASK_DIR", help="a task folder")],
    minutes: Annotated[float, typer.Option(min=0.1, metavar="M", help="for the short fine-tune and its curve")] = 10.0,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="for advice.md and advice.json [eval/reports/advice-TASK]")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="dev examples asked of each arm; 0 takes all")] = LIMIT,
    corpus: Annotated[str, typer.Option(help="a corpus of this home; the task's own corpus.jsonl by default")] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key of the fine-tune; repeatable")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="advice.json on one line of stdout")] = False,
) -> None:
    """Runs the cheap arms and a short fine-tune on the dev split and says which to serve, how sure that is, and what
    more data or documents would change.

    hybrid advise eval/tasks/tickets --minutes 10

    The same command goes on from where it was cut short, and asks only what has changed.
    """
    settings = Settings.load()
    wish = Wish(folder=folder, minutes=minutes, limit=limit, corpus=corpus, overrides=parse_sets(set_ or []))
    where = out or settings.rooms.reports / f"advice-{folder.resolve().name}"
    with bar() as progress:
        advice = asyncio.run(measure(settings, wish, where, progress))
    if json_:
        data(advice.wire())
    else:
        text(markdown(advice))
        say(f"The advice is in {where}.")


def prepare_(plan: Path) -> None:
    """Trains and indexes what a piece of advice needs; what `hybrid advise` starts."""
    offline_environment()
    share_cores()
    with reporter(as_json=True) as progress:
        prepare(Settings.load(), Scratch.read(plan), progress)
