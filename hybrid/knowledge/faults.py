"""What a disk can do to a corpus, in words: full, failing, read-only, or bytes that are not what was written."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from hybrid.errors import StorageError

_FULL = "is full, or takes no more; free some space and run the command again: what was committed is there"
_READ_ONLY = "cannot be written; mend its permissions and run the command again"
_DAMAGED = (
    "is damaged; bring a backup back with `hybrid corpora restore FILE`, or take the corpus away with "
    "`hybrid corpora delete` and index its documents again"
)
_FAILED = "failed; look at the disk, and run the command again: what was committed is there"
#: SQLite's primary result codes
_CODES = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_CANTOPEN: _READ_ONLY,
    sqlite3.SQLITE_PERM: _READ_ONLY,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_IOERR: _FAILED,
    sqlite3.SQLITE_BUSY: "is held by another program; run the command again when it has ended",
}
_ERRNO = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: _READ_ONLY,
    errno.EIO: _FAILED,
}


def speak(engine: Engine, path: Path) -> None:
    """Lets an engine on the SQLite file `path` raise StorageError where the disk is to blame."""

    @event.listens_for(engine, "handle_error", retval=True)
    def _translate(context: Any) -> StorageError | None:
        return _sqlite(path, context.original_exception)


@contextmanager
def spoken(path: Path) -> Iterator[None]:
    """Raises StorageError for what files below `path` and bare SQLite connections raise where the disk is to blame."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        told = _sqlite(path, error) or _file(path, error)
        if told:
            raise told from error
        raise


def _sqlite(path: Path, error: BaseException | None) -> StorageError | None:
    code = getattr(error, "sqlite_errorcode", None)
    words = _CODES.get(code & 0xFF) if isinstance(code, int) else None
    return StorageError(f"{path} {words}. ({error})") if words else None


def _file(path: Path, error: BaseException) -> StorageError | None:
    words = _ERRNO.get(error.errno or 0) if isinstance(error, OSError) else None
    return StorageError(f"The disk of {path} {words}. ({error})") if words else None
