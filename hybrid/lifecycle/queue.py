"""The line in which jobs wait: huey's queue in an SQLite file of its own, flushed at every step.

It holds ids alone, never code or pickles: what a job is, and whether it may run, stands in its row. An id that comes
twice, or whose job has ended, is harmless. Any process of the home may put one in; the server takes them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Storage(Protocol):
    """What is used of huey's storage."""

    def enqueue(self, data: bytes, priority: float | None = None) -> None: ...
    def dequeue(self) -> bytes | None: ...
    def flush_queue(self) -> None: ...


class Queue:
    """Job ids, first in, first out."""

    def __init__(self, path: Path) -> None:
        from huey.storage import SqliteStorage

        path.parent.mkdir(parents=True, exist_ok=True)
        self._storage: Storage = SqliteStorage("jobs", filename=str(path), fsync=True, strict_fifo=True, timeout=30)

    def put(self, job_id: str) -> None:
        """Adds an id at the end."""
        self._storage.enqueue(job_id.encode())

    def take(self) -> str | None:
        """The id at the head, which leaves the queue; None when it is empty."""
        found = self._storage.dequeue()
        return bytes(found).decode() if found is not None else None

    def reset(self, job_ids: Sequence[str]) -> None:
        """Makes the queue hold exactly these."""
        self._storage.flush_queue()
        for job_id in job_ids:
            self.put(job_id)
