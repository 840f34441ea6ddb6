"""The only door to `adapters/<name>/<version>/`: versions that never change, and the names that point at them.

    publish ─► staged ─► preflight ─► loaded ─► canary ─► candidate ─► live ─► draining ─► candidate
                  └──────────┴───────────┴─────────┴─► rejected              any but live ─► retired

A folder is published when its `card.json` exists; SQLite says where each version is in its life and which one a bare
name means. Readers see one immutable listing, so resolving a name touches neither disk nor database. Every step is
one transaction with its line in the audit, and an alias moves by compare-and-set on its revision.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from hybrid.adapters.adopt import copy_adapter
from hybrid.adapters.kinds import LORA, weights_of
from hybrid.adapters.listing import (
    MIX,
    SERVABLE,
    AdapterVersion,
    Alias,
    Listing,
    numbers_in,
    open_version,
    published_in,
)
from hybrid.adapters.preflight import check_files
from hybrid.engine import AdapterRef
from hybrid.errors import Conflict, ModelNotFound, Refused
from hybrid.rooms import CARD, Home, check_name, publish, sha256_file, sweep, write_json
from hybrid.state import State, aliases, audit, versions

#: the number is taken, the folder is not there yet
_RESERVED = "reserved"


class AdapterStore:
    """The adapters of one home.

    With `base_sha256` (the weights this server runs) versions whose card names another base are listed as rejected,
    without their stored state being touched: under their own base they serve again.
    """

    def __init__(self, home: Home, state: State, base_sha256: str = "") -> None:
        self._room = home.adapters
        self._state = state
        self._base = base_sha256
        self._listing = Listing()
        self._refreshing = threading.Lock()
        sweep(self._room)
        self.refresh()

    # --- reading ---------------------------------------------------------------------------------------------------

    def versions(self, name: str | None = None) -> list[AdapterVersion]:
        """The published versions (of one name), newest last; mixes are found by their name alone."""
        listing = self._listing.versions
        names = self.names() if name is None else [name]
        found = [version for each in names for version in listing.get(each, {}).values()]
        return sorted(found, key=lambda v: (v.created, v.name, v.version))

    def names(self) -> list[str]:
        """The names that have a version, in alphabetical order; that of mixes is not one of them."""
        return sorted(self._listing.versions.keys() - {MIX})

    def alias(self, name: str) -> int | None:
        """The version that the bare name means, if that one serves here."""
        alias = self._listing.aliases.get(name)
        target = self._listing.versions.get(name, {}).get(alias.version) if alias else None
        return target.version if target and target.state in SERVABLE else None

    def revision(self, name: str) -> int:
        """How often the alias has moved (0: there is none); what compare-and-set compares."""
        alias = self._listing.aliases.get(name)
        return alias.revision if alias else 0

    def resolve(self, spec: str) -> AdapterVersion:
        """The version that `name` or `name@3` means, in whatever state. Raises ModelNotFound. No I/O."""
        return self._listing.resolve(spec)

    def model(self, spec: str) -> AdapterVersion:
        """The same, of what the engine loads: another kind is no model, and the ModelNotFound says what it is."""
        return self._listing.model(spec)

    def head(self, spec: str) -> AdapterVersion:
        """The newest head under a name that may answer, or that of `name@3`. Raises ModelNotFound. No I/O."""
        return self._listing.head(spec)

    def desired(self, limit: int | None = None) -> list[AdapterRef]:
        """What the engine must hold, at most `limit`: alias targets, then what else serves, newest first."""
        served = [v for v in self.versions() if v.kind == LORA and v.state in SERVABLE]
        served.sort(key=lambda v: (self.alias(v.name) == v.version, v.created, v.version), reverse=True)
        return [v.ref for v in served[:limit]]

    # --- publishing ------------------------------------------------------------------------------------------------

    def publish(self, name: str, fill: Callable[[Path], dict[str, Any]]) -> AdapterVersion:
        """A new version of `name`, state "staged".

        `fill` writes a PEFT folder (or, for another kind, the file that the card's `weights` names) into the staging
        folder it is given and returns the card; name, version, sha256 and created are added here. Raises Refused for a
        bad name or a folder that is none; whatever `fill` raises comes through, and nothing is published.
        """
        return self._publish(check_name(name), fill)

    def publish_mix(self, fill: Callable[[Path], dict[str, Any]]) -> AdapterVersion:
        """The same for a mix, under the name that nothing else can have."""
        return self._publish(MIX, fill)

    def remove_mix(self, version: int) -> None:
        """Removes the files of a retired mix: its members are there, and it can be made again."""
        shutil.rmtree(self._room / MIX / str(version), ignore_errors=True)
        self.refresh()

    def _publish(self, name: str, fill: Callable[[Path], dict[str, Any]]) -> AdapterVersion:
        if (self._room / name).is_symlink():
            raise Refused(f"adapters/{name} is a symbolic link; adapters are kept in the home itself. Replace it.")
        version = self._reserve(name)
        try:
            with publish(self._room / name / str(version)) as staging:
                card = fill(staging)
                weights = weights_of(card)
                check_files(staging, weights)
                sha256 = sha256_file(staging / weights)
                facts = {"name": name, "version": version, "sha256": sha256, "created": round(time.time(), 3)}
                write_json(staging / CARD, {**card, **facts})
        except BaseException:
            self._release(name, version)
            raise
        self.refresh()
        return self.resolve(f"{name}@{version}")

    def adopt(self, name: str, folder: Path, inspect: Callable[[Path], None] = check_files) -> AdapterVersion:
        """Copies a foreign PEFT folder into a new version, after `inspect` (preflight's `check`) has seen the copy.

        Links, pickles and what is not a file are refused, sizes are capped, and only the files that serve are taken.
        Raises Refused.
        """

        def fill(staging: Path) -> dict[str, Any]:
            copy_adapter(folder, staging)
            inspect(staging)
            return {"method": "adopted"}

        return self.publish(name, fill)

    def _reserve(self, name: str) -> int:
        """Takes the next number in the database, so that two processes never stage the same version."""
        while True:
            known = max(numbers_in(self._room / name), default=0)
            try:
                with self._state.transaction() as connection:
                    used = connection.scalar(select(func.max(versions.c.version)).where(versions.c.name == name))
                    version = max(known, used or 0) + 1
                    row = {"name": name, "version": version, "state": _RESERVED, "sha256": ""}
                    connection.execute(insert(versions).values(row))
                return version
            except IntegrityError:
                continue  # another process took that number between the two statements

    def _release(self, name: str, version: int) -> None:
        with self._state.transaction() as connection:
            connection.execute(delete(versions).where(_is(name, version), versions.c.state == _RESERVED))

    # --- life ------------------------------------------------------------------------------------------------------

    def mark(self, id: str, state: str, reason: str = "", *, was: str | None = None) -> None:
        """Moves a version to `state`, from `was` if that is given. Raises Conflict when it is elsewhere or retired."""
        version = self.resolve(id)
        with self._state.transaction() as connection:
            origin = versions.c.state == was if was else versions.c.state != "retired"
            moved = _set_state(connection, version.name, version.version, state, reason, origin)
            if not moved:
                raise Conflict(f"{id} has changed meanwhile and cannot become {state}; look again and repeat.")
            self._state.write_audit(connection, state, name=version.name, version=version.version, reason=reason)
        self.refresh()

    def promote(self, name: str, version: int, *, revision: int | None = None) -> None:
        """Points `name` at `version`; the version that had it drains.

        `revision` is the alias's revision that the caller decided on (default: now). Raises ModelNotFound, and
        Conflict when the alias has moved since or the version has not passed its checks.
        """
        self._move(name, version, "promote", revision)

    def rollback(self, name: str, *, revision: int | None = None) -> int:
        """Points `name` back at the version that had it before, and returns it. Raises Conflict when there is none."""
        self.refresh()
        alias = self._listing.aliases.get(name)
        if alias is None:
            raise ModelNotFound(f"{name[:80]!r} points at no version; promote one first.", param="name")
        seen = alias.revision if revision is None else revision
        target = self._previous(name, alias.version)
        self._move(name, target, "rollback", seen)
        return target

    def retire(self, name: str, version: int) -> None:
        """Takes a version out of service; its files stay. Raises Conflict for the one that the bare name means,
        unless it is the last one that serves: then the name goes too."""
        self.refresh()
        target = self.resolve(f"{name}@{version}")
        adapters = [v.version for v in self.versions(name) if v.kind == LORA]
        with self._state.transaction() as connection:
            _set_state(connection, name, version, "retired", "", versions.c.state != _RESERVED)
            others = connection.scalar(
                select(func.count()).where(
                    versions.c.name == name, versions.c.state.in_(SERVABLE), versions.c.version.in_(adapters)
                )
            )
            pointed = and_(aliases.c.name == name, aliases.c.version == version)
            if others and connection.execute(select(aliases.c.version).where(pointed)).first():
                raise Conflict(f"{target.id} answers for {name!r}; promote another version or roll back first.")
            connection.execute(delete(aliases).where(pointed))
            self._state.write_audit(connection, "retire", name=name, version=version)
        self.refresh()

    def _move(self, name: str, version: int, verb: str, revision: int | None) -> None:
        """The one place where an alias changes: compare-and-set, the two states and the audit in one transaction."""
        self.refresh()
        target = self.resolve(f"{name}@{version}")
        alias = self._listing.aliases.get(name)
        seen = self.revision(name) if revision is None else revision
        previous = alias.version if alias else None
        if previous == version and seen == self.revision(name):
            return
        if target.kind != LORA:
            raise Conflict(f"{target.refusal} Only what the engine loads takes a name.")
        if target.state not in SERVABLE:
            raise Conflict(
                f"{target.id} is {target.state} and has not passed its checks{': ' if target.reason else ''}"
                f"{target.reason}; a running server checks it by itself."
            )
        detail = {"name": name, "version": version, "previous": previous, "revision": seen}
        try:
            with self._state.transaction() as connection:
                _point(connection, name, version, seen)
                if not _set_state(connection, name, version, "live", target.reason, versions.c.state.in_(SERVABLE)):
                    raise _Lost
                if previous is not None:
                    _set_state(connection, name, previous, "draining", "", versions.c.state == "live")
                self._state.write_audit(connection, verb, **detail)
        except (_Lost, IntegrityError) as error:
            with self._state.transaction() as connection:
                self._state.write_audit(connection, f"{verb} refused", **detail)
            raise Conflict(f"{name!r} has moved meanwhile; look where it points now, and repeat.") from error
        finally:
            self.refresh()

    def _previous(self, name: str, current: int) -> int:
        """The version that `name` meant before `current`, going back over those that no longer serve."""
        query = select(audit.c.detail).where(audit.c.what == "promote").order_by(audit.c.id)
        with self._state.transaction() as connection:
            moves = [detail for detail in connection.scalars(query) if detail["name"] == name]
        before = {move["version"]: move["previous"] for move in moves}  # the last promotion of a version counts
        seen = {current}
        while (version := before.get(current)) is not None and version not in seen:
            found = self._listing.versions.get(name, {}).get(version)
            if found and found.state in SERVABLE:
                return int(version)
            seen.add(version)
            current = version
        raise Conflict(f"{name!r} has no earlier version that still serves; promote one by its number.")

    # --- the listing -----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Reads the room and the database again; folders that the database does not know are registered as staged."""
        with self._refreshing:
            with self._state.transaction() as connection:
                rows = {(r.name, r.version): r for r in connection.execute(select(versions))}
                pointed = {r.name: Alias(r.version, r.revision) for r in connection.execute(select(aliases))}
            listed: dict[str, dict[int, AdapterVersion]] = {}
            for name, number in published_in(self._room):
                row = rows.get((name, number))
                listed.setdefault(name, {})[number] = self._entry(name, number, row)
            every = [version for numbers in listed.values() for version in numbers.values()]
            self._listing = Listing(listed, pointed, {v.tuned_as: v for v in every if v.tuned_as})

    def _entry(self, name: str, number: int, row: Any) -> AdapterVersion:
        if row is None or row.state == _RESERVED:
            version = open_version(self._room, name, number)
            self._register(version)
        else:
            cached = self._listing.versions.get(name, {}).get(number)
            version = replace(cached or open_version(self._room, name, number), state=row.state, reason=row.reason)
        return self._as_seen_here(version)

    def _register(self, version: AdapterVersion) -> None:
        row = {"state": version.state, "reason": version.reason, "sha256": version.ref.sha256, "updated": time.time()}
        is_it = _is(version.name, version.version)
        try:
            with self._state.transaction() as connection:
                reserved = update(versions).where(is_it, versions.c.state == _RESERVED).values(row)
                if not connection.execute(reserved).rowcount:
                    row |= {"name": version.name, "version": version.version}
                    connection.execute(insert(versions).values(row))
                detail = {"name": version.name, "version": version.version, "reason": version.reason}
                self._state.write_audit(connection, version.state, **detail)
        except IntegrityError:
            return  # another process registered it first, from the same card

    def _as_seen_here(self, version: AdapterVersion) -> AdapterVersion:
        base = version.card.get("base_sha256")
        if version.state in ("rejected", "retired") or not (self._base and base) or base == self._base:
            return version
        reason = "it was trained on another base model than the one served; train it again, or serve that base."
        return replace(version, state="rejected", reason=reason)


class _Lost(Exception):
    """The compare-and-set found another revision: the transaction rolls back."""


def _is(name: str, version: int) -> Any:
    return and_(versions.c.name == name, versions.c.version == version)


def _set_state(connection: Connection, name: str, version: int, state: str, reason: str, origin: Any) -> bool:
    """Whether the row was in `origin` and has moved."""
    values = {"state": state, "reason": reason, "updated": time.time()}
    return connection.execute(update(versions).where(_is(name, version), origin).values(values)).rowcount == 1


def _point(connection: Connection, name: str, version: int, seen: int) -> None:
    """Moves the alias from revision `seen` (0: it does not exist). Raises _Lost, IntegrityError."""
    if seen == 0:
        connection.execute(insert(aliases).values(name=name, version=version, revision=1))
        return
    unmoved = and_(aliases.c.name == name, aliases.c.revision == seen)
    if connection.execute(update(aliases).where(unmoved).values(version=version, revision=seen + 1)).rowcount != 1:
        raise _Lost
