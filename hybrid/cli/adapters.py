"""`hybrid adapters`: the store."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from hybrid import catalog, reach
from hybrid.adapters.store import AdapterStore
from hybrid.cli.merge import merge
from hybrid.cli.say import data, say, text
from hybrid.errors import BadRequest
from hybrid.settings import Settings
from hybrid.state import State

app = typer.Typer(help="The adapters of this home: versions, aliases, states.", no_args_is_help=True)
app.command("merge")(merge)
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def _store(settings: Settings) -> AdapterStore:
    store = AdapterStore(settings.rooms, State(settings.rooms.database))
    store.refresh()
    return store


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every version with its state; `*` marks the one that the bare name means."""
    store = _store(Settings.load())
    rows = [catalog.adapter(v, store.alias(v.name)) for v in store.versions()]
    if json_:
        data({"adapters": rows})
        return
    for row in rows:
        mark = "*" if row["alias"] else " "
        text(f"{mark} {row['name']}@{row['version']}  {row['kind']}  {row['state']}  {row['reason']}".rstrip())
    if not rows:
        say("No adapters yet; `hybrid train DIR` makes one.")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="NAME or NAME@VERSION")], json_: Json = False) -> None:
    """One version: its card, state and measurements."""
    settings = Settings.load()
    store = _store(settings)
    version = store.resolve(name)
    measured = State(settings.rooms.database).measurements().get(version.id)
    row = catalog.adapter(version, store.alias(version.name), measured) | {"path": str(version.ref.path)}
    if json_:
        data(row)
        return
    for key, value in row.items():
        text(f"{key}: {value}")


@app.command("promote")
def promote(name: Annotated[str, typer.Argument(metavar="NAME@VERSION")], json_: Json = False) -> None:
    """Points the bare name at a version."""
    settings = Settings.load()
    store = _store(settings)
    if "@" not in name:
        raise BadRequest(f"Say which version: {name}@VERSION; `hybrid adapters list` shows them.")
    version = store.resolve(name)
    server = reach.find(settings.rooms.server_file)
    if server is not None:  # the engine must hold it before the name points to it
        asyncio.run(server.post("/v1/load_lora_adapter", {"lora_name": version.id}))
    store.promote(version.name, version.version)
    _told(json_, version.name, version.version, "answers for")


@app.command("rollback")
def rollback(name: Annotated[str, typer.Argument(metavar="NAME")], json_: Json = False) -> None:
    """Points the bare name back at the version that had it before."""
    _told(json_, name, _store(Settings.load()).rollback(name), "is back as")


@app.command("retire")
def retire(name: Annotated[str, typer.Argument(metavar="NAME@VERSION")], json_: Json = False) -> None:
    """Takes a version out of service; its files stay."""
    store = _store(Settings.load())
    version = store.resolve(name)
    store.retire(version.name, version.version)
    _told(json_, version.name, version.version, "is retired from")


def _told(json_: bool, name: str, version: int, verb: str) -> None:
    if json_:
        data({"adapter": name, "version": version})
    else:
        say(f"{name}@{version} {verb} {name}.")
