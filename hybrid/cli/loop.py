"""`hybrid loop`: measure what is new, teach the gate, compare, promote; and `hybrid gate replay`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from hybrid.cli.ready import open_embedder
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.gate.published import GATE, load_learned, serving_version
from hybrid.lifecycle.loop import BUDGET_MIN, Round, loop_once
from hybrid.lifecycle.replay import open_desk
from hybrid.settings import Settings, share_cores
from hybrid.types import JSON

#: seconds between two looks for something new
_EVERY_S = 60.0


def loop(
    once: Annotated[bool, typer.Option("--once", help="one round, then end")] = False,
    budget: Annotated[
        float, typer.Option(min=0, metavar="MINUTES", help="for asking, in each round; 0 teaches what is known")
    ] = BUDGET_MIN,
    json_: Annotated[bool, typer.Option("--json", help="each round as one JSON object on stdout")] = False,
) -> None:
    """Asks new arms some dev rows, teaches the gate with all that is known, and lets it serve if it is not worse.

    hybrid loop --once --budget 10

    What was asked is kept: a round that was cut short goes on, and the next one asks only what is new.
    """
    settings = Settings.load()
    share_cores()
    while True:
        with bar() as progress:
            done = asyncio.run(loop_once(settings, budget, progress))
        if json_:
            data(done.wire())
        else:
            text(table(done))
        if once:
            return
        time.sleep(_EVERY_S)


def table(done: Round) -> str:
    """A round in lines."""
    rows = [
        ("tasks", ", ".join(done.tasks) or "none with dev rows"),
        ("new arms", ", ".join(done.new) or "none"),
        ("asked", f"{done.asked} now, {done.known} known, {done.open} left for the next round"),
        ("gate", _told(GATE, done.gate)),
        ("feedback", _told("feedback", done.feedback)),
        *(("note", note) for note in done.notes),
    ]
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


def _told(name: str, row: JSON) -> str:
    if row["promoted"]:
        metrics = row.get("metrics", {})
        best = metrics.get("best_single", {})
        worth = f": {metrics['auto']:.3f} on held-out rows, best single {best['score']:.3f}" if metrics else ""
        return f"{name}@{row['version']} serves now{worth}"
    if row["reason"] and row["version"] and "metrics" in row:
        return f"{name}@{row['version']} was not promoted: {row['reason']}"
    return f"as before: {row['reason']}"


def replay(
    ids: Annotated[list[str] | None, typer.Argument(metavar="DECISION_ID…", help="decisions of the log")] = None,
    gate: Annotated[str, typer.Option("--gate", metavar="gate[@VERSION]", help="the live one by default")] = GATE,
    since: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="all decisions of the gate in the last hours")
    ] = 0,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """What a gate would choose for logged decisions, from the vectors that were kept; their words were not.

    hybrid gate replay --since 24 --gate gate@3
    """
    if bool(ids) == bool(since):
        raise BadRequest("Name decisions, or give --since HOURS.")
    version = serving_version(gate)
    settings = Settings.load()
    embedder = open_embedder(settings)
    load_learned(settings.rooms, GATE, version, embedder.query_digest)  # refused here, where a server would do without
    with open_desk(settings, embedder) as desk:
        found = desk.replay(desk.gate(version), ids or (), time.time() - since * 3600)
    if json_:
        data(found.wire())
        return
    for row in found.rows:
        mark = "=" if row.then == row.now else "→"
        text(f"{row.id}  {row.then} {mark} {row.now}  ({row.score:.2f}: {row.reason})")
    told = found.wire()
    say(f"{told['changed']} of {told['n']} would change; {found.skipped} had no vector that can be used.")
    say(f"Missing, as words are not kept: {', '.join(told['missing'])}.")
