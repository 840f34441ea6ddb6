"""The truth of one corpus: a SQLite file with its documents, its passages and their vectors.

What is committed here is acknowledged: it survives a crash and is found by the next search. The FAISS generations
beside it are a cache (`index.py`). Equal text is one row of `passages`, named by as many rows of `names` as there are
ids it came with; a search answers through `names`, so what is deleted here cannot be returned, whatever a cache holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Select, String, bindparam, delete, func, insert, select, type_coerce, update

from hybrid.knowledge.chunk import Piece
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.faults import speak, spoken
from hybrid.knowledge.tables import SCHEMA, documents, meta, names, passages, schema, waiting
from hybrid.state import open_sqlite, upgrade
from hybrid.types import JSON
from hybrid.types.passage import Passage

Rows = npt.NDArray[np.int64]
T = TypeVar("T", bound=Hashable)

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


@dataclass(frozen=True, eq=False, slots=True)
class Holdings:
    """What a corpus holds at one moment. `door` and `kind` int64 [documents] say which of the `doors` (owner, groups)
    and which of the `attributes` a document has, `at` and `rows` int64 [pairs], by row, which document names which
    passage."""

    place: Mapping[str, int]
    doors: Sequence[tuple[str, tuple[str, ...]]]
    door: Rows
    attributes: Sequence[Mapping[str, Any]]
    kind: Rows
    at: Rows
    rows: Rows


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
        with self._engine.connect() as connection:
            row = connection.execute(_META).first()
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

    def holdings(self) -> Holdings:
        """Every document, what it carries, and which passages it names."""
        texts = [type_coerce(c, String).label(c.name) for c in (documents.c.attributes, documents.c.groups)]
        with self._engine.connect() as connection:
            listed = connection.execute(select(documents.c.id, documents.c.owner, *texts)).all()
            named = connection.execute(select(names.c.document, names.c.passage)).all()
        place = {row[0]: i for i, row in enumerate(listed)}
        pairs = [(place[document], passage) for document, passage in named if document in place]
        at, rows = np.array(pairs, np.int64).reshape(-1, 2).T
        order = np.argsort(rows, kind="stable")
        door, doors = _numbered([(row[1], row[3]) for row in listed])
        kind, kinds = _numbered([row[2] for row in listed])
        return Holdings(
            place=place,
            doors=[(owner, tuple(json.loads(groups))) for owner, groups in doors],
            door=door,
            attributes=[json.loads(text) for text in kinds],
            kind=kind,
            at=at[order],
            rows=rows[order],
        )

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

    def rows(self, after: int = 0) -> list[int]:
        """The row number of every passage, or of those after a row, ascending.

        Every passage has a name, and the index of names is a hundredth of what the passages take on disk.
        """
        query = select(names.c.passage).where(names.c.passage > after).distinct().order_by(names.c.passage)
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def waiting(self) -> list[int]:
        """The rows of the passages whose vector is still to be made, ascending."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(waiting.c.passage).order_by(waiting.c.passage)))

    def is_waiting(self) -> bool:
        """Whether a vector is still to be made."""
        with self._engine.connect() as connection:
            return connection.scalar(select(waiting.c.passage).limit(1)) is not None

    def vectors(self, dim: int, *, after: int = 0, only: Sequence[int] | None = None) -> tuple[Rows, Vectors]:
        """(row numbers int64 [n], vectors float32 [n, dim]) of the passages after a row, or of `only` these. One whose
        vector is still to be made is left out."""
        there = func.length(passages.c.vector) > 0
        query = select(passages.c.row, passages.c.vector).where(there).order_by(passages.c.row)
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
                for row, id, title, text, document in connection.execute(_OF_ROWS, {"rows": part}):
                    out.setdefault(row, []).append(Passage(id, title, text, document=document))
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
        self._loose: set[int] = set()  # rows that lost a name in this transaction

    def begin(self, embedder: str, digest: str, dim: int) -> None:
        """The row of `meta` of a corpus whose vectors this embedder makes; a row that exists keeps its counters."""
        values = {"embedder": embedder, "digest": digest, "dim": dim}
        if self._connection.execute(update(meta).values(**values)).rowcount == 0:
            self._connection.execute(insert(meta).values(id=1, revision=0, generation=0, manifest="", **values))

    def remove(self, ids: Iterable[str]) -> None:
        """Takes documents away with their ids; texts that no id names any more go at `sweep`."""
        for part in _parts(list(ids)):
            named = select(names.c.passage).where(names.c.document.in_(part))
            self._loose.update(self._connection.scalars(named))
            self._connection.execute(delete(documents).where(documents.c.id.in_(part)))

    def put(self, entries: Sequence[Entry], vectors: Mapping[str, Any]) -> None:
        """Adds documents or replaces them. `vectors` holds, by the hash of the text, those not stored yet; with None
        the text waits for its vector."""
        before = self._abouts([entry.id for entry in entries])
        self.remove(entry.id for entry in entries)
        texts = {text_hash(p.text): p.text for entry in entries for p in entry.pieces}
        new = [{"hash": h, "text": texts[h], "vector": _bytes(v)} for h, v in vectors.items()]
        if new:
            self._connection.execute(insert(passages), new)
        rows: dict[str, int] = {}
        for part in _parts(list(texts)):
            found = self._connection.execute(select(passages.c.hash, passages.c.row).where(passages.c.hash.in_(part)))
            rows.update((str(r.hash), int(r.row)) for r in found)
        late = [{"passage": rows[h]} for h, v in vectors.items() if v is None]
        listed = [_document_row(e, e.about or before.get(e.id, About())) for e in entries]
        named = [line for entry in entries for line in _name_rows(entry, rows)]
        for table, lines in ((waiting, late), (documents, listed), (names, named)):
            if lines:
                self._connection.execute(insert(table), lines)

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
        self.fill(vectors)
        self._connection.execute(delete(waiting))
        self.flip(0, "")

    def fill(self, vectors: Mapping[int, Any]) -> None:
        """Writes the vectors of passages, by row; they wait no more."""
        rows = [{"at": row, "new": _bytes(vector)} for row, vector in vectors.items()]
        if rows:
            where = passages.c.row == bindparam("at")
            self._connection.execute(update(passages).where(where).values(vector=bindparam("new")), rows)
        for part in _parts(list(vectors)):
            self._connection.execute(delete(waiting).where(waiting.c.passage.in_(part)))

    def sweep(self) -> None:
        """Forgets the texts that lost a name in this transaction and have no other."""
        for part in _parts(sorted(self._loose)):
            named = select(names.c.passage).where(names.c.passage.in_(part))
            nameless = passages.c.row.in_(part) & passages.c.row.not_in(named)
            self._connection.execute(delete(passages).where(nameless))

    def flip(self, generation: int, manifest: str) -> None:
        """Makes a published generation the current one; `manifest` is the SHA-256 of its manifest."""
        self._connection.execute(update(meta).values(generation=generation, manifest=manifest))


def _numbered(values: Sequence[T]) -> tuple[Rows, list[T]]:
    """Which of the distinct values each is, int64 [n], and those in the order they came."""
    numbers: dict[T, int] = {}
    which = [numbers.setdefault(value, len(numbers)) for value in values]
    return np.array(which, np.int64), list(numbers)


def _bytes(vector: Vectors | None) -> bytes:
    """A vector as it is stored; no bytes where it is still to be made."""
    return b"" if vector is None else vector.astype(np.float32).tobytes()


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


#: built once: every search reads them, and building a statement takes longer than running it
_META = select(*(c for c in meta.c if c is not meta.c.id))
_OF_ROWS = _named().where(names.c.passage.in_(bindparam("rows", expanding=True)))


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _IN):
        yield values[start : start + _IN]
