"""The engine as a child process: started, watched, stopped, and never left behind.

The child is tied to us (`launch.py`), leads its own session (so that a Ctrl-C reaches the gateway alone), listens on a
socket in a folder that only we can enter, and writes to a log. `.hybrid/engine.json` names its processes with their
times of birth, so that the next start can end what a crash left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from hybrid.engine.launch import MARK
from hybrid.rooms import write_json

#: a socket's path may have 107 bytes
_LONGEST_FOLDER = 80
_TAIL_BYTES = 16 << 10


class EngineProcess:
    """One child at a time. `argv` is the module to run and its flags, without the socket's."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, log: Path, record: Path) -> None:
        self.folder = _private_folder()
        self.socket = self.folder / "engine.sock"
        self._family: tuple[_Born, ...] = ()
        self._argv = argv
        self._env = env
        self._log = log
        self._record = record
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Starts the child and returns. Must run in a thread that lives on: the child dies with the thread."""
        await asyncio.to_thread(end_leftovers, self._record)
        self.socket.unlink(missing_ok=True)
        with _fresh(self._log).open("wb") as log:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "hybrid.engine.launch", *self._argv, "--uds", str(self.socket)),
                env={**os.environ, **self._env, MARK: str(os.getpid())},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        await self.look()

    async def look(self) -> None:
        """Reads again which processes there are, and records them for the next start."""
        family = await asyncio.to_thread(_family_of, self._child.pid) if self._child else ()
        if family and family != self._family:
            self._family = family
            await asyncio.to_thread(_write_record, self._record, family, self.folder)

    async def wait(self) -> None:
        """Waits until the child ends."""
        if self._child is not None:
            await self._child.wait()

    @property
    def pids(self) -> tuple[int, ...]:
        """Every process of the engine, the child first, when last looked at."""
        return tuple(pid for pid, _ in self._family)

    @property
    def running(self) -> bool:
        """Whether the child is there."""
        return self._child is not None and self._child.returncode is None

    @property
    def exit_code(self) -> int | None:
        """How the child ended (minus the signal that ended it); None while it runs."""
        return self._child.returncode if self._child else None

    async def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, a while to finish, then SIGKILL for whatever is left of its group. Nothing is left after this."""
        if self._child is None:
            return
        await self.look()
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.wait(), grace_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        await asyncio.to_thread(_end, self._family)
        await self._child.wait()
        self._child, self._family = None, ()
        self._record.unlink(missing_ok=True)

    async def close(self) -> None:
        """Stops the child and removes its socket's folder."""
        await self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self, lines: int = 20) -> tuple[str, ...]:
        """The last lines of the log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return ()
        return tuple(line.rstrip()[:400] for line in text.splitlines() if line.strip())[-lines:]


def end_leftovers(record: Path) -> None:
    """Ends the processes that a gateway which is gone left running. A pid that went to another program is safe."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
        owner, processes = _Born(*found["gateway"]), [_Born(*p) for p in found["processes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if _living(owner):
        return
    _end([born for leader in processes if _living(leader) for born in _family_of(leader.pid)])
    shutil.rmtree(found["folder"], ignore_errors=True)
    record.unlink(missing_ok=True)


class _Born(NamedTuple):
    """A process that cannot be mistaken for a later one with the same pid. `at` is in seconds since the epoch."""

    pid: int
    at: float


def _living(born: _Born) -> psutil.Process | None:
    """The process, if it still runs."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(born.pid)
        if abs(process.create_time() - born.at) < 0.01 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _family_of(leader: int) -> tuple[_Born, ...]:
    """The leader and all its descendants."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(leader)
        return tuple(_Born(p.pid, p.create_time()) for p in (process, *process.children(recursive=True)))
    return ()


def _end(family: Iterable[_Born]) -> None:
    """SIGKILL to each; blocks until they are gone, for 5 s at most."""
    living = [process for born in family if (process := _living(born))]
    for process in living:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(living, timeout=5)


def _write_record(record: Path, family: Sequence[_Born], folder: Path) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    owner = _family_of(os.getpid())[0]
    write_json(record, {"gateway": owner, "folder": str(folder), "processes": family})


def _private_folder() -> Path:
    """A folder of mode 0700 whose path leaves room for a socket's name."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="hybrid-", dir=base if len(base) < _LONGEST_FOLDER else "/tmp"))  # noqa: S108


def _fresh(log: Path) -> Path:
    """The log's path, the last run's log kept beside it as `.1`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_name(f"{log.name}.1"))
    return log
