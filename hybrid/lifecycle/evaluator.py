"""Runs the evaluations of a home, one at a time: each is `hybrid eval` in a process of its own, which asks this server.

It may crash without us, gives way to people's requests as training does, and keeps every answer: what was cut short
goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest
from hybrid.lifecycle.child import run_child
from hybrid.lifecycle.evaluations import Evaluation, EvaluationBook
from hybrid.settings import Settings
from hybrid.training.control import Wanted
from hybrid.types import JSON

log = logging.getLogger("hybrid.lifecycle")
_POLL_S = 0.5
_LAST_WORDS = 500


class Pace:
    """How far a process is, from the lines it writes: `{"phase", "step", "steps", "eta_s"}`."""

    def __init__(self) -> None:
        self.progress: JSON = {}
        self._began = (0.0, 0)

    def hear(self, line: bytes, now: float) -> None:
        """One line at `now` (seconds of a monotonic clock); those that tell no progress are passed over."""
        told = _parsed(line)
        if not isinstance(told, dict) or not {"phase", "step", "steps"} <= told.keys():
            return
        step, steps = int(told["step"]), int(told["steps"])
        if told["phase"] != self.progress.get("phase") or step < self._began[1]:
            self._began = (now, step)
        since, first = self._began
        eta = (now - since) / (step - first) * (steps - step) if step > first else None
        self.progress = {"phase": str(told["phase"]), "step": step, "steps": steps}
        if eta is not None:
            self.progress["eta_s"] = round(eta, 1)


class Evaluator:
    """Takes what waits in the book. `busy`: people's requests are being answered; `ready`: the engine answers."""

    def __init__(
        self, settings: Settings, book: EvaluationBook, *, busy: Callable[[], bool], ready: Callable[[], bool]
    ) -> None:
        self._settings = settings
        self._home = settings.rooms
        self._book = book
        self._busy = busy
        self._ready = ready
        self._planning = asyncio.Lock()

    async def run(self) -> None:
        """Evaluates for ever. Cancelling it ends the process at work; its evaluation goes on at the next start."""
        await asyncio.to_thread(self._book.recover)
        while True:
            row = await asyncio.to_thread(self._book.claim) if self._ready() else None
            if row is None:
                await asyncio.sleep(_POLL_S)
                continue
            try:
                await self._do(row)
            except Exception:
                log.exception("the evaluation %s could not be run", row["id"])
                reason = "Something broke while running it; the server's log says what."
                await asyncio.to_thread(self._book.end, row["id"], "failed", reason, "internal_error")

    async def plan(self, evaluation: Evaluation) -> JSON:
        """What an evaluation would train and ask, and about how long that takes. Raises BadRequest with the reason."""
        lines: list[bytes] = []
        words = self._home.logs / "plan.log"

        async def wanted() -> Wanted:
            return "run"

        async with self._planning:
            await asyncio.to_thread(words.unlink, missing_ok=True)
            code = await run_child(
                [*evaluation.arguments(self._home), "--plan", "--json"],
                settings=self._settings, log=words, busy=lambda: False, wanted=wanted, heard=lines.append,
            )  # fmt: skip
            plan = _parsed(lines[-1]) if lines else None
            if code or not isinstance(plan, dict):
                raise BadRequest(await asyncio.to_thread(_last_words, words) or "It could not be planned.")
        return plan

    async def _do(self, row: JSON) -> None:
        """One evaluation, from its process's start to its end."""
        row_id, pace = row["id"], Pace()
        told: JSON = {}
        words = self._home.jobs / row_id / "log"

        async def wanted() -> Wanted:
            nonlocal told
            if pace.progress is not told:
                told = pace.progress
                await asyncio.to_thread(self._book.tell, row_id, told)
            wish: Wanted = (await asyncio.to_thread(self._book.get, row_id))["wanted"]
            return wish

        code = await run_child(
            [*_evaluation(row).arguments(self._home), "--progress-json"],
            settings=self._settings, log=words, busy=self._busy, wanted=wanted, interrupt=True,
            heard=lambda line: pace.hear(line, time.monotonic()),
        )  # fmt: skip
        if code == 0:
            await asyncio.to_thread(self._book.end, row_id, "succeeded")
        elif await wanted() == "cancel":
            await asyncio.to_thread(self._book.end, row_id, "cancelled")
        else:
            reason = await asyncio.to_thread(_last_words, words)
            ended = f"Its process was ended by signal {-code}; start it again, and it goes on where it stopped."
            await asyncio.to_thread(
                self._book.end, row_id, "failed", ended if code < 0 else reason, "evaluation_failed"
            )


def _evaluation(row: JSON) -> Evaluation:
    spec: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row["spec"].items()}
    return Evaluation(**spec)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _last_words(path: Path) -> str:
    """The last line that a process wrote: what it complained of."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][-_LAST_WORDS:] if lines else ""
