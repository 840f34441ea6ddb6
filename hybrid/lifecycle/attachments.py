"""Files in corpora: what was asked to be put there, how far that is, and what came of it.

A row is written before the request is answered, so that a crash forgets nothing: what was `in_progress` is begun
again. Once a file is `completed`, the document in the corpus is the truth; what `hybrid index` read is listed with it.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from hybrid.errors import NotFound
from hybrid.knowledge.store import About, DocumentInfo
from hybrid.lifecycle.corpora import Corpora
from hybrid.state import State
from hybrid.state import corpus_batches as batches
from hybrid.state import corpus_files as table
from hybrid.types import JSON
from hybrid.types.rights import Rights

STATUSES = ("in_progress", "completed", "failed", "cancelled")
#: a file that a crash met so often is given up
MAX_TRIES = 3
#: a file whose documents are being taken away; a crash does not stop it
_DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to be put into a corpus. `groups` alone, and its caller, may read it where any are named."""

    file: str
    filename: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[str] = ()
    chunking: JSON | None = None


class Attachments:
    """The files of every corpus of one home."""

    def __init__(self, state: State, corpora: Corpora) -> None:
        self.corpora = corpora
        self._state = state
        self._steps: dict[tuple[str, str], JSON] = {}

    def attach(self, corpus: JSON, wanted: Sequence[Wanted], caller: str, *, batch: bool = False) -> str | None:
        """Puts files in line for a corpus; returns the batch's id where one was asked for.

        A file that is there or on its way stays as it is; one that failed is tried again.
        """
        batch_id = f"vsfb_{secrets.token_hex(12)}" if batch else None
        again = {"status": "in_progress", "error": None, "error_code": None, "tries": 0}
        with self._state.transaction() as connection:
            if batch_id:
                connection.execute(insert(batches).values(id=batch_id, corpus=corpus["id"]))
            for one in wanted:
                row = {
                    "corpus": corpus["id"],
                    "file": one.file,
                    "caller": caller,
                    "filename": one.filename,
                    "attributes": dict(one.attributes),
                    "groups": list(one.groups),
                    "chunking": one.chunking,
                    "batch": batch_id,
                }
                connection.execute(
                    sqlite_insert(table)
                    .values(**row, status="in_progress")
                    .on_conflict_do_update(
                        index_elements=["corpus", "file"],
                        set_={**row, **again},
                        where=table.c.status.in_(("failed", "cancelled", _DELETING)),
                    )
                )
                if batch_id:
                    same = (table.c.corpus == corpus["id"]) & (table.c.file == one.file)
                    connection.execute(update(table).where(same).values(batch=batch_id))
        return batch_id

    def listed(self, corpus: JSON, rights: Rights, *, batch: str | None = None) -> list[JSON]:
        """The files of a corpus, or of one batch, that the caller may read, in the order they came."""
        rows = {row["file"]: row for row in self._rows(corpus, batch)}
        found = [
            _of_document(document, rows.get(document.id), corpus)
            for document in self._documents(corpus)
            if rights.reads(document.about.owner, document.about.groups) and (batch is None or document.id in rows)
        ]
        done = {row["file"] for row in found}
        waiting = [self._far(row) for row in rows.values() if row["status"] != "completed" and row["file"] not in done]
        found += [row for row in waiting if rights.reads(row["caller"] if row["groups"] else "", row["groups"])]
        return sorted(found, key=lambda row: (row["created"], row["file"]))

    def get(self, corpus: JSON, file_id: str, rights: Rights) -> JSON:
        """One of them. Raises NotFound."""
        row = self._row(corpus["id"], file_id)
        if row is None or row["status"] == "completed":
            try:
                document = self.corpora.library.document(corpus["name"], file_id)
            except NotFound:
                raise _unknown(file_id) from None
            if not rights.reads(document.about.owner, document.about.groups):
                raise _unknown(file_id)
            return _of_document(document, row, corpus)
        if row["status"] == _DELETING or not rights.reads(row["caller"] if row["groups"] else "", row["groups"]):
            raise _unknown(file_id)
        return self._far(row)

    def counts(self, corpus: JSON, batch: str | None = None) -> dict[str, int]:
        """How many files are in which status, and `total`."""
        of = (table.c.corpus == corpus["id"]) & (table.c.status != _DELETING)
        if batch is not None:
            of &= table.c.batch == batch
        with self._state.transaction() as connection:
            query = select(table.c.status, func.count()).where(of).group_by(table.c.status)
            found = {str(status): int(count) for status, count in connection.execute(query)}
        if batch is None:
            info = self.corpora.info(corpus)
            found["completed"] = info.documents if info else 0
        counts = {status: found.get(status, 0) for status in STATUSES}
        return {**counts, "total": sum(counts.values())}

    def describe(self, corpus: JSON, file_id: str, attributes: Mapping[str, Any], rights: Rights) -> JSON:
        """Changes a file's attributes; the next search goes by them. Raises NotFound."""
        with self.corpora.lock(corpus["id"]):
            row = self.get(corpus, file_id, rights)
            if row["status"] == "completed":
                about = About(dict(attributes), row["owner"], tuple(row["groups"]))
                self.corpora.library.describe_document(corpus["name"], file_id, about)
            self._set(corpus["id"], file_id, attributes=dict(attributes))
        return self.get(corpus, file_id, rights)

    def delete(self, corpus: JSON, file_id: str, rights: Rights) -> None:
        """Takes a file out of a corpus, at once and for good; the upload stays. Raises NotFound."""
        with self.corpora.lock(corpus["id"]):
            self.get(corpus, file_id, rights)
            self._take_out(corpus["id"], file_id)

    def forget(self, file_id: str) -> None:
        """Takes a file out of every corpus: its upload is being deleted."""
        with self._state.transaction() as connection:
            of = list(connection.scalars(select(table.c.corpus).where(table.c.file == file_id)))
        for corpus_id in of:
            with self.corpora.lock(corpus_id):
                self._take_out(corpus_id, file_id)

    def batch(self, corpus: JSON, batch_id: str) -> JSON:
        """A batch. Raises NotFound."""
        with self._state.transaction() as connection:
            one = (batches.c.id == batch_id) & (batches.c.corpus == corpus["id"])
            row = connection.execute(select(batches).where(one)).mappings().first()
        if row is None:
            raise NotFound(f"There is no file batch {batch_id[:80]!r} in this vector store.", param="batch_id")
        return dict(row)

    def cancel(self, corpus: JSON, batch_id: str) -> JSON:
        """Ends a batch: what waits is cancelled, what is done stays. Raises NotFound."""
        self.batch(corpus, batch_id)
        with self._state.transaction() as connection:
            waiting = (table.c.batch == batch_id) & (table.c.status == "in_progress")
            if connection.execute(update(table).where(waiting).values(status="cancelled")).rowcount:
                connection.execute(update(batches).where(batches.c.id == batch_id).values(cancelled=True))
        return self.batch(corpus, batch_id)

    # --- for the one who does it ------------------------------------------------------------------------------------

    def claim(self) -> JSON | None:
        """The file that waits longest, one try more; None when none waits."""
        query = select(table).where(table.c.status == "in_progress").order_by(table.c.seq).limit(1)
        with self._state.transaction() as connection:
            row = connection.execute(query).mappings().first()
            if row is not None:
                connection.execute(update(table).where(table.c.seq == row["seq"]).values(tries=row["tries"] + 1))
        return dict(row) if row else None

    def wanted(self, row: JSON) -> bool:
        """Whether it is still to be put there."""
        now = self._row(row["corpus"], row["file"])
        return now is not None and now["status"] == "in_progress"

    def tell(self, row: JSON, phase: str, done: int, total: int) -> None:
        """How far the one at work is: `done` of `total` passages of a phase. Nothing is written down."""
        self._steps[row["corpus"], row["file"]] = {"phase": phase, "done": done, "total": total}

    def end(self, row: JSON, status: str, code: str | None = None, error: str | None = None, size: int = 0) -> bool:
        """It came to this. A file that was cancelled meanwhile stays so; returns whether it was still wanted."""
        self._steps.pop((row["corpus"], row["file"]), None)
        one = (table.c.seq == row["seq"]) & (table.c.status == "in_progress")
        with self._state.transaction() as connection:
            values = {"status": status, "error_code": code, "error": error, "bytes": size}
            return connection.execute(update(table).where(one).values(**values)).rowcount == 1

    def recover(self) -> None:
        """Ends the deletions that a crash cut short."""
        with self._state.transaction() as connection:
            rows = connection.execute(select(table).where(table.c.status == _DELETING)).mappings().all()
        for row in rows:
            with self.corpora.lock(row["corpus"]):
                self._take_out(row["corpus"], row["file"])

    def _take_out(self, corpus_id: str, file_id: str) -> None:
        self._set(corpus_id, file_id, status=_DELETING)
        with contextlib.suppress(NotFound):  # it may never have got there
            self.corpora.library.delete_document(self.corpora.get(corpus_id, Rights())["name"], file_id)
        with self._state.transaction() as connection:
            connection.execute(delete(table).where(table.c.corpus == corpus_id, table.c.file == file_id))

    def _far(self, row: JSON) -> JSON:
        """The row of a file that is not there yet, with how far it is."""
        if row["status"] != "in_progress":
            return row
        began = {"phase": "reading" if row["tries"] else "waiting", "done": 0, "total": 0}
        return {**row, "progress": self._steps.get((row["corpus"], row["file"]), began)}

    def _documents(self, corpus: JSON) -> list[DocumentInfo]:
        return self.corpora.library.documents(corpus["name"]) if self.corpora.info(corpus) else []

    def _rows(self, corpus: JSON, batch: str | None) -> list[JSON]:
        query = select(table).where(table.c.corpus == corpus["id"], table.c.status != _DELETING)
        query = query if batch is None else query.where(table.c.batch == batch)
        with self._state.transaction() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _row(self, corpus_id: str, file_id: str) -> JSON | None:
        one = (table.c.corpus == corpus_id) & (table.c.file == file_id)
        with self._state.transaction() as connection:
            row = connection.execute(select(table).where(one)).mappings().first()
        return dict(row) if row else None

    def _set(self, corpus_id: str, file_id: str, **values: Any) -> None:
        one = (table.c.corpus == corpus_id) & (table.c.file == file_id)
        with self._state.transaction() as connection:
            connection.execute(update(table).where(one).values(**values))


def _of_document(document: DocumentInfo, row: JSON | None, corpus: JSON) -> JSON:
    """A row for a document, whoever put it there."""
    return {
        "corpus": corpus["id"],
        "file": document.id,
        "filename": row["filename"] if row else document.title,
        "status": "completed",
        "error": None,
        "error_code": None,
        "attributes": dict(document.about.attributes),
        "owner": document.about.owner,
        "groups": list(document.about.groups),
        "chunking": row["chunking"] if row else None,
        "bytes": document.bytes,
        "created": row["created"] if row else document.at,
    }


def _unknown(file_id: str) -> NotFound:
    return NotFound(f"There is no file {file_id[:80]!r} in this vector store.", param="file_id")
