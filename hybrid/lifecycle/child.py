"""A `hybrid` command as a child process, tied to our life.

In the background: of low priority, in a group of its own, giving way to requests. Or beside somebody who waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path

from hybrid.engine.launch import MARK
from hybrid.errors import HybridError
from hybrid.settings import Settings
from hybrid.training.control import Wanted

NICE = 15
#: no request for so long is quiet
IDLE_S = 0.5
#: a busy server holds a job no longer than this in a row, then lets it work a while
HOLD_S, WORK_S = 20.0, 5.0
#: a cancelled job may reach the end of its step in this time
GRACE_S = 5.0
_ASK_EVERY_S = 0.5
_LINE_BYTES = 4 << 20
_TICK_S = 0.1


class GiveWay:
    """When a background process stands still: while requests are answered, but never for ever."""

    def __init__(self) -> None:
        self._busy_at = float("-inf")
        self._held_since: float | None = None
        self._free_until = float("-inf")

    def stop(self, busy: bool, now: float) -> bool:
        """Whether it should be stopped at the time `now` (seconds of a monotonic clock)."""
        if busy:
            self._busy_at = now
        if now < self._free_until or now - self._busy_at >= IDLE_S:
            self._held_since = None
            return False
        self._held_since = now if self._held_since is None else self._held_since
        if now - self._held_since < HOLD_S:
            return True
        self._free_until = now + WORK_S
        return False


async def run_child(
    args: Sequence[str],
    *,
    settings: Settings,
    log: Path,
    busy: Callable[[], bool],
    wanted: Callable[[], Awaitable[Wanted]],
    heard: Callable[[bytes], None] | None = None,
    interrupt: bool = False,
) -> int:
    """Runs `hybrid ARGS…` to its end and returns its exit code; negative: the signal that ended it.

    What it says goes to `log`, the lines of its stdout to `heard` instead where that is given. When `wanted` says
    cancel its group is killed after a grace; with `interrupt` it is told so by SIGINT, for a process that does not
    look by itself. Cancelling this ends it at once.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as words:
        child = await asyncio.create_subprocess_exec(
            *_command(args),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if heard else words,
            stderr=words,
            limit=_LINE_BYTES,
            env=_environment(settings),
            start_new_session=True,
        )
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
    minding = asyncio.create_task(_mind(child.pid, busy, wanted, interrupt))
    listening = asyncio.create_task(_listen(child.stdout, heard))
    try:
        return await child.wait()
    finally:
        minding.cancel()
        _signal(child.pid, signal.SIGKILL)  # the whole group: what it started must not outlive it
        await asyncio.gather(minding, listening, child.wait(), return_exceptions=True)


def run_beside(
    args: Sequence[str], *, settings: Settings, log: Path, told: Callable[[int, int], None], failed: str, nice: int = 0
) -> None:
    """Runs `hybrid ARGS…` to its end for somebody who waits for it. Blocking.

    It belongs to our process group, so that an interrupt reaches it too and it saves a checkpoint, and ends with us.
    `told` hears `(step, steps)` from the JSON lines of its stdout; its other words go to `log`; `nice` is its
    priority where ours is not lower still. Raises HybridError, `failed` with the last of those words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("wb") as words,
        subprocess.Popen(
            _command(args),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            env=_environment(settings),
        ) as child,
    ):
        os.setpriority(os.PRIO_PROCESS, child.pid, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
        try:
            for step, steps in _steps(child.stdout or ()):
                told(step, steps)
        except KeyboardInterrupt:
            child.wait()
            raise
    if child.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing."]
        raise HybridError(f"{failed}: {said[-1]} The whole story is in {log}.")


def _command(args: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "hybrid.engine.launch", "hybrid.cli", *args]


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, **settings.environment(), MARK: str(os.getpid())}


def _steps(lines: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(step, steps) of the lines that tell how far a training is."""
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and "step" in told:
            yield int(told["step"]), int(told.get("steps") or told["step"])


async def _listen(words: asyncio.StreamReader | None, heard: Callable[[bytes], None] | None) -> None:
    if words and heard:
        async for line in words:
            heard(line)


async def _mind(group: int, busy: Callable[[], bool], wanted: Callable[[], Awaitable[Wanted]], interrupt: bool) -> None:
    """Stops and continues the group as requests come and go; lets it run when it is asked to end."""
    way, stopped, asked = GiveWay(), False, time.monotonic()
    while True:
        now = time.monotonic()
        if now - asked >= _ASK_EVERY_S:
            asked = now
            if (wish := await wanted()) != "run":
                break
        stop = way.stop(busy(), now)
        if stop != stopped:
            _signal(group, signal.SIGSTOP if stop else signal.SIGCONT)
            stopped = stop
        await asyncio.sleep(_TICK_S)
    _signal(group, signal.SIGCONT)
    if wish == "cancel":
        if interrupt:
            _signal(group, signal.SIGINT)
        await asyncio.sleep(GRACE_S)
        _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
