"""One corpus as one file: a copy of its store, taken while others write, with its sum inside.

The file is a ZIP of `store.db` and `manifest.json`. Generations are not in it: they are built from the store.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
import time
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import IO

from hybrid.errors import Conflict, Refused
from hybrid.knowledge.faults import spoken
from hybrid.knowledge.store import Store
from hybrid.rooms import fsync_path, sha256_file
from hybrid.types import JSON

STORE = "store.db"
MANIFEST = "manifest.json"
_FORMAT = "hybrid-corpus-1"
_MANIFEST_LIMIT = 1 << 16
_PIECE = 1 << 20


def write(database: Path, corpus: str, file: Path) -> JSON:
    """Writes a backup of the store at `database` to `file` and returns its manifest: all that was committed, at one
    moment. Raises Conflict when `file` exists, StorageError where the disk is to blame.
    """
    if file.exists():
        raise Conflict(f"{file} exists already; give the backup another name.", param="file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with spoken(file), tempfile.TemporaryDirectory(prefix=".backup-", dir=file.parent) as staging:
        copy, packed = Path(staging) / STORE, Path(staging) / "packed"
        _copy(database, copy)
        size, digest = copy.stat().st_size, sha256_file(copy)
        manifest = {"format": _FORMAT, "corpus": corpus, "created": time.time(), "bytes": size, "sha256": digest}
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(copy, STORE)
            archive.writestr(MANIFEST, json.dumps(manifest))
        fsync_path(packed)
        os.replace(packed, file)
        fsync_path(file.parent)
    return manifest


def named(file: Path) -> str:
    """The corpus that a backup is of. Raises Refused when the file is none."""
    return str(_manifest(file)["corpus"])


def read(file: Path, folder: Path) -> None:
    """Puts the store of a backup into a corpus's folder, which has none; every byte of it is checked first.

    The caller holds the corpus's lock. Raises Refused for a file that is no backup or is damaged, Conflict when there
    is a store already, SetupError for a newer hybrid's, StorageError where the disk is to blame.
    """
    if (folder / STORE).exists():
        raise Conflict(f"There is a corpus {folder.name!r} already; delete it first, or give --name.", param="name")
    manifest = _manifest(file)
    with spoken(folder), tempfile.TemporaryDirectory(prefix=".restore-", dir=folder) as staging:
        copy = Path(staging) / STORE
        _unpack(file, copy, int(manifest["bytes"]), str(manifest["sha256"]))
        Store(copy).close()  # brought to this schema, or refused
        with closing(sqlite3.connect(copy)) as restored:
            restored.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
        fsync_path(copy)
        os.replace(copy, folder / STORE)
        fsync_path(folder)


def _copy(database: Path, copy: Path) -> None:
    with closing(sqlite3.connect(database, timeout=30)) as live, closing(sqlite3.connect(copy)) as target:
        live.backup(target)  # in one step: one moment, and no writer waits for it
        target.execute("PRAGMA journal_mode=DELETE")


def _manifest(file: Path) -> JSON:
    if not file.is_file():
        raise Refused(f"There is no file {file}.", param="file")
    try:
        with zipfile.ZipFile(file) as archive, archive.open(MANIFEST) as stream:
            manifest: JSON = json.loads(stream.read(_MANIFEST_LIMIT))
        if manifest["format"] == _FORMAT:
            return manifest
    except (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, EOFError) as error:
        raise Refused(f"{file} is no backup of a corpus, or is damaged: {error}.", param="file") from error
    raise Refused(f"{file} was written by another hybrid: its format is {manifest['format']!r}.", param="file")


def _unpack(file: Path, target: Path, size: int, digest: str) -> None:
    """Raises Refused unless exactly the bytes that were backed up come out."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(STORE) as packed, target.open("wb") as out:
            unpacked = _pour(packed, out, size)
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise Refused(f"{file} is damaged: {error}. Restore another backup.", param="file") from error
    if unpacked != digest:
        raise Refused(f"{file} is damaged: its sum is not the one that was written. Restore another backup.")


def _pour(packed: IO[bytes], out: IO[bytes], size: int) -> str:
    """Copies at most `size` bytes and one more piece; returns their SHA-256."""
    digest, done = hashlib.sha256(), 0
    while done <= size and (piece := packed.read(_PIECE)):
        digest.update(piece)
        out.write(piece)
        done += len(piece)
    return digest.hexdigest()
