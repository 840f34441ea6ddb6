"""The vectors of corpora in PostgreSQL, searched by its extension pgvector: for corpora that outgrow one memory.

The store stays the truth, and the generation's folder still holds the index of words; the vectors are published to a
table of their own. A row of it is seen by the generations from `born` on and before `died`, so that who reads one
generation never sees half of the next. A publication is one transaction; doing it again does nothing twice. Each
generation bears a random mark, which stands in the generation's manifest too: tables that were restored from an older
backup, or belong to a copy of this home, are noticed by it, and filled anew from the store.

The graph is HNSW (Malkov & Yashunin 2016, arXiv 1603.09320).
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid.errors import HybridError, Refused
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.pg_link import Link
from hybrid.knowledge.store import Rows
from hybrid.rooms import write_json
from hybrid.types import JSON

if TYPE_CHECKING:
    from psycopg import Cursor
    from psycopg.sql import Composed

log = logging.getLogger("hybrid.knowledge")

#: the tables that were made for a corpus: a file of its folder
TABLES = "store.pgvector.json"
#: pgvector builds no graph over longer vectors
GRAPH_DIM = 2000
#: so few allowed rows are looked at one by one
FEW = 10_000
#: vectors sent at once
PART = 4096
_ALIVE = 2**63 - 1
#: any number that nobody else locks: two processes must not create the same thing at once
_LOCK = 4_711_003_817
_TABLE = re.compile(r"hybrid_[0-9a-f]{16}")

_REGISTER = """
CREATE TABLE IF NOT EXISTS hybrid_generations (
  place text, generation bigint, mark text NOT NULL, passages bigint NOT NULL, PRIMARY KEY (place, generation)
)"""
_MADE = """
CREATE TABLE {table} (
  passage bigint, born bigint, died bigint NOT NULL DEFAULT {alive}, embedding vector({dim}) NOT NULL,
  PRIMARY KEY (passage, born)
)"""
_BY_BIRTH = "CREATE INDEX ON {table} (born)"
_BY_DEATH = "CREATE INDEX ON {table} (died) WHERE died < {alive}"
_GRAPH = "CREATE INDEX IF NOT EXISTS {graph} ON {table} USING hnsw (embedding vector_ip_ops)"
_LOADED = "COPY {table} (passage, born, embedding) FROM STDIN (FORMAT BINARY)"
_DIED = "UPDATE {table} SET died = %s::bigint WHERE passage = ANY(%s::bigint[]) AND died = {alive}"
_NEAREST = """
SELECT passage, -(embedding <#> %(vector)s::vector) FROM {table}
WHERE born <= %(generation)s AND died > %(generation)s{among}
ORDER BY embedding <#> %(vector)s::vector{ties} LIMIT %(k)s"""

#: fetches the vectors of rows: (row numbers int64 [m], vectors float32 [m, dim])
Fetch = Callable[[Sequence[int]], tuple[Rows, Vectors]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one generation lies in the engine; it stands in the generation's manifest."""

    table: str
    generation: int
    mark: str
    dim: int

    @classmethod
    def read(cls, facts: JSON) -> Place:
        """What a manifest says. Raises KeyError or ValueError for what `publish` did not write."""
        table = str(facts["table"])
        if not _TABLE.fullmatch(table):
            raise ValueError(f"no table of ours is named {table[:80]!r}")
        return cls(table, int(facts["generation"]), str(facts["mark"]), int(facts["dim"]))


@dataclass(frozen=True, eq=False, slots=True)
class PgIndex:
    """One published generation: `rows` int64 [n] ascending, whose vectors the engine holds."""

    link: Link
    place: Place
    rows: Rows
    graph: bool

    def nearest(self, vector: Vectors, k: int, only: Rows | None = None) -> list[tuple[int, float]]:
        """The `k` rows of the highest inner product with `vector` [d], best first; with `only` (int64, ascending) no
        others are ranked. Raises NotReady while the engine does not answer, Refused when it lost the generation.
        """
        k = min(k, len(self.rows) if only is None else len(only))
        if not k:
            return []
        exact = not self.graph or (only is not None and len(only) <= FEW)
        found = self.link.ask(lambda cursor: self._asked(cursor, vector, k, only, exact))
        if not exact and len(found) < k:  # most of what the graph led to may not be seen
            found = self.link.ask(lambda cursor: self._asked(cursor, vector, k, only, True))
        return found

    def check(self) -> None:
        """Raises Refused when the engine lost the generation, NotReady while it does not answer."""
        self.link.ask(self._there)

    def _there(self, cursor: Cursor[Any]) -> None:
        _stands(cursor, self.place)
        cursor.execute(_sql("SELECT 1 FROM {table} LIMIT 1", self.place.table))

    def _asked(
        self, cursor: Cursor[Any], vector: Vectors, k: int, only: Rows | None, exact: bool
    ) -> list[tuple[int, float]]:
        _stands(cursor, self.place)
        # a graph is an index that is walked: without such walks the planner reads and sorts
        walks, reach = "off" if exact else "on", str(min(max(2 * k, 100), 1000))
        cursor.execute(
            "SELECT set_config('enable_indexscan', %s, true), set_config('hnsw.ef_search', %s, true)", [walks, reach]
        )
        among, allowed = _among(only)
        query = _sql(_NEAREST, self.place.table, among=among, ties=", passage" if exact else "")
        told = {"vector": str(vector.tolist()), "generation": self.place.generation, "k": k, "allowed": allowed}
        cursor.execute(query, told)
        return sorted(((int(row), float(score)) for row, score in cursor), key=lambda hit: (-hit[1], hit[0]))


class PgEngine:
    """A PostgreSQL with pgvector that holds the vectors of corpora, those of more than `exact_up_to` passages in a
    graph. Raises SetupError for an address that is none."""

    def __init__(self, url: str, exact_up_to: int) -> None:
        self._link = Link(url)
        self._exact_up_to = exact_up_to

    @property
    def name(self) -> str:
        """The engine and where it is, as it may be shown to who owns it."""
        return self._link.name

    @property
    def trouble(self) -> str:
        """Why it is not asked at this moment; empty while it answers."""
        return self._link.trouble

    def probe(self) -> None:
        """Looks whether it answers."""
        self._link.probe()

    def close(self) -> None:
        """Releases every connection."""
        self._link.close()

    def open(self, place: Place, rows: Rows) -> PgIndex:
        """A published generation; the engine is not asked yet."""
        return PgIndex(self._link, place, rows, self._graphed(len(rows), place.dim))

    def publish(self, folder: Path, before: PgIndex | None, number: int, dim: int, rows: Rows, fetch: Fetch) -> Place:
        """Makes `rows` int64 [n] generation `number` of the corpus in `folder`, all or nothing: the one `before` it
        less what went and with what came, or all of them in a new table where the engine does not hold that one.

        Raises NotReady while the engine does not answer.
        """
        if before is not None and not self._usable(before, dim):
            before = None
        if before is None:
            self._link.write(_prepared)
        table = before.place.table if before else _new_table(folder)
        place = Place(table, number, secrets.token_hex(16), dim)
        self._link.write(lambda cursor: self._published(cursor, place, before, rows, fetch))
        return place

    def tidy(self, folder: Path, keep: str = "") -> None:
        """Drops the tables of a corpus but the one named; what cannot be dropped now is kept in mind."""
        gone = [table for table in _tables(folder) if table != keep]
        if not gone:
            return

        def dropped(cursor: Cursor[Any]) -> None:
            for table in gone:
                cursor.execute(_sql("DROP TABLE IF EXISTS {table}", table))
            cursor.execute("DELETE FROM hybrid_generations WHERE place = ANY(%s)", [gone])

        try:
            self._link.write(dropped)
        except HybridError as error:
            log.warning("%s still holds %s, which nobody needs: %s", self.name, ", ".join(gone), error.message)
            return
        write_json(folder / TABLES, {"tables": [keep] if keep else []})

    def _usable(self, before: PgIndex, dim: int) -> bool:
        if before.place.dim != dim:
            return False
        with contextlib.suppress(Refused):
            before.check()
            return True
        return False

    def _published(self, cursor: Cursor[Any], place: Place, before: PgIndex | None, rows: Rows, fetch: Fetch) -> None:
        held = np.empty(0, np.int64) if before is None else before.rows
        added, gone = np.setdiff1d(rows, held), np.setdiff1d(held, rows)
        if before is None:
            _made(cursor, place)
        else:
            _taken_back(cursor, place.table, before.place.generation)
        for part in _parts(added):
            with cursor.copy(_sql(_LOADED, place.table)) as copy:
                copy.write(_packed(*fetch(part.tolist()), born=place.generation))
        died = _sql(_DIED, place.table)
        for part in _parts(gone):
            cursor.execute(died, [place.generation, part.tolist()])
        if before is not None:
            cursor.execute(_sql("DELETE FROM {table} WHERE died <= %s::bigint", place.table), [before.place.generation])
        _registered(cursor, place, len(rows), before)
        if self._graphed(len(rows), place.dim):
            cursor.execute(_sql(_GRAPH, place.table))
        if len(added) > len(rows) // 10:
            cursor.execute(_sql("ANALYZE {table}", place.table))

    def _graphed(self, passages: int, dim: int) -> bool:
        return passages > self._exact_up_to and dim <= GRAPH_DIM


def _prepared(cursor: Cursor[Any]) -> None:
    """What all tables need."""
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
    cursor.execute("CREATE EXTENSION IF NOT EXISTS vector")
    cursor.execute(_REGISTER)


def _made(cursor: Cursor[Any], place: Place) -> None:
    """A new table."""
    cursor.execute(_sql("DROP TABLE IF EXISTS {table}", place.table))  # of an attempt whose end was not heard
    cursor.execute(_sql(_MADE, place.table, dim=str(place.dim)))
    cursor.execute(_sql(_BY_BIRTH, place.table))
    cursor.execute(_sql(_BY_DEATH, place.table))


def _taken_back(cursor: Cursor[Any], table: str, generation: int) -> None:
    """Undoes what was published after `generation` and never became current: its publisher was killed."""
    cursor.execute(_sql("DELETE FROM {table} WHERE born > %s::bigint", table), [generation])
    alive = _sql("UPDATE {table} SET died = {alive} WHERE died > %s::bigint AND died < {alive}", table)
    cursor.execute(alive, [generation])


def _registered(cursor: Cursor[Any], place: Place, passages: int, before: PgIndex | None) -> None:
    """Lets readers find the generation, and the one before it."""
    kept = before.place.generation if before else 0
    cursor.execute("DELETE FROM hybrid_generations WHERE place = %s AND generation <> %s", [place.table, kept])
    cursor.execute(
        "INSERT INTO hybrid_generations (place, generation, mark, passages) VALUES (%s, %s, %s, %s)",
        [place.table, place.generation, place.mark, passages],
    )


def _stands(cursor: Cursor[Any], place: Place) -> None:
    """Raises Refused unless the engine holds the generation."""
    cursor.execute(
        "SELECT 1 FROM hybrid_generations WHERE place = %s AND generation = %s AND mark = %s",
        [place.table, place.generation, place.mark],
    )
    if cursor.fetchone() is None:
        raise Refused("The vector engine does not hold what was published to it.")


def _sql(text: str, table: str, **parts: str) -> Composed:
    """A statement about a table. `parts` are words of this file and numbers, never a caller's."""
    from psycopg import sql

    names = {"table": sql.Identifier(table), "graph": sql.Identifier(f"{table}_graph"), "alive": sql.Literal(_ALIVE)}
    return sql.SQL(text).format(**names, **{key: sql.SQL(part) for key, part in parts.items()})


def _among(only: Rows | None) -> tuple[str, Any]:
    """(what a statement says, its value) of the rows that may be ranked: a list where they are few and the key finds
    them, else the runs that they come in, which stay short however many they are."""
    if only is None:
        return "", None
    if len(only) <= FEW:
        return " AND passage = ANY(%(allowed)s::bigint[])", only.tolist()
    return " AND passage <@ %(allowed)s::int8multirange", _runs(only)


def _runs(rows: Rows) -> str:
    """Row numbers, ascending, as PostgreSQL's multirange of the runs that they come in."""
    breaks = np.flatnonzero(np.diff(rows) != 1)
    first, last = rows[np.append(0, breaks + 1)], rows[np.append(breaks, len(rows) - 1)]
    return "{" + ",".join(f"[{a},{b}]" for a, b in zip(first.tolist(), last.tolist(), strict=True)) + "}"


def _packed(rows: Rows, vectors: Vectors, *, born: int) -> bytes:
    """Rows in PostgreSQL's binary COPY format (its documentation, "COPY", "Binary Format"); a vector is its length and
    two bytes of nothing, then its numbers."""
    dim = vectors.shape[1]
    fields: list[Any] = [
        ("fields", ">i2"),
        ("row_bytes", ">i4"),
        ("row", ">i8"),
        ("born_bytes", ">i4"),
        ("born", ">i8"),
    ]
    vector: list[Any] = [("vector_bytes", ">i4"), ("dim", ">i2"), ("unused", ">i2"), ("vector", ">f4", (dim,))]
    lines = np.zeros(len(rows), np.dtype([*fields, *vector]))
    lines["fields"], lines["row_bytes"], lines["born_bytes"], lines["vector_bytes"] = 3, 8, 8, 4 + 4 * dim
    lines["row"], lines["born"], lines["dim"], lines["vector"] = rows, born, dim, vectors
    return b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0) + lines.tobytes() + struct.pack(">h", -1)


def _parts(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows), PART):
        yield rows[start : start + PART]


def _new_table(folder: Path) -> str:
    """A name for a new table, written down before the table is made: nothing stays behind unknown."""
    table = f"hybrid_{secrets.token_hex(8)}"
    write_json(folder / TABLES, {"tables": [*_tables(folder), table]})
    return table


def _tables(folder: Path) -> list[str]:
    """The tables that were made for a corpus."""
    try:
        told = json.loads((folder / TABLES).read_text(encoding="utf-8"))["tables"]
        return [table for table in map(str, told) if _TABLE.fullmatch(table)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
