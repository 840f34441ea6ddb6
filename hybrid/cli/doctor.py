"""`hybrid doctor`: what is missing on this machine and how to mend it, and which settings fit it."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated

import typer

from hybrid import reach
from hybrid.bench.tune import keep
from hybrid.bench.tune import tune as try_settings
from hybrid.cli.ready import ready
from hybrid.cli.say import data, say, text
from hybrid.doctor import examine
from hybrid.errors import HomeInUse
from hybrid.settings import Settings

MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="packages only, in a second")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="measure engine settings here, and write what is faster")
    ] = False,
    minutes: Annotated[float, typer.Option(min=0, help="how long --tune may take")] = 15,
    json_: Annotated[bool, typer.Option("--json", help="JSON on stdout")] = False,
) -> None:
    """Looks at packages, memory, disk, port and models; says how to mend what is missing."""
    if tune:
        _tune(Settings.load(), minutes, json_)
        return
    findings = examine(Settings.load(), quick=quick)
    healthy = all(finding.level != "bad" for finding in findings)
    if json_:
        data({"ok": healthy, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            text(f"{MARKS[finding.level]}  {finding.check:9} {finding.detail}")
            if finding.advice:
                text(f"      → {finding.advice}")
    if not healthy:
        raise typer.Exit(3)


def _tune(settings: Settings, minutes: float, json_: bool) -> None:
    """Raises HomeInUse beside a server, whose work would be measured too."""
    if reach.find(settings.rooms.server_file) is not None:
        raise HomeInUse("A server runs in this home and would disturb the measurement; stop it first.")
    with ready(settings, settings.model) as (model, progress):
        result = asyncio.run(try_settings(settings, model, minutes=minutes, progress=progress))
    written = keep(settings, result)
    if json_:
        data({**result.wire(), "written": str(written) if written else None})
    else:
        text(result.table())
    say(f"Written to {written}." if written else "What is set already serves best here; nothing was changed.")
