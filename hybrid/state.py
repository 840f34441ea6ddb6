"""What must not be lost: one SQLite file through SQLAlchemy, WAL with synchronous=FULL.

A committed transaction survives a power cut. Every statement is built from columns and bound parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

schema = MetaData()

#: `name` → the version that answers for it. One row moves in one transaction.
aliases = Table(
    "aliases", schema,
    Column("name", String, primary_key=True),
    Column("version", Integer, nullable=False),
    Column("revision", Integer, nullable=False, default=1),
)  # fmt: skip

#: every published adapter version and where it is in its life
versions = Table(
    "versions", schema,
    Column("name", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("state", String, nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("sha256", String, nullable=False),
    Column("updated", Float, nullable=False, default=time.time),
)  # fmt: skip

#: who changed what, in order
audit = Table(
    "audit", schema,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, default=time.time),
    Column("what", String, nullable=False),
    Column("detail", JSON, nullable=False),
)  # fmt: skip

decisions = Table(
    "decisions", schema,
    Column("id", String, primary_key=True),
    Column("at", Float, nullable=False, default=time.time, index=True),
    Column("caller", String, nullable=False),
    Column("record", JSON, nullable=False),
)  # fmt: skip

feedback = Table(
    "feedback", schema,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, default=time.time),
    Column("decision_id", String, nullable=False, index=True),
    Column("caller", String, nullable=False),
    Column("score", Float, nullable=False),
    Column("comment", Text, nullable=False, default=""),
)  # fmt: skip

keys = Table(
    "keys", schema,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("hash", String, nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created", Float, nullable=False, default=time.time),
    Column("revoked", Float),
)  # fmt: skip

jobs = Table(
    "jobs", schema,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("status", String, nullable=False),
    Column("progress", JSON, nullable=False, default=dict),
    Column("error", Text, nullable=False, default=""),
    Column("created", Float, nullable=False, default=time.time),
    Column("updated", Float, nullable=False, default=time.time),
)  # fmt: skip


def open_sqlite(path: Path, tables: MetaData) -> Engine:
    """An engine on `path` with our pragmas; the folder and the tables are made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    tables.create_all(engine)
    return engine


class State:
    """The control database of one home."""

    def __init__(self, path: Path) -> None:
        self._engine = open_sqlite(path, schema)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction: committed on a clean exit, rolled back on an exception."""
        with self._engine.begin() as connection:
            yield connection

    def write_audit(self, connection: Connection, what: str, **detail: Any) -> None:
        """Adds a line to the audit inside the caller's transaction."""
        connection.execute(insert(audit).values(what=what, detail=detail))

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        """The stored record of a decision with its `caller`, or None."""
        with self._engine.connect() as connection:
            row = connection.execute(select(decisions).where(decisions.c.id == decision_id)).mappings().first()
        return dict(row) if row else None

    def add_decisions(self, rows: list[dict[str, Any]]) -> None:
        """Stores decision records, many in one transaction (the gateway writes them behind the answer)."""
        if rows:
            with self._engine.begin() as connection:
                connection.execute(insert(decisions), rows)

    def add_feedback(self, **row: Any) -> None:
        """Stores one feedback row."""
        with self._engine.begin() as connection:
            connection.execute(insert(feedback).values(**row))

    def put_job(self, job_id: str, **values: Any) -> None:
        """Writes a job's row, new or not; `updated` is set here."""
        row = {"id": job_id, "updated": time.time(), **values}
        statement = sqlite_insert(jobs).values(**row)
        with self._engine.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=row))

    def jobs(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest jobs, newest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(jobs).order_by(jobs.c.created.desc()).limit(limit)).mappings()
            return [dict(row) for row in rows]

    def close(self) -> None:
        """Releases every connection."""
        self._engine.dispose()
