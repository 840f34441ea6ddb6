"""How often what could not be sent is sent again: a budget, so that retries never become the load that they wait out.

The share of the traffic is that of Google's SRE book (2016, chapter 21) and of Finagle's `RetryBudget`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

#: retries are at most this share of the requests of the last WINDOW_S seconds …
SHARE = 0.2
WINDOW_S = 10.0
#: … or so many, that a quiet server may retry at all
LEAST = 4


class RetryBudget:
    """Counts requests and retries in a sliding window. `clock` is in seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        #: retries that the budget did not allow, ever
        self.refused = 0
        self._clock = clock
        self._requests: deque[float] = deque()
        self._retries: deque[float] = deque()

    def request(self) -> None:
        """A request is sent for the first time."""
        self._requests.append(self._slid())

    def retry(self) -> bool:
        """Whether one may be sent again; if so, it counts."""
        now = self._slid()
        if len(self._retries) >= max(LEAST, int(SHARE * len(self._requests))):
            self.refused += 1
            return False
        self._retries.append(now)
        return True

    def _slid(self) -> float:
        """The time, once what the window has left behind is forgotten."""
        now = self._clock()
        for times in (self._requests, self._retries):
            while times and times[0] <= now - WINDOW_S:
                times.popleft()
        return now
