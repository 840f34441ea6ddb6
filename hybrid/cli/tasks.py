"""`hybrid tasks`: task folders, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.cli.say import complain, data, say
from hybrid.evaluation.tasks import check_task

app = typer.Typer(help="Task folders: what is measured.", no_args_is_help=True)
_SHOWN = 50


@app.callback()
def _group() -> None:
    """Keeps `check` a subcommand while it is the only one."""


@app.command("check")
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a task folder")],
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Validates a task folder; every complaint names file and line. Exit code 1 when there is one.

    hybrid tasks check eval/tasks/tickets
    """
    found = check_task(folder)
    if json_:
        complaints = [complaint.wire() for complaint in found.complaints]
        data({"task": found.task, "ok": not complaints, "rows": dict(found.rows), "complaints": complaints})
    else:
        for complaint in found.complaints[:_SHOWN]:
            complain(str(complaint))
        if len(found.complaints) > _SHOWN:
            complain(f"… and {len(found.complaints) - _SHOWN} more; --json lists them all.")
        if not found.complaints:
            rows = ", ".join(f"{count} in {file}" for file, count in found.rows.items())
            say(f"{found.task} is in order: {rows}.")
    raise typer.Exit(1 if found.complaints else 0)
