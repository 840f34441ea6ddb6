"""A circuit breaker before the engine: what fails every time is not asked every time (Nygard, Release It!, 2007).

    closed ── FAILURES in a row ──► open ── COOLDOWN_S ──► half open: one request tries ── answered ──► closed

A failure counts when the engine has told nobody anything since the failed request was sent: one that answers others is
no broken engine, and what failed before a restart says nothing of the new one. Whatever it tells closes the breaker,
be it the supervisor's own question, which is asked whatever the state. A refusal (4xx), a full queue, and a client that
left say nothing about the engine and count as nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from hybrid.errors import EngineError, EngineFailing, EngineRejected, EngineTimeout, NotReady, Overloaded

log = logging.getLogger("hybrid.engine")

FAILURES = 5
#: as EngineFailing tells in Retry-After
COOLDOWN_S = 2.0

State = Literal["closed", "half_open", "open"]
STATES: tuple[State, ...] = get_args(State)


class Breaker:
    """For one engine, in one event loop. `clock` is in seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        #: when the engine last computed something for us, by the clock; 0 before that
        self.heard = 0.0
        self._clock = clock
        self._failures = 0
        self._opened: float | None = None
        self._trial: object | None = None

    @property
    def state(self) -> State:
        """Whether requests pass, one may try, or all are refused."""
        if self._opened is None:
            return "closed"
        return "half_open" if self._trial or self._cool() else "open"

    def answered(self) -> None:
        """The engine has told something."""
        if self._opened is not None:
            log.info("the engine answers again")
        self.heard = self._clock()
        self._failures, self._opened, self._trial = 0, None, None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one request, whose error passes. Raises EngineFailing, before anything is sent, while it is open."""
        me, heard = object(), self.heard
        self._admit(me)
        try:
            yield
        except (EngineError, EngineTimeout, NotReady) as error:
            if heard == self.heard and not isinstance(error, (EngineRejected, Overloaded)):
                self._fail(me)
            raise
        finally:
            if self._trial is me:
                self._trial = None

    def _admit(self, me: object) -> None:
        if self._opened is None:
            return
        if self._trial or not self._cool():
            raise EngineFailing("The engine fails at every request; one a moment is tried. Try again in a moment.")
        self._trial = me

    def _fail(self, me: object) -> None:
        self._failures += 1
        if self._opened is None and self._failures >= FAILURES:
            log.warning("the engine failed %d requests in a row; one every %g s is tried", FAILURES, COOLDOWN_S)
            self._opened = self._clock()
        elif self._trial is me:
            self._opened = self._clock()

    def _cool(self) -> bool:
        return self._opened is not None and self._clock() - self._opened >= COOLDOWN_S
