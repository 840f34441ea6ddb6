"""The truth of one corpus: a SQLite file with its documents, its passages and their vectors.

What is committed here is acknowledged: it survives a crash and is found by the next search. The FAISS generations
beside it are a cache (`index.py`). Equal text is one row of `passages`, named by as many rows of `names` as there are
ids it came with; a search answers through `names`, so what is deleted here cannot be returned, whatever a cache holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, update

from hybrid.knowledge.chunk import Piece
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.faults import speak, spoken
from hybrid.knowledge.tables import SCHEMA, documents, meta, names, passages, schema
from hybrid.state import open_sqlite, upgrade
from hybrid.types import JSON, Passage

Rows = npt.NDArray[np.int64]

_IN = 10_000  # below SQLite's limit of parameters


@dataclass(frozen=True, slots=True)
class Meta:
    """The one row of `meta`."""

    revision: int
    generation: int
    manifest: str
    embedder: str
    digest: str
    dim: int


@dataclass(frozen=True, slots=True)
class About:
    """What a document carries besides its words: free attributes, whose it is, and which groups may read it."""

    attributes: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A document as it goes into the store: where it came from, the hash of what it says, and its pieces.

    `path` is the file it was read from, `bytes` the size of its text. Without `about` it keeps what it had.
    """

    id: str
    source: str
    title: str
    hash: str
    pieces: Sequence[Piece]
    path: str = ""
    bytes: int = 0
    about: About | None = None


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A document as it is listed; `at` is when it was last written (Unix seconds), `bytes` the size of its text."""

    id: str
    title: str
    source: str
    path: str
    hash: str
    at: float
    bytes: int
    passages: int
    about: About

    def wire(self) -> JSON:
        """The document as JSON."""
        row = asdict(self)
        return {**{key: value for key, value in row.items() if key != "about"}, **row["about"]}


def text_hash(text: str) -> str:
    """The key under which a passage's text is stored once."""
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """The SQLite file of one corpus. Reads need no lock; whoever writes holds the corpus's file lock.

    Every method raises StorageError where the disk is to blame.
    """

    def __init__(self, path: Path) -> None:
        with spoken(path):
            upgrade(path, schema, SCHEMA)
            self._engine = open_sqlite(path, schema)
        speak(self._engine, path)

    def meta(self) -> Meta | None:
        """The row of `meta`, or None before the first ingest."""
        columns = [c for c in meta.c if c is not meta.c.id]
        with self._engine.connect() as connection:
            row = connection.execute(select(*columns)).first()
        return Meta(*row) if row else None

    @contextmanager
    def change(self) -> Iterator[Change]:
        """One transaction of changes; it counts as a new revision. Committed on a clean exit."""
        with self._engine.begin() as connection:
            yield Change(connection)
            connection.execute(update(meta).values(revision=meta.c.revision + 1))

    def documents_known(self) -> dict[str, tuple[str, str, str]]:
        """By id, every document's (source, hash, path)."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(documents.c.id, documents.c.source, documents.c.hash, documents.c.path))
            return {row.id: (row.source, row.hash, row.path or row.id) for row in rows}

    def documents(self, only: str | None = None) -> list[DocumentInfo]:
        """Every document, by id; or `only` this one."""
        columns = [c for c in documents.c if c.name not in ("attributes", "owner", "groups")]
        counted = func.count(names.c.seq).label("passages")
        query = (
            select(*columns, counted, documents.c.attributes, documents.c.owner, documents.c.groups)
            .outerjoin(names, names.c.document == documents.c.id)
            .group_by(documents.c.id)
            .order_by(documents.c.id)
        )
        if only is not None:
            query = query.where(documents.c.id == only)
        with self._engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        abouts = [About(r.pop("attributes"), r.pop("owner"), tuple(r.pop("groups"))) for r in rows]
        return [DocumentInfo(**row, about=about) for row, about in zip(rows, abouts, strict=True)]

    def holdings(self) -> tuple[list[str], list[About], Rows, Rows]:
        """Every document and what it carries, then as pairs int64 [n] which of them names which passage's row."""
        columns = (documents.c.id, documents.c.attributes, documents.c.owner, documents.c.groups)
        with self._engine.connect() as connection:
            listed = connection.execute(select(*columns).order_by(documents.c.id)).all()
            place = {row.id: i for i, row in enumerate(listed)}
            named = connection.execute(select(names.c.document, names.c.passage))
            pairs = [(place[n.document], n.passage) for n in named if n.document in place]
        abouts = [About(row.attributes, row.owner, tuple(row.groups)) for row in listed]
        at, rows = np.array(pairs, np.int64).reshape(-1, 2).T
        return list(place), abouts, at, rows

    def size(self) -> int:
        """The bytes of all documents' texts."""
        with self._engine.connect() as connection:
            return int(connection.scalar(select(func.sum(documents.c.bytes))) or 0)

    def known(self, hashes: Sequence[str]) -> set[str]:
        """Those of `hashes` (of texts) that have a vector."""
        with self._engine.connect() as connection:
            return {
                str(row.hash)
                for part in _parts(hashes)
                for row in connection.execute(select(passages.c.hash).where(passages.c.hash.in_(part)))
            }

    def counts(self) -> tuple[int, int]:
        """How many passages and how many documents there are."""
        with self._engine.connect() as connection:
            counted = [connection.scalar(select(func.count()).select_from(t)) or 0 for t in (passages, documents)]
        return counted[0], counted[1]

    def rows(self) -> list[int]:
        """Every passage's row number, ascending."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(passages.c.row).order_by(passages.c.row)))

    def vectors(self, dim: int, *, after: int = 0, only: Sequence[int] | None = None) -> tuple[Rows, Vectors]:
        """(row numbers int64 [n], vectors float32 [n, dim]) of the passages after a row, or of `only` these."""
        query = select(passages.c.row, passages.c.vector).order_by(passages.c.row)
        with self._engine.connect() as connection:
            if only is None:
                found = connection.execute(query.where(passages.c.row > after)).all()
            else:
                found = [r for part in _parts(only) for r in connection.execute(query.where(passages.c.row.in_(part)))]
        matrix = np.frombuffer(b"".join(r.vector for r in found), np.float32).reshape(len(found), dim)
        return np.array([r.row for r in found], np.int64), matrix

    def passages(self, rows: Sequence[int]) -> dict[int, list[Passage]]:
        """By row number, the passage under each of its ids, the first one first. Rows that are gone are left out."""
        out: dict[int, list[Passage]] = {}
        with self._engine.connect() as connection:
            for part in _parts(rows):
                for r in connection.execute(_named().where(names.c.passage.in_(part))):
                    out.setdefault(r.row, []).append(Passage(r.id, r.title, r.text, document=r.document))
        return out

    def called(self, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """By each of these ids, the passage of that id or the pieces of that document, in their order."""
        out: dict[str, list[Passage]] = {}
        with self._engine.connect() as connection:
            for part in _parts(ids):
                for r in connection.execute(_named().where(names.c.id.in_(part) | names.c.document.in_(part))):
                    for key in {r.id, r.document} & set(part):
                        out.setdefault(key, []).append(Passage(r.id, r.title, r.text, document=r.document))
        return out

    def close(self) -> None:
        """Releases every connection."""
        self._engine.dispose()


class Change:
    """What can be done to a corpus inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def begin(self, embedder: str, digest: str, dim: int) -> None:
        """The row of `meta` of a corpus whose vectors this embedder makes; a row that exists keeps its counters."""
        values = {"embedder": embedder, "digest": digest, "dim": dim}
        if self._connection.execute(update(meta).values(**values)).rowcount == 0:
            self._connection.execute(insert(meta).values(id=1, revision=0, generation=0, manifest="", **values))

    def clear(self) -> None:
        """Takes every document away."""
        for table in (names, documents, passages):
            self._connection.execute(delete(table))

    def remove(self, ids: Iterable[str]) -> None:
        """Takes documents away with their ids; texts that no id names any more go at `sweep`."""
        for part in _parts(list(ids)):
            self._connection.execute(delete(documents).where(documents.c.id.in_(part)))

    def put(self, entries: Sequence[Entry], vectors: Mapping[str, Any]) -> None:
        """Adds documents or replaces them. `vectors` holds, by the hash of the text, those not stored yet."""
        before = self._abouts([entry.id for entry in entries])
        self.remove(entry.id for entry in entries)
        texts = {text_hash(p.text): p.text for entry in entries for p in entry.pieces}
        new = [{"hash": h, "text": texts[h], "vector": v.astype(np.float32).tobytes()} for h, v in vectors.items()]
        if new:
            self._connection.execute(insert(passages), new)
        rows: dict[str, int] = {}
        for part in _parts(list(texts)):
            found = self._connection.execute(select(passages.c.hash, passages.c.row).where(passages.c.hash.in_(part)))
            rows.update((str(r.hash), int(r.row)) for r in found)
        listed = [_document_row(e, e.about or before.get(e.id, About())) for e in entries]
        named = [line for entry in entries for line in _name_rows(entry, rows)]
        if listed:
            self._connection.execute(insert(documents), listed)
        if named:
            self._connection.execute(insert(names), named)

    def describe(self, document: str, about: About) -> None:
        """Changes what a document carries besides its words."""
        self._connection.execute(update(documents).where(documents.c.id == document).values(**_about_row(about)))

    def _abouts(self, ids: Sequence[str]) -> dict[str, About]:
        columns = (documents.c.id, documents.c.attributes, documents.c.owner, documents.c.groups)
        return {
            row.id: About(row.attributes, row.owner, tuple(row.groups))
            for part in _parts(ids)
            for row in self._connection.execute(select(*columns).where(documents.c.id.in_(part)))
        }

    def replace_vectors(self, vectors: Mapping[int, Any]) -> None:
        """Gives every passage a new vector, by row; the generations that hold the old ones are current no more."""
        rows = [{"at": row, "new": vector.astype(np.float32).tobytes()} for row, vector in vectors.items()]
        if rows:
            where = passages.c.row == bindparam("at")
            self._connection.execute(update(passages).where(where).values(vector=bindparam("new")), rows)
        self.flip(0, "")

    def sweep(self) -> None:
        """Forgets the texts that no document holds any more."""
        self._connection.execute(delete(passages).where(passages.c.row.not_in(select(names.c.passage))))

    def flip(self, generation: int, manifest: str) -> None:
        """Makes a published generation the current one; `manifest` is the SHA-256 of its manifest."""
        self._connection.execute(update(meta).values(generation=generation, manifest=manifest))


def _document_row(entry: Entry, about: About) -> dict[str, Any]:
    row = {key: getattr(entry, key) for key in ("id", "source", "title", "hash", "path", "bytes")}
    return row | _about_row(about)


def _about_row(about: About) -> dict[str, Any]:
    return {"attributes": dict(about.attributes), "owner": about.owner, "groups": list(about.groups)}


def _name_rows(entry: Entry, rows: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for k, piece in enumerate(entry.pieces):
        yield {
            "id": entry.id if len(entry.pieces) == 1 else f"{entry.id}#{k}",
            "document": entry.id,
            "passage": rows[text_hash(piece.text)],
            "title": piece.title,
            "start": piece.start,
            "end": piece.end,
        }


def _named() -> Select[Any]:
    joined = names.join(passages, names.c.passage == passages.c.row)
    columns = (passages.c.row, names.c.id, names.c.title, passages.c.text, names.c.document)
    return select(*columns).select_from(joined).order_by(names.c.seq)


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _IN):
        yield values[start : start + _IN]
