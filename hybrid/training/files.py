"""Files by id: what callers upload to train on, and what jobs leave behind. The bytes never change.

A row says who owns which id; the bytes are `.hybrid/files/<id>`. The file is renamed into place before its row is
written and outlives it by a moment when deleted, so a row always has its bytes; a crash leaves at most an orphan,
which the next start sweeps away.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sqlalchemy import delete, select
from sqlalchemy.dialects.sqlite import insert

from hybrid.errors import BadRequest, NotFound
from hybrid.rooms import Home, fsync_path, sha256_file
from hybrid.state import State
from hybrid.state import files as table
from hybrid.training.reader import DOCUMENTS
from hybrid.types import JSON

#: what can be uploaded; results are made here alone
PURPOSES = ("fine-tune", "assistants", "user_data")
RESULTS = "fine-tune-results"
MAX_NAME = 255
_ORPHAN_S = 3600


@dataclass(frozen=True, slots=True)
class Incoming:
    """An upload being written: `file` takes bytes, and `path` is where they lie until they are kept or thrown away."""

    path: Path
    file: IO[bytes]

    def discard(self) -> None:
        """Throws away what was not kept."""
        self.file.close()
        self.path.unlink(missing_ok=True)


class Files:
    """The files of one home. Every look-up asks for the caller: another tenant's id is as unknown as a wrong one."""

    def __init__(self, home: Home, state: State) -> None:
        self._folder = home.files
        self._state = state

    def begin(self) -> Incoming:
        """A place to write an upload to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f".incoming-{uuid.uuid4().hex}"
        return Incoming(path, path.open("xb"))

    def keep(self, incoming: Incoming, *, caller: str, filename: str, purpose: str, id: str | None = None) -> JSON:
        """Makes an upload a file and returns its row; a second one of the same `id` changes nothing.

        Raises BadRequest for one without bytes, OSError when the disk is full.
        """
        incoming.file.flush()
        os.fsync(incoming.file.fileno())
        size = incoming.file.tell()
        incoming.file.close()
        if not size:
            incoming.discard()
            raise BadRequest("The file is empty; upload one with rows in it.", param="file")
        file_id = id or f"file-{uuid.uuid4().hex[:24]}"
        row = {
            "id": file_id,
            "caller": caller,
            "filename": clean_name(filename),
            "purpose": purpose,
            "bytes": size,
            "sha256": sha256_file(incoming.path),
            "status": "processed",
            "created": time.time(),
        }
        os.replace(incoming.path, self._folder / file_id)
        fsync_path(self._folder)
        with self._state.transaction() as connection:
            connection.execute(insert(table).values(**row).on_conflict_do_nothing())
        return row

    def write(self, id: str, text: str, *, caller: str, filename: str) -> JSON:
        """A result of ours as a file of the caller's."""
        incoming = self.begin()
        incoming.file.write(text.encode())
        return self.keep(incoming, caller=caller, filename=filename, purpose=RESULTS, id=id)

    def get(self, file_id: str, caller: str) -> JSON:
        """The row of a file. Raises NotFound."""
        with self._state.transaction() as connection:
            mine = (table.c.id == file_id) & (table.c.caller == caller)
            row = connection.execute(select(table).where(mine)).mappings().first()
        if row is None:
            raise NotFound(f"There is no file {file_id[:80]!r}; GET /v1/files lists yours.", param="file_id")
        return dict(row)

    def list(
        self, caller: str, *, purpose: str | None = None, after: str | None = None, limit: int, newest: bool = True
    ) -> tuple[list[JSON], bool]:
        """(rows by age, whether more follow) after the id `after`. Raises NotFound for an unknown `after`."""
        query = select(table).where(table.c.caller == caller)
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        if after is not None:
            last = self.get(after, caller)["created"]
            query = query.where(table.c.created < last if newest else table.c.created > last)
        query = query.order_by(table.c.created.desc() if newest else table.c.created).limit(limit + 1)
        with self._state.transaction() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return rows[:limit], len(rows) > limit

    def path(self, file_id: str, caller: str) -> Path:
        """Where its bytes are. Raises NotFound."""
        return self._folder / str(self.get(file_id, caller)["id"])

    def delete(self, file_id: str, caller: str) -> None:
        """Ends a file; a job that was made from it keeps its own link to the bytes. Raises NotFound."""
        self.get(file_id, caller)
        with self._state.transaction() as connection:
            connection.execute(delete(table).where(table.c.id == file_id, table.c.caller == caller))
        (self._folder / file_id).unlink(missing_ok=True)

    def sweep(self, now: Callable[[], float] = time.time) -> None:
        """Removes what a crash left: bytes without a row, older than any upload takes."""
        if not self._folder.is_dir():
            return
        with self._state.transaction() as connection:
            known = set(connection.scalars(select(table.c.id)))
        for path in self._folder.iterdir():
            if path.name not in known and path.stat().st_mtime < now() - _ORPHAN_S:
                path.unlink(missing_ok=True)


def rows_suffix(filename: str) -> str:
    """As what a file called so is read: the suffix of a document, or rows, whatever its name says."""
    suffix = Path(filename).suffix.lower()
    return suffix if suffix in DOCUMENTS else ".jsonl"


def clean_name(name: str) -> str:
    """A name to show, never to open: what follows the last separator, without control characters."""
    base = name.replace("\\", "/").rpartition("/")[2]
    shown = "".join(c for c in base if c.isprintable()).strip()[:MAX_NAME]
    return shown if shown not in ("", ".", "..") else "upload"
