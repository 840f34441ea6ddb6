"""`hybrid doctor`: what is missing on this machine and how to mend it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hybrid.cli.say import data, text
from hybrid.doctor import examine
from hybrid.settings import Settings

MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="packages only, in a second")] = False,
    json_: Annotated[bool, typer.Option("--json", help="JSON on stdout")] = False,
) -> None:
    """Looks at packages, memory, disk, port and models; says how to mend what is missing."""
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
