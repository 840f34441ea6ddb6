"""API keys: 32 random bytes, shown once, stored as SHA-256, compared in constant time.

A key that guessing cannot find needs no slow hash: SHA-256 of 256 random bits is as good as any, and cheap enough to do
on every request. What was read of the keys is kept until anything is committed to the database, by any process: a
request then costs a glance instead of a reading, and a key that is revoked is closed to the next request all the same.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import insert, select, update

from hybrid.errors import BadRequest, NotFound, Unauthorized
from hybrid.state import State, corpora
from hybrid.state import keys as table
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.rights import Rights

PREFIX = "hyb-"
#: how the ids of keys begin
ID = "key_"
#: `use` asks questions; `admin` also changes what is served
SCOPES = ("use", "admin")
MAX_GROUPS = 64
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_READ = (table.c.id, table.c.hash, table.c.scopes, table.c.groups, table.c.arms, table.c.revoked)
_PUBLIC = (table.c.id, table.c.name, table.c.scopes, table.c.groups, table.c.arms, table.c.created, table.c.revoked)


@dataclass(frozen=True, slots=True)
class Key:
    """A valid key that was presented; never the key itself."""

    id: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Kept:
    """A row of the table as it was read."""

    key: Key
    hash: str
    groups: frozenset[str]
    arms: frozenset[str] | None
    revoked: bool

    @property
    def rights(self) -> Rights:
        """What it says of its holder; which corpora these may see, the corpora say."""
        return Rights(caller=self.key.id, admin="admin" in self.key.scopes, groups=self.groups, arms=self.arms)


@dataclass(frozen=True, slots=True)
class _Known:
    """Every key as it was at one stamp of the database. `rights` is filled as holders ask."""

    stamp: int
    by_hash: Mapping[str, _Kept]
    by_id: Mapping[str, _Kept]
    rights: dict[str, Rights] = field(default_factory=dict)


def digest(secret: str) -> str:
    """What is stored of a key: its SHA-256, in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys of one home. Another process's `revoke` holds at once. Safe to use from several threads."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._known = _Known(-1, {}, {})

    def create(
        self,
        name: str,
        scopes: Iterable[str] = ("use",),
        *,
        groups: Iterable[str] = (),
        arms: Iterable[str] | None = None,
    ) -> JSON:
        """A new key: `{"id", "name", "scopes", "groups", "arms", "created", "key"}`; `key` cannot be had again.

        It sees the corpora and documents of its `groups` besides those that are for all, and may ask `arms` alone
        where they are given: strategies, arms, or names of adapters. Raises BadRequest.
        """
        wanted = list(dict.fromkeys(scopes))
        if not wanted or not set(wanted) <= set(SCOPES):
            raise BadRequest(f"Scopes are {' and '.join(SCOPES)}; {', '.join(wanted) or 'none'} was asked.")
        if not 1 <= len(name) <= 100 or not name.isprintable():
            raise BadRequest("A key's name is 1 to 100 printable characters.", param="name")
        allowed = None if arms is None else sorted({_arm(word) for word in arms})
        if "admin" in wanted and allowed is not None:
            raise BadRequest("A key with the scope admin may ask every arm; leave the arms out, or the scope.")
        secret = PREFIX + secrets.token_urlsafe(32)
        row = {
            "id": f"{ID}{secrets.token_hex(6)}",
            "name": name,
            "scopes": wanted,
            "groups": check_groups(groups),
            "arms": allowed,
            "created": time.time(),
        }
        with self._state.transaction() as connection:
            connection.execute(insert(table).values(**row, hash=digest(secret)))
            told = {key: row[key] for key in ("id", "name", "scopes", "groups", "arms")}
            self._state.write_audit(connection, "key.create", **told)
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

    def rights(self, key_id: str) -> Rights:
        """What the holder of a key may use and see now. An id that is no key's is the home's own work."""
        if not key_id.startswith(ID):
            return Rights(caller=key_id)
        known = self._read()
        kept = known.by_id.get(key_id)
        if kept is None:
            return Rights(caller=key_id, admin=False, arms=frozenset())
        found = known.rights.get(key_id)
        if found is None:
            own = kept.rights
            found = own if own.admin else self._with_corpora(own)
            known.rights[key_id] = found
        return found

    def _with_corpora(self, rights: Rights) -> Rights:
        with self._state.transaction() as connection:
            rows = connection.execute(select(corpora.c.name, corpora.c.owner, corpora.c.groups)).all()
        hidden = frozenset(row.name for row in rows if not rights.reads(row.owner, row.groups))
        own = frozenset(row.name for row in rows if row.owner == rights.caller)
        return replace(rights, hidden=hidden, own=own)

    def authenticate(self, secret: str | None) -> Key | None:
        """The key that `secret` is, or None while no key was ever made (the API is open then). Raises Unauthorized.

        Revoking the last key does not open the API again: a door once locked stays locked.
        """
        known = self._read().by_hash
        if not known:
            return None
        if not secret:
            raise Unauthorized("This server needs an API key: send `Authorization: Bearer KEY`.")
        asked = digest(secret)
        # found by Python's own keyed hash of the digest, then compared whole: time tells nothing of a near miss
        kept = known.get(asked)
        if kept is None or not hmac.compare_digest(kept.hash, asked) or kept.revoked:
            raise Unauthorized("The API key is unknown or revoked; `hybrid keys create` makes one.")
        return kept.key

    def _read(self) -> _Known:
        """The keys as they are now, read again where anything was committed since they were."""
        stamp = self._state.stamp()
        known = self._known
        if stamp != known.stamp:  # taken before the reading: what is committed meanwhile is read next time
            with self._state.transaction() as connection:
                rows = [_kept(row) for row in connection.execute(select(*_READ))]
            known = _Known(stamp, {row.hash: row for row in rows}, {row.key.id: row for row in rows})
            self._known = known
        return known


def _kept(row: Any) -> _Kept:
    arms = None if row.arms is None else frozenset(row.arms)
    key = Key(row.id, frozenset(row.scopes))
    return _Kept(key, row.hash, frozenset(row.groups), arms, row.revoked is not None)


def check_groups(groups: Iterable[str]) -> list[str]:
    """`groups` without repetitions. Raises BadRequest for one that cannot be a name."""
    found = sorted(set(groups))
    if len(found) > MAX_GROUPS or not all(isinstance(g, str) and _GROUP.fullmatch(g) for g in found):
        raise BadRequest(
            f"Groups are at most {MAX_GROUPS} names of 1 to 64 letters, digits, '.', '_' or '-'.", param="groups"
        )
    return found


def _arm(word: str) -> str:
    """One thing a key may ask, as it is stored: a strategy or an arm; a bare word is the name of an adapter."""
    try:
        arm = Arm.parse(word)
    except ValueError:
        arm = Arm("adapter", (word,))
    if len(arm.args) > 1 or arm.strategy in ("adapter+rag", "mix") or not all(map(_GROUP.fullmatch, arm.args)):
        raise BadRequest(
            f"{word[:80]!r} cannot be allowed: name an adapter, a strategy (adapter, rag, few_shot, head, moa, "
            "self_moa) or one arm of it, such as rag:handbook. Mixes and adapter+rag follow from their parts.",
            param="arms",
        )
    return str(arm)
