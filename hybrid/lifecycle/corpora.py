"""The corpora of a home as the API and the command line name them: an id for ever, whose each is, who sees it.

The passages are the corpus's own (`knowledge.store`); a row here says to whom they belong. A corpus that `hybrid index`
made gets its row when it is first listed: it is nobody's, and so everybody's.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from filelock import FileLock
from sqlalchemy import delete, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import IntegrityError

from hybrid.errors import BadRequest, Conflict, Forbidden, NotFound, Refused
from hybrid.keys import check_groups
from hybrid.knowledge.corpus import CorpusInfo
from hybrid.knowledge.search import Library
from hybrid.rooms import Home, check_name
from hybrid.state import State, corpus_files
from hybrid.state import corpora as table
from hybrid.types import JSON
from hybrid.types.rights import Rights

DAY_S = 86_400
#: how often a use is written down: when a corpus was last used matters in days
_TOUCH_S = 60.0
#: the id of the row that keeps a new name's door shut while a corpus is being renamed
_MOVING = "moving-"


class Corpora:
    """Look-ups take what the caller may see: another's corpus is as unknown as one that is not there."""

    def __init__(self, home: Home, state: State, library: Library) -> None:
        self.library = library
        self._locks = home.hidden / "locks"
        self._state = state

    def create(
        self,
        rights: Rights,
        name: str | None = None,
        *,
        groups: Sequence[str] = (),
        notes: Mapping[str, str] | None = None,
        description: str = "",
        days: int | None = None,
    ) -> JSON:
        """A new, empty corpus. One that a key made is the key's own and its `groups`', one of the owner's for all
        unless it names groups. Raises Conflict for a name that is taken, Forbidden for a group that is not the key's.
        """
        self._register()
        row = {
            "id": f"vs_{secrets.token_hex(12)}",
            "name": corpus_name(name) if name else f"store-{secrets.token_hex(4)}",
            "owner": "" if rights.admin else rights.caller,
            "groups": own_groups(groups, rights),
            "made_here": True,
            "notes": dict(notes or {}),
            "description": description,
            "days": days,
        }
        try:
            with self._state.transaction() as connection:
                connection.execute(insert(table).values(**row))
        except IntegrityError:
            raise Conflict(f"The name {row['name']!r} is taken; choose another one.", param="name") from None
        return self._row(str(row["id"])) or row

    def listed(self, rights: Rights) -> list[JSON]:
        """Every corpus that the caller sees, the oldest first."""
        there = self._register()
        with self._state.transaction() as connection:
            rows = [dict(row) for row in connection.execute(select(table).order_by(table.c.created)).mappings()]
        return [
            row
            for row in rows
            if rights.sees(row["name"]) and not row["id"].startswith(_MOVING)
            if row["made_here"] or row["name"] in there
        ]

    def get(self, corpus_id: str, rights: Rights) -> JSON:
        """One of them. Raises NotFound."""
        row = None if corpus_id.startswith(_MOVING) else self._row(corpus_id)
        if row is None or not rights.sees(row["name"]) or not (row["made_here"] or self.info(row)):
            raise NotFound(
                f"There is no vector store {corpus_id[:80]!r}; GET /v1/vector_stores lists yours.",
                param="vector_store_id",
            )
        return row

    def named(self, name: str, rights: Rights) -> JSON:
        """The one of a name. Raises NotFound."""
        for row in self.listed(rights):
            if row["name"] == name:
                return row
        raise NotFound(f"There is no corpus {name[:80]!r}; `hybrid corpora list` shows them.", param="corpus")

    def writable(self, corpus_id: str, rights: Rights) -> JSON:
        """One that the caller may change: its own, or any for the owner. Raises NotFound, Forbidden."""
        row = self.get(corpus_id, rights)
        if rights.admin or row["owner"] == rights.caller:
            return row
        raise Forbidden("Another key made this vector store; to change it takes that key or the scope `admin`.")

    def info(self, row: JSON) -> CorpusInfo | None:
        """What it holds; None while nothing was ever put into it."""
        try:
            return self.library.corpus(row["name"])
        except NotFound:
            return None

    def change(self, row: JSON, rights: Rights, **values: Any) -> JSON:
        """Changes `groups`, `notes`, `description` or `days`; who sees it changes with the next request."""
        if "groups" in values:
            values["groups"] = own_groups(values["groups"], rights)
        self._update(row["id"], active=time.time(), **values)
        return self._row(row["id"]) or row

    def rename(self, row: JSON, name: str) -> JSON:
        """Gives a corpus another name. Raises Conflict when it is taken.

        A row under each name holds the door while the folder moves: at no moment is the corpus nobody's.
        """
        new = corpus_name(name)
        if new == row["name"]:
            return row
        self._register()
        with self.lock(row["id"]):
            guard = {**row, "id": _MOVING + row["id"], "name": new}
            try:
                with self._state.transaction() as connection:
                    connection.execute(insert(table).values(**guard))
            except IntegrityError:
                raise Conflict(f"The name {new!r} is taken; choose another one.", param="name") from None
            self._move(row["id"], row["name"], new)
        return self._row(row["id"]) or row

    def delete(self, row: JSON) -> None:
        """Takes a corpus away with all it holds."""
        with self.lock(row["id"]):
            if self.info(row) is not None:
                self.library.delete(row["name"])
            with self._state.transaction() as connection:
                connection.execute(delete(table).where(table.c.id == row["id"]))
                self._state.write_audit(connection, "corpus.delete", id=row["id"], name=row["name"])

    def touch(self, row: JSON) -> None:
        """It was used now; one that had expired begins anew."""
        if row["expired"] or time.time() - row["active"] > _TOUCH_S:
            self._update(row["id"], active=time.time(), expired=False)

    def expire(self) -> None:
        """Empties the corpora that were not used for as long as their user said."""
        with self._state.transaction() as connection:
            due = connection.execute(select(table).where(table.c.days.is_not(None), ~table.c.expired)).mappings().all()
        for row in map(dict, due):
            if time.time() > row["active"] + row["days"] * DAY_S:
                with self.lock(row["id"]):
                    if self.info(row) is not None:
                        self.library.delete(row["name"])
                    with self._state.transaction() as connection:
                        connection.execute(delete(corpus_files).where(corpus_files.c.corpus == row["id"]))
                    self._update(row["id"], expired=True)

    def recover(self) -> None:
        """Ends what a crash cut short: a corpus bears its new name where its folder does."""
        with self._state.transaction() as connection:
            moving = connection.execute(select(table).where(table.c.id.startswith(_MOVING))).mappings().all()
        for guard in moving:
            corpus_id = guard["id"].removeprefix(_MOVING)
            row = self._row(corpus_id)
            with self.lock(corpus_id):
                self._move(corpus_id, row["name"] if row else guard["name"], guard["name"])

    def lock(self, corpus_id: str) -> FileLock:
        """Held by whoever puts files into a corpus or takes them away: a deletion never meets an attachment."""
        self._locks.mkdir(parents=True, exist_ok=True)
        return FileLock(self._locks / f"{corpus_id}.lock")

    def _move(self, corpus_id: str, old: str, new: str) -> None:
        if old != new:
            self.library.rename(old, new)
        with self._state.transaction() as connection:
            connection.execute(delete(table).where(table.c.id == _MOVING + corpus_id))
            connection.execute(update(table).where(table.c.id == corpus_id).values(name=new))

    def _register(self) -> set[str]:
        """Gives every corpus on disk its row; returns their names."""
        there = set(self.library.names())
        with self._state.transaction() as connection:
            known = set(connection.scalars(select(table.c.name)))
            for name in sorted(there - known):
                row = {"id": f"vs_{secrets.token_hex(12)}", "name": name}
                connection.execute(sqlite_insert(table).values(**row).on_conflict_do_nothing())
        return there

    def _row(self, corpus_id: str) -> JSON | None:
        with self._state.transaction() as connection:
            row = connection.execute(select(table).where(table.c.id == corpus_id)).mappings().first()
        return dict(row) if row else None

    def _update(self, corpus_id: str, **values: Any) -> None:
        with self._state.transaction() as connection:
            connection.execute(update(table).where(table.c.id == corpus_id).values(**values))


def corpus_name(name: str) -> str:
    """`name` as a corpus can bear it: what is no letter, digit, '.', '_' or '-' becomes '-'. Raises BadRequest."""
    fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")
    try:
        return check_name(fitting, "corpus")
    except Refused as error:
        raise BadRequest(error.message, param="name") from None


def own_groups(groups: Sequence[str], rights: Rights) -> list[str]:
    """Groups that a caller may share with. Raises BadRequest, Forbidden."""
    found = check_groups(groups)
    if not rights.admin and not set(found) <= rights.groups:
        raise Forbidden("A key shares with its own groups alone; `hybrid keys list` shows which those are.")
    return found
