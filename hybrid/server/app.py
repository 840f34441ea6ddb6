"""The HTTP API as one app. Whatever else shares the port (the UI at `/`) is mounted after these routes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from hybrid import __version__
from hybrid.evaluation.asking import CALLER
from hybrid.gateway import Gateway
from hybrid.lifecycle.attacher import Attacher
from hybrid.lifecycle.attachments import Attachments
from hybrid.lifecycle.corpora import Corpora
from hybrid.lifecycle.evaluations import EvaluationBook
from hybrid.lifecycle.evaluator import Evaluator
from hybrid.lifecycle.orders import Orders
from hybrid.lifecycle.rebuilds import Rebuilder
from hybrid.lifecycle.runner import Runner
from hybrid.server import (
    adapters,
    chat,
    decisions,
    errors,
    evaluations,
    files,
    health,
    library,
    models,
    tuning,
    vector_files,
    vector_stores,
)
from hybrid.server.access import Access
from hybrid.server.house import House, Traffic
from hybrid.server.limits import Door
from hybrid.server.metrics import Metrics
from hybrid.settings import Settings
from hybrid.training.files import Files
from hybrid.training.jobs import JobBook

log = logging.getLogger("hybrid.server")
ROUTERS = (
    chat.router, models.router, adapters.router, decisions.router, files.router, vector_files.router,
    vector_stores.router, library.router, tuning.router, evaluations.router, health.router,
)  # fmt: skip


def create_app(gateway: Gateway, settings: Settings, *, token: str | None = None) -> FastAPI:
    """The app around a running gateway. `token` is an admin key that holds as long as this process (`server.json`)."""
    book = EvaluationBook(gateway.state)
    evaluator = _evaluator(gateway, settings, book)
    corpora = Corpora(settings.rooms, gateway.state, gateway.library)
    attachments = Attachments(gateway.state, corpora)
    uploads = Files(settings.rooms, gateway.state)
    attacher = Attacher(settings.rooms, attachments, uploads, busy=lambda: gateway.answering > 0)
    rebuilder = Rebuilder(corpora, busy=lambda: gateway.answering > 0)
    house = House(
        gateway,
        settings,
        Metrics(gateway.status),
        Traffic(),
        uploads,
        JobBook(gateway.state),
        Orders(settings, state=gateway.state, store=gateway.store),
        book,
        evaluator,
        corpora,
        attachments,
        rebuilder,
    )
    app = FastAPIOffline(
        title="hybrid",
        version=__version__,
        description="OpenAI's API over one base model, many adapters and a gate; the model 'auto' lets it decide.",
        redirect_slashes=False,
        redoc_url=None,
        lifespan=lambda _: beside(_runner(gateway, settings).run(), evaluator.run(), attacher.run(), rebuilder.run()),
    )
    app.state.house = house
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_middleware(
        Door,
        settings=settings.server,
        access=Access(
            gateway.keys, token=token or secrets.token_urlsafe(32), closed=not loopback(settings.server.host)
        ),
        metrics=house.metrics,
        traffic=house.traffic,
    )
    return app


def _runner(gateway: Gateway, settings: Settings) -> Runner:
    """Trains in the background of this server, giving way to its answers."""
    return Runner(
        settings,
        state=gateway.state,
        store=gateway.store,
        loader=gateway.loader,
        busy=lambda: gateway.answering > 0,
        ready=lambda: gateway.ready()[0],
    )


def _evaluator(gateway: Gateway, settings: Settings, book: EvaluationBook) -> Evaluator:
    """Evaluates in the background of this server, giving way to the answers that it did not ask for itself."""
    return Evaluator(
        settings,
        book,
        busy=lambda: gateway.answering_others(CALLER) > 0,
        ready=lambda: gateway.ready()[0],
    )


@contextlib.asynccontextmanager
async def beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs each of `works` while the block runs. A failure of one is logged; serving goes on."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_report)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("background work ended: %s", error, exc_info=error)


def loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
