"""The loop beside a server: a round whenever something new is served or said, in a process that asks this server.

It begins when the server is idle and new versions are measured, gives way to people's requests as training does, and
what it has done is kept, so that a restart begins nothing again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from pathlib import Path

from sqlalchemy import func, select

from hybrid.evaluation.asking import CALLER
from hybrid.gateway import Gateway
from hybrid.lifecycle.child import run_child
from hybrid.lifecycle.loop import BUDGET_MIN
from hybrid.lifecycle.measure import Measuring
from hybrid.rooms import write_json
from hybrid.state import feedback
from hybrid.training.control import Wanted

log = logging.getLogger("hybrid.lifecycle")
_EVERY_S = 2.0
#: a round that failed, or had more to ask than its budget, is followed by another after this time
_LATER_S = 300.0
#: so many new thumbs are something new
_THUMBS = 20


class Looping:
    """Runs `hybrid loop --once` when a version, a corpus or feedback came since the last one."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._home = gateway.settings.rooms
        self._measuring = Measuring(gateway)

    async def run(self) -> None:
        """Looks for ever."""
        done = await asyncio.to_thread(self._kept)
        while True:
            await asyncio.sleep(_EVERY_S)
            mark = await asyncio.to_thread(self._mark) if self._idle() else ""
            if not mark or mark == done:
                continue
            if await self._round():
                done = mark
                await asyncio.to_thread(write_json, self._path, {"mark": mark})
            else:
                await asyncio.sleep(_LATER_S)

    @property
    def _path(self) -> Path:
        return self._home.hidden / "loop.json"

    def _kept(self) -> str:
        try:
            return str(json.loads(self._path.read_bytes())["mark"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _idle(self) -> bool:
        return self._gateway.ready()[0] and not self._gateway.answering

    def _mark(self) -> str:
        """What is served and how much was said; "" while there is nothing to route to, or something to measure."""
        status = self._gateway.status()
        if not (status["aliases"] or status["corpora"]) or self._measuring.waiting() is not None:
            return ""
        with self._gateway.state.transaction() as connection:
            said = connection.execute(select(func.count()).select_from(feedback)).scalar_one()
        facts = [status["aliases"], status["corpora"], said // _THUMBS]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]

    async def _round(self) -> bool:
        """One round; whether it did all there was to do."""
        lines: list[bytes] = []

        async def wanted() -> Wanted:
            return "run"

        code = await run_child(
            ["loop", "--once", "--json", "--budget", str(BUDGET_MIN)],
            settings=self._gateway.settings, log=self._home.logs / "loop.log", wanted=wanted, heard=lines.append,
            busy=lambda: self._gateway.answering_others(CALLER) > 0,
        )  # fmt: skip
        if code or not lines:
            log.warning("a round of the loop ended with %d; .hybrid/logs/loop.log says why", code)
            return False
        return bool(json.loads(lines[-1])["open"] == 0)
