"""API keys: 32 random bytes, shown once, stored as SHA-256, compared in constant time.

A key that guessing cannot find needs no slow hash: SHA-256 of 256 random bits is as good as any, and cheap enough to do
on every request.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from hybrid.errors import BadRequest, NotFound, Unauthorized
from hybrid.state import State
from hybrid.state import keys as table
from hybrid.types import JSON

PREFIX = "hyb-"
#: `use` asks questions; `admin` also changes what is served
SCOPES = ("use", "admin")
_PUBLIC = (table.c.id, table.c.name, table.c.scopes, table.c.created, table.c.revoked)


@dataclass(frozen=True, slots=True)
class Key:
    """A valid key that was presented; never the key itself."""

    id: str
    scopes: frozenset[str]


def digest(secret: str) -> str:
    """What is stored of a key: its SHA-256, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys of one home. Read afresh at each use, so that another process's `revoke` holds at once."""

    def __init__(self, state: State) -> None:
        self._state = state

    def create(self, name: str, scopes: Iterable[str] = ("use",)) -> JSON:
        """A new key: `{"id", "name", "scopes", "created", "key"}`; `key` cannot be had again. Raises BadRequest."""
        wanted = list(dict.fromkeys(scopes))
        if not wanted or not set(wanted) <= set(SCOPES):
            raise BadRequest(f"Scopes are {' and '.join(SCOPES)}; {', '.join(wanted) or 'none'} was asked.")
        if not 1 <= len(name) <= 100 or not name.isprintable():
            raise BadRequest("A key's name is 1 to 100 printable characters.", param="name")
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {"id": f"key_{secrets.token_hex(6)}", "name": name, "scopes": wanted, "created": time.time()}
        with self._state.transaction() as connection:
            connection.execute(insert(table).values(**row, hash=digest(secret)))
            self._state.write_audit(connection, "key.create", id=row["id"], name=name, scopes=wanted)
        return {**row, "key": secret}

    def list(self) -> list[JSON]:
        """Every key ever made, the oldest first, without secrets; `revoked` is a time or None."""
        with self._state.transaction() as connection:
            rows = connection.execute(select(*_PUBLIC).order_by(table.c.created)).mappings().all()
        return [dict(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Ends a key, now and for good; revoking twice changes nothing. Raises NotFound."""
        with self._state.transaction() as connection:
            if connection.execute(select(table.c.id).where(table.c.id == key_id)).first() is None:
                raise NotFound(f"There is no key {key_id[:80]!r}; `hybrid keys list` shows their ids.")
            alive = (table.c.id == key_id) & table.c.revoked.is_(None)
            if connection.execute(update(table).where(alive).values(revoked=time.time())).rowcount:
                self._state.write_audit(connection, "key.revoke", id=key_id)

    def authenticate(self, secret: str | None) -> Key | None:
        """The key that `secret` is, or None while no key was ever made (the API is open then). Raises Unauthorized.

        Revoking the last key does not open the API again: a door once locked stays locked.
        """
        with self._state.transaction() as connection:
            rows = connection.execute(select(table.c.id, table.c.hash, table.c.scopes, table.c.revoked)).all()
        if not rows:
            return None
        if not secret:
            raise Unauthorized("This server needs an API key: send `Authorization: Bearer KEY`.")
        asked = digest(secret)
        equal = [row for row in rows if hmac.compare_digest(row.hash, asked)]
        if not equal or equal[0].revoked is not None:
            raise Unauthorized("The API key is unknown or revoked; `hybrid keys create` makes one.")
        return Key(equal[0].id, frozenset(equal[0].scopes))
