"""Parses files in a process of its own, so that a bomb or a broken file costs that file alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid.errors import DataError
from hybrid.knowledge.parse import Fault, Part

#: of our environment, what an interpreter needs to start; keys and tokens are not among it
_PASSED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may cost: bytes on disk, bytes of memory and seconds to read it."""

    size: int = 64 * _MIB
    memory: int = 1024 * _MIB
    seconds: float = 60.0


class Parser:
    """One worker process that reads file after file; a new one is started after a file that cost too much.

    For one thread. Use as a context manager, so that the worker ends.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Parser:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def parse(self, file: Path, suffix: str, name: str) -> list[Part | Fault]:
        """The parts and the faulty rows of a file. Raises DataError with the reason when the file cannot be read."""
        if (size := file.stat().st_size) > self._limits.size:
            raise DataError(f"it has {size // _MIB} MiB, and `retrieval.file_mb` allows {self._limits.size // _MIB}")
        worker = self._start()
        order = {"file": str(file.absolute()), "suffix": suffix, "name": name}
        late = threading.Timer(self._limits.seconds, worker.kill)
        late.start()
        try:
            return list(self._answers(worker, json.dumps(order).encode() + b"\n"))
        except DataError:
            raise
        except OSError as error:  # the worker is gone
            raise self._death(worker) from error
        finally:
            late.cancel()

    def _answers(self, worker: subprocess.Popen[bytes], order: bytes) -> Iterator[Part | Fault]:
        stdin, stdout = _pipes(worker)
        stdin.write(order)
        stdin.flush()
        for line in stdout:
            told: dict[str, Any] = json.loads(line)
            if "part" in told:
                yield Part(**told["part"])
            elif "fault" in told:
                yield Fault(**told["fault"])
            elif told["end"] is None:
                return
            else:
                raise self._refusal(told["end"])
        raise self._death(worker)

    def _refusal(self, reason: str) -> DataError:
        if reason != "memory":
            return DataError(reason)
        self._stop()  # what is left of its memory is in pieces
        return DataError(f"reading it takes more than the {self._limits.memory // _MIB} MiB of `retrieval.parse_mb`")

    def _death(self, worker: subprocess.Popen[bytes]) -> DataError:
        """Why the worker ended while it read a file."""
        code = worker.wait()
        self._stop()
        if code in (-signal.SIGKILL, -signal.SIGXCPU):
            return DataError(f"reading it takes longer than the {self._limits.seconds:g} s of `retrieval.parse_s`")
        return DataError(f"its reader died of it (exit status {code})")

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            # -P: a file named json.py in the folder where we stand is data, not code
            argv = [sys.executable, "-P", "-m", "hybrid.knowledge.confined"]
            limits = [str(self._limits.memory), str(max(1, round(self._limits.seconds)))]
            environment = {key: os.environ[key] for key in _PASSED if key in os.environ}
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            self._worker = subprocess.Popen([*argv, *limits], stdin=pipe, stdout=pipe, stderr=null, env=environment)
            _pipes(self._worker)[1].readline()  # it is up: the time that took is no file's
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in _pipes(worker):
            with contextlib.suppress(OSError):
                pipe.close()


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """The worker's stdin and stdout, which were asked for."""
    if worker.stdin is None or worker.stdout is None:
        raise AssertionError("a worker has pipes")
    return worker.stdin, worker.stdout
