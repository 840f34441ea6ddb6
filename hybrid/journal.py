"""The decision log: at once in memory, behind the answer on disk.

A write to SQLite with synchronous=FULL costs milliseconds that no request should wait for, so records queue and are
stored twice a second in one transaction. The vector of what was asked is made then, too, where deciding needed none.
The newest are found in memory until then and a while after.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from hybrid.state import State
from hybrid.types.decision import Decision

log = logging.getLogger("hybrid.journal")

#: vectors made in one go: in a flood of requests a sample of them tells what is asked, and the cores have other work
_VECTORS = 64


class Journal:
    """Decisions of one server. `keep` bounds the memory."""

    def __init__(self, state: State, *, keep: int = 4096, every_s: float = 0.5) -> None:
        self._state = state
        self._keep = keep
        self._every_s = every_s
        self._recent: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()
        self._pending: list[dict[str, Any]] = []

    def add(self, decision: Decision, caller: str) -> None:
        """Records a decision; it can be read back at once."""
        row = {"id": decision.id, "at": time.time(), "caller": caller, "record": decision.wire()}
        row |= {"vector": decision.vector}
        self._recent[decision.id] = row
        self._pending.append(row)
        while len(self._recent) > self._keep:
            self._recent.popitem(last=False)

    def get(self, decision_id: str, caller: str) -> dict[str, Any] | None:
        """The record of a decision this caller asked for, or None."""
        row = self._recent.get(decision_id) or self._state.decision(decision_id)
        return dict(row["record"]) if row and row["caller"] == caller else None

    async def run(self) -> None:
        """Stores what is pending, forever; what is left is stored when the task is cancelled."""
        try:
            while True:
                await asyncio.sleep(self._every_s)
                await asyncio.to_thread(self.flush)
        finally:
            self.flush()

    def flush(self) -> None:
        """Stores what is pending now, with its vectors. A full disk costs the record, never the answer."""
        rows, self._pending = self._pending, []
        for place, row in enumerate(rows):
            row["vector"] = _made(row["vector"]) if place < _VECTORS else None
        try:
            self._state.add_decisions(rows)
        except SQLAlchemyError:
            log.exception("%d decisions could not be stored; check the disk that holds .hybrid/", len(rows))


def _made(vector: Callable[[], bytes] | None) -> bytes | None:
    """The vector of a record; one that cannot be made is left out."""
    try:
        return vector() if vector else None
    except Exception:
        # the record is what matters: whatever an embedder may raise must not cost it, nor those stored with it
        log.exception("a decision is stored without its vector")
        return None
