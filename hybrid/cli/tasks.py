"""`hybrid tasks`: task folders, checked, and made of what others collected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.cli.say import complain, data, say
from hybrid.evaluation.importers import Wanted, import_task
from hybrid.evaluation.tasks import check_task

app = typer.Typer(help="Task folders: what is measured.", no_args_is_help=True)
_SHOWN = 50


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


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="HF_ID|FILE", help="a cached data set, or csv, tsv, json, parquet")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the task folder to make")],
    input_: Annotated[str, typer.Option("--input", metavar="COL", help="the column that is asked; a.b goes inside")],
    reference: Annotated[str, typer.Option(metavar="COL", help="the column with the right answer, or a list of them")],
    metric: Annotated[str, typer.Option(help="how an answer is scored")],
    split: Annotated[str, typer.Option(help="take this split alone, and divide it")] = "",
    labels: Annotated[str, typer.Option(metavar="COL", help="balance the splits by this column")] = "",
    config: Annotated[str, typer.Option(help="the configuration of a data set that has several")] = "",
    name: Annotated[str, typer.Option(help="the task's name; the folder's by default")] = "",
    instruction: Annotated[str, typer.Option(help="what the model is told before every input")] = "",
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Makes a task folder from a Hugging Face data set or a file; with --labels COL = --reference COL a closed task.

    hybrid tasks import tickets.csv --out tickets --input text --reference team --labels team --metric accuracy
    """
    wanted = Wanted(input=input_, reference=reference, metric=metric, labels=labels, name=name, instruction=instruction)
    made = import_task(source, out, wanted, split=split, config=config)
    if json_:
        left = {"empty": made.empty, "repeated": made.repeated}
        data({"task": made.name, "path": str(out), "rows": dict(made.rows), "left_out": left})
    else:
        rows = ", ".join(f"{count} {part}" for part, count in made.rows.items())
        say(f"{made.name}: {rows} rows in {out}; left out {made.empty} without text, {made.repeated} repeated.")
