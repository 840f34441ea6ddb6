"""Who decides when: few at once, in the order they came.

A burst of requests is no reason to route any of them badly. So the deadline counts from a request's turn, and who waits
for one goes on waiting as long as those before get done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

#: more at once than this only take the cores from one another
_AT_ONCE = 2


class Turns:
    """Runs work in threads of its own, `_AT_ONCE` at a time: other blocking work must not make a decision late.

    `deadline` is in seconds.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="gate")
        self._free = asyncio.Semaphore(_AT_ONCE)
        self._moved = 0.0

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns. Raises TimeoutError when it takes longer than the deadline, or when nobody who has a
        turn gets done for so long; a thread cannot be stopped, so late work keeps its turn until it ends."""
        await self._turn()
        self._moved = _now()
        task = asyncio.get_running_loop().run_in_executor(self._threads, work)
        task.add_done_callback(self._done)
        return await asyncio.wait_for(asyncio.shield(task), self._deadline)

    async def _turn(self) -> None:
        mine = asyncio.ensure_future(self._free.acquire())
        try:
            while not mine.done():
                await asyncio.wait({mine}, timeout=self._deadline)
                if not mine.done() and _now() - self._moved >= self._deadline:
                    raise TimeoutError
        except BaseException:
            if mine.done():
                self._free.release()
            mine.cancel()
            raise

    def _done(self, task: asyncio.Future[T]) -> None:
        self._moved = _now()
        self._free.release()
        if not task.cancelled():
            task.exception()  # who asked may be gone: it is told to nobody then


def _now() -> float:
    return asyncio.get_running_loop().time()
