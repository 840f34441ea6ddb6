"""What must not be lost: one SQLite file through SQLAlchemy, WAL with synchronous=FULL.

A committed transaction survives a power cut. Every statement is built from columns and bound parameters. The file
knows its schema's number (`PRAGMA user_version`): an older one is backed up beside itself and gets what it lacks, a
newer one is refused.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.schema import CreateColumn, Index

from hybrid.errors import SetupError

#: the number of this schema; the first one was written without a number
SCHEMA = 4

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
    Column("vector", LargeBinary),
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
    Column("groups", JSON, nullable=False, server_default="[]"),  # whose corpora and documents it sees
    Column("arms", JSON),  # what it may ask; without any, everything
)  # fmt: skip

#: background work; `wanted` (run, pause, cancel) is what was asked of it, `status` what it came to
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
    Column("caller", String, nullable=False, server_default="local"),
    Column("idempotency_key", String),
    Column("wanted", String, nullable=False, server_default="run"),
    Column("result", JSON),
    Column("error_code", String),
    Column("error_param", String),
    Column("started", Float),
    Column("finished", Float),
    Column("pid", Integer),
)  # fmt: skip
#: a request that is sent twice makes one job; an index, so that an older table can get it too
Index("jobs_once", jobs.c.caller, jobs.c.idempotency_key, unique=True)

job_events = Table(
    "job_events", schema,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("at", Float, nullable=False, default=time.time),
    Column("level", String, nullable=False, default="info"),
    Column("type", String, nullable=False, default="message"),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False, default=dict),
)  # fmt: skip

job_checkpoints = Table(
    "job_checkpoints", schema,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", Integer, nullable=False),
    Column("at", Float, nullable=False, default=time.time),
    Column("path", String, nullable=False),
    Column("metrics", JSON, nullable=False),
    UniqueConstraint("job", "step"),
)  # fmt: skip

#: uploads and results; the bytes are `.hybrid/files/<id>`
files = Table(
    "files", schema,
    Column("id", String, primary_key=True),
    Column("caller", String, nullable=False, index=True),
    Column("filename", String, nullable=False),
    Column("purpose", String, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("sha256", String, nullable=False),
    Column("status", String, nullable=False, default="processed"),
    Column("created", Float, nullable=False, default=time.time),
)  # fmt: skip

#: corpora as the API names them: an id for ever, whose it is, and what was noted; the passages are the corpus's own
corpora = Table(
    "corpora", schema,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("owner", String, nullable=False, default=""),
    Column("groups", JSON, nullable=False, default=list),
    Column("made_here", Boolean, nullable=False, default=False),  # through the API: it may be empty
    Column("notes", JSON, nullable=False, default=dict),
    Column("description", Text, nullable=False, default=""),
    Column("created", Float, nullable=False, default=time.time),
    Column("active", Float, nullable=False, default=time.time),
    Column("days", Integer),  # it expires so long after it was last used
    Column("expired", Boolean, nullable=False, default=False),
)  # fmt: skip

#: files put into a corpus through the API, in order; a document of the same id holds what was read of one
corpus_files = Table(
    "corpus_files", schema,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("corpus", String, ForeignKey("corpora.id", ondelete="CASCADE"), nullable=False),
    Column("file", String, nullable=False, index=True),
    Column("caller", String, nullable=False),
    Column("filename", String, nullable=False),
    Column("status", String, nullable=False, index=True),
    Column("error_code", String),
    Column("error", Text),
    Column("attributes", JSON, nullable=False, default=dict),
    Column("groups", JSON, nullable=False, default=list),
    Column("chunking", JSON),
    Column("bytes", Integer, nullable=False, default=0),
    Column("tries", Integer, nullable=False, default=0),
    Column("batch", String, index=True),
    Column("created", Float, nullable=False, default=time.time),
    UniqueConstraint("corpus", "file"),
)  # fmt: skip

corpus_batches = Table(
    "corpus_batches", schema,
    Column("id", String, primary_key=True),
    Column("corpus", String, ForeignKey("corpora.id", ondelete="CASCADE"), nullable=False),
    Column("created", Float, nullable=False, default=time.time),
    Column("cancelled", Boolean, nullable=False, default=False),
)  # fmt: skip

#: what a version (`name@version`) was measured to be worth
measurements = Table(
    "measurements", schema,
    Column("id", String, primary_key=True),
    Column("at", Float, nullable=False, default=time.time),
    Column("record", JSON, nullable=False),
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


def upgrade(path: Path, tables: MetaData, newest: int) -> None:
    """Brings the database at `path` to the schema `newest`; what it held before is kept beside it as `state.v1.db`.

    Raises SetupError for one that a newer hybrid wrote: reading it as ours could lose what we do not know of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".upgrade.lock")), closing(sqlite3.connect(path, timeout=30)) as old:
        number = int(old.execute("PRAGMA user_version").fetchone()[0])
        if number > newest:
            raise SetupError(
                f"{path} was written by a newer hybrid (schema {number}; this one knows {newest}). "
                f"Install that version again, or put back the copy {path.stem}.v{newest}.db that it kept."
            )
        if number == newest:
            return
        if old.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with closing(sqlite3.connect(path.with_name(f"{path.stem}.v{number or 1}.db"))) as copy:
                old.backup(copy)
        engine = open_sqlite(path, tables)
        _add_columns(engine, tables)
        engine.dispose()
        old.execute(f"PRAGMA user_version = {newest}")


def _add_columns(engine: Engine, tables: MetaData) -> None:
    """What the tables lack: columns (each is nullable or has a default of the server's), then indexes over them."""
    for table in tables.sorted_tables:
        there = {column["name"] for column in inspect(engine).get_columns(table.name)}
        with engine.begin() as connection:
            for column in table.columns:
                if column.name not in there:
                    told = CreateColumn(column).compile(dialect=engine.dialect)
                    connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {told}")
            for index in table.indexes:
                index.create(connection, checkfirst=True)


class State:
    """The control database of one home. Raises SetupError when a newer hybrid wrote it."""

    def __init__(self, path: Path) -> None:
        upgrade(path, schema, SCHEMA)
        self._engine = open_sqlite(path, schema)
        self._glance = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
        self._glancing = threading.Lock()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction: committed on a clean exit, rolled back on an exception."""
        with self._engine.begin() as connection:
            yield connection

    def stamp(self) -> int:
        """A number that differs after every commit, by whatever process: what was read before it may be old.

        It costs microseconds (SQLite's `data_version`, which each connection sees of the commits of all others; this
        one never writes).
        """
        with self._glancing:
            return int(self._glance.execute("PRAGMA data_version").fetchone()[0])

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

    def traffic(self, since: float, until: float, but: str) -> list[dict[str, Any]]:
        """`{"id", "arm", "vector", "score"}` of the decisions of a time with a vector, of every caller `but` one.

        `score` is the mean of the feedback that a decision got, or None.
        """
        score = func.avg(feedback.c.score).label("score")
        arm = decisions.c.record["arm"].as_string().label("arm")
        query = (
            select(decisions.c.id, arm, decisions.c.vector, score)
            .outerjoin(feedback, feedback.c.decision_id == decisions.c.id)
            .where(decisions.c.at >= since, decisions.c.at < until, decisions.c.caller != but)
            .where(decisions.c.vector.is_not(None))
            .group_by(decisions.c.id)
            .order_by(decisions.c.at)
        )
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

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

    def jobs(self, limit: int = 50, caller: str | None = None) -> list[dict[str, Any]]:
        """The newest jobs, newest first, of one caller or of all: therefore only their names of what was asked."""
        shown = (jobs.c.id, jobs.c.kind, jobs.c.status, jobs.c.progress, jobs.c.error, jobs.c.created, jobs.c.updated)
        query = select(*shown, jobs.c.spec).order_by(jobs.c.created.desc()).limit(limit)
        query = query if caller is None else query.where(jobs.c.caller == caller)
        with self._engine.connect() as connection:
            return [
                {**row, "spec": {"name": row["spec"].get("name", "")}} for row in connection.execute(query).mappings()
            ]

    def put_measurement(self, version_id: str, record: dict[str, Any]) -> None:
        """Stores what a version was measured to be worth, in place of what was known."""
        row = {"id": version_id, "record": record, "at": time.time()}
        statement = sqlite_insert(measurements).values(**row)
        with self._engine.begin() as connection:
            connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_=row))

    def measurements(self) -> dict[str, dict[str, Any]]:
        """The record of every version that was measured, by `name@version`."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(measurements.c.id, measurements.c.record))
            return {row.id: row.record for row in rows}

    def close(self) -> None:
        """Releases every connection."""
        self._glance.close()
        self._engine.dispose()
