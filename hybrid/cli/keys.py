"""`hybrid keys`: API keys and their scopes."""

from __future__ import annotations

from typing import Annotated

import typer

from hybrid.cli.say import data, say, text
from hybrid.keys import Keys
from hybrid.settings import Settings
from hybrid.state import State

app = typer.Typer(help="API keys; once one exists every route but /livez and /readyz needs one.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


def _keys() -> Keys:
    return Keys(State(Settings.load().rooms.database))


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="who it is for")],
    scope: Annotated[list[str] | None, typer.Option(help="use (default) or admin; repeatable")] = None,
    group: Annotated[list[str] | None, typer.Option(help="whose corpora and documents it sees; repeatable")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="what alone it may ask: an adapter, rag:CORPUS, moa …; repeatable")
    ] = None,
    json_: Json = False,
) -> None:
    """Makes a key and shows it once.

    hybrid keys create alice --group sales --arm bank --arm rag:prices
    """
    made = _keys().create(name, scope or ["use"], groups=group or [], arms=arm or None)
    if json_:
        data(made)
    else:
        text(made["key"])
        say(f"Key {made['id']} for {name}: shown this once, stored as a hash.")


@app.command("list")
def list_(json_: Json = False) -> None:
    """The keys, without their secrets."""
    rows = _keys().list()
    if json_:
        data({"keys": rows})
        return
    for row in rows:
        more = [f"groups {','.join(row['groups'])}"] if row["groups"] else []
        more += [f"arms {','.join(row['arms'])}"] if row["arms"] is not None else []
        more += ["revoked"] if row["revoked"] else []
        text("  ".join([row["id"], row["name"], ",".join(row["scopes"]), *more]))


@app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(help="the id `hybrid keys list` shows")], json_: Json = False) -> None:
    """Revokes a key at once, in a running server too."""
    _keys().revoke(key_id)
    if json_:
        data({"id": key_id, "revoked": True})
    else:
        say(f"Key {key_id} is revoked.")
