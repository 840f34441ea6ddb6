"""The rooms of a home, and the one way anything is published into them: stage, fsync, card last, rename.

A home (`HYBRID_HOME`, default the working directory) holds `adapters/`, `index/`, `eval/` and the hidden `.hybrid/`
(database, logs, sockets). A folder's shape on disk is a value here, so that no other file joins path strings.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid.errors import Refused

CARD = "card.json"
#: seconds before a staging folder that nobody holds counts as left by a process that was killed
ABANDONED_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: words that mean something else as a `model`, and so cannot name an artefact
RESERVED = frozenset(
    [
        "auto",
        "base",
        "prompt",
        "few_shot",
        "rag",
        "adapter",
        "mix",
        "moa",
        "self_moa",
        "head",
        "hybrid",
        "none",
        "con",
        "nul",
        "aux",
        "prn",
        "ft",
        "gate",
        "gate-feedback",
    ]
)


def check_name(name: str, kind: str = "adapter") -> str:
    """`name` itself when it can be a folder and a model name. Raises Refused, with the rule, when it cannot."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise Refused(
            f"{str(name)[:80]!r} cannot name an {kind}: use 1 to 64 ASCII letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit, without '..'.",
            param="name",
        )
    if name.lower() in RESERVED:
        raise Refused(f"{name!r} is a reserved word among model names; choose another name.", param="name")
    return name


@dataclass(frozen=True, slots=True)
class Home:
    """The folders of one home. Nothing is created by looking."""

    root: Path

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def index(self) -> Path:
        return self.root / "index"

    @property
    def tasks(self) -> Path:
        return self.root / "eval" / "tasks"

    @property
    def suites(self) -> Path:
        return self.root / "eval" / "suites"

    @property
    def reports(self) -> Path:
        return self.root / "eval" / "reports"

    @property
    def hidden(self) -> Path:
        return self.root / ".hybrid"

    @property
    def database(self) -> Path:
        return self.hidden / "state.db"

    @property
    def queue(self) -> Path:
        """The ids of the jobs that wait, in order."""
        return self.hidden / "queue.db"

    @property
    def files(self) -> Path:
        """What was uploaded, and the results of jobs: one file an id."""
        return self.hidden / "files"

    @property
    def jobs(self) -> Path:
        """A folder for each job: the data it reads, and its log."""
        return self.hidden / "jobs"

    @property
    def logs(self) -> Path:
        return self.hidden / "logs"

    @property
    def server_file(self) -> Path:
        """Where a running server says how to reach it: `{"url", "pid", "token"}`, mode 0600."""
        return self.hidden / "server.json"


def fsync_tree(folder: Path) -> None:
    """Flushes every file below `folder`, then the folders, so that a rename publishes bytes and not promises."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flushes one file, or a folder's list of names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it into place: a reader sees the old file or the new one, whole."""
    with _replacing(path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes in the same way."""
    with _replacing(path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}"), "wb") as file:
        file.write(data)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines in the same way, for one writer at a time: what a crash leaves the next one writes over."""
    with _replacing(path, path.with_suffix(".part")) as file:
        file.writelines(map(row_line, rows))


def row_line(row: Mapping[str, Any]) -> str:
    """A row of JSON Lines with its end, in as few characters as JSON takes."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


@contextmanager
def _replacing(path: Path, staging: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes the place of `path` once it is on the disk."""
    with staging.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yields a staging folder beside `target`; on a clean exit it is fsynced and renamed to `target`.

    The caller writes its card last. On an exception the staging folder is removed and `target` is untouched.
    Raises FileExistsError when `target` exists: what is published is immutable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".staging-{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    held = _hold(staging)
    try:
        yield staging
        fsync_tree(staging)
        if target.exists():
            raise FileExistsError(f"{target} is published already and cannot change; publish a new version")
        os.rename(staging, target)
        fsync_path(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if held is not None:
            os.close(held)


def sweep(room: Path) -> None:
    """Removes the staging folders below `room/*/` that a process left when it was killed; those in use stay."""
    for staging in room.glob("*/.staging-*"):
        with contextlib.suppress(OSError):
            if time.time() - staging.lstat().st_mtime < ABANDONED_S:
                continue
            held = _hold(staging)
            if held is not None:
                shutil.rmtree(staging, ignore_errors=True)
                os.close(held)


def _hold(folder: Path) -> int | None:
    """A lock on a folder, for as long as the descriptor is open and the process lives; None where there is none."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
