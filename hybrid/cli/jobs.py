"""`hybrid jobs`: the fine-tuning jobs of this home, the same rows that the API shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.adapters.store import AdapterStore
from hybrid.cli.say import data, say, text
from hybrid.lifecycle.orders import Order, Orders
from hybrid.lifecycle.trainee import check_job, run_job
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.jobs import JobBook
from hybrid.training.recipes import parse_sets
from hybrid.training.wire import event_object, job_object

app = typer.Typer(help="Fine-tuning jobs: what a server trains in the background.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
Job = Annotated[str, typer.Argument(metavar="JOB_ID")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="how many")]


def _book(settings: Settings) -> JobBook:
    return JobBook(State(settings.rooms.database))


def _orders(settings: Settings) -> Orders:
    state = State(settings.rooms.database)
    return Orders(settings, state=state, store=AdapterStore(settings.rooms, state))


@app.command("submit")
def submit(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="a task folder or a data file")],
    name: Annotated[str | None, typer.Option(help="the adapter's name; `ft-…` by default")] = None,
    method: Annotated[str | None, typer.Option(help="how to adapt the model [lora]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key; repeatable")
    ] = None,
    json_: Json = False,
) -> None:
    """Puts a job in the line of this home: its server trains it, now or when it is started next.

    hybrid jobs submit eval/tasks/tickets --name tickets
    """
    overrides = parse_sets(set_ or []) | ({"method": method} if method else {})
    order = Order(source=source, name=name, overrides=overrides)
    _tell(_orders(Settings.load()).submit(order, caller="local", admin=True), json_)


@app.command("list")
def list_(limit: Limit = 20, json_: Json = False) -> None:
    """The newest jobs, newest first."""
    rows, more = _book(Settings.load()).list(limit=limit)
    if json_:
        data({"jobs": [job_object(row) for row in rows], "has_more": more})
        return
    for row in rows:
        text(_line(row))
    if not rows:
        say("No jobs yet; `hybrid jobs submit DIR` makes one.")


@app.command("show")
def show(job_id: Job, json_: Json = False) -> None:
    """One job."""
    row = job_object(_book(Settings.load()).get(job_id))
    if json_:
        data(row)
        return
    for key, value in row.items():
        text(f"{key}: {value}")


@app.command("events")
def events(job_id: Job, limit: Limit = 20, json_: Json = False) -> None:
    """What happened to a job, newest first."""
    rows, _ = _book(Settings.load()).events(job_id, limit=limit)
    for event in map(event_object, rows):
        if json_:
            data(event)
        else:
            text(f"{event['level']:5}  {event['message']}")


@app.command("cancel")
def cancel(job_id: Job, json_: Json = False) -> None:
    """Ends a job; its process is gone within ten seconds."""
    _tell(_book(Settings.load()).want(job_id, "cancel"), json_)


@app.command("pause")
def pause(job_id: Job, json_: Json = False) -> None:
    """Stops a job after the step it is in, with a checkpoint."""
    _tell(_book(Settings.load()).want(job_id, "pause"), json_)


@app.command("resume")
def resume(job_id: Job, json_: Json = False) -> None:
    """Lets a paused job go on from its checkpoint when its turn comes."""
    _tell(_orders(Settings.load()).resume(job_id), json_)


@app.command("check", hidden=True)
def check(job_id: Job) -> None:
    """Reads the files of a job; what the server starts for each."""
    check_job(Settings.load(), job_id)


@app.command("run")
def run(job_id: Job) -> None:
    """Trains a queued job in this process; what the server starts for each. A server makes it `succeeded`."""
    run_job(Settings.load(), job_id)


def _tell(row: dict[str, Any], json_: bool) -> None:
    if json_:
        data(job_object(row))
    else:
        text(_line(row))


def _line(row: dict[str, Any]) -> str:
    progress = row["progress"]
    at = f"step {progress['step']}/{progress['steps']}" if "step" in progress else progress.get("phase", "")
    made = (row["result"] or {}).get("fine_tuned_model") or row["error"] or at
    return f"{row['id']}  {row['status']:<16}  {row['spec'].get('name', '')}  {made}".rstrip()
