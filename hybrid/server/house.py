"""What every route shares: the gateway, the settings, the instruments and whether the server is leaving."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from starlette.requests import Request

from hybrid.gateway import Gateway
from hybrid.lifecycle.attachments import Attachments
from hybrid.lifecycle.corpora import Corpora
from hybrid.lifecycle.evaluations import EvaluationBook
from hybrid.lifecycle.evaluator import Evaluator
from hybrid.lifecycle.orders import Orders
from hybrid.lifecycle.rebuilds import Rebuilder
from hybrid.server.metrics import Metrics
from hybrid.settings import Settings
from hybrid.training.files import Files
from hybrid.training.jobs import JobBook


class Traffic:
    """The API requests of the moment. `draining` is set once, when the server is told to stop."""

    def __init__(self) -> None:
        self.inflight = 0
        self.draining = False
        self._by: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    def of(self, caller: str) -> int:
        """How many of them are this caller's."""
        return self._by[caller]

    def count(self, change: int, caller: str) -> None:
        """One more of a caller's, or one less."""
        self.inflight += change
        self._by[caller] += change
        if not self._by[caller]:
            del self._by[caller]
        if self.inflight:
            self._idle.clear()
        else:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until no request is in flight."""
        await self._idle.wait()


@dataclass(frozen=True, slots=True)
class House:
    """Put on `app.state.house` by `create_app`."""

    gateway: Gateway
    settings: Settings
    metrics: Metrics
    traffic: Traffic
    files: Files
    jobs: JobBook
    orders: Orders
    evaluations: EvaluationBook
    evaluator: Evaluator
    corpora: Corpora
    attachments: Attachments
    rebuilds: Rebuilder

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the model can hold."""
        return self.gateway.engine.status().max_model_len or self.settings.engine.max_model_len


def house(request: Request) -> House:
    """The house a request came to."""
    found: House = request.app.state.house
    return found
