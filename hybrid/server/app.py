"""The HTTP API as one app. Whatever else shares the port (the UI at `/`) is mounted after these routes."""

from __future__ import annotations

import ipaddress
import secrets

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from hybrid import __version__
from hybrid.gateway import Gateway
from hybrid.keys import Keys
from hybrid.server import adapters, chat, decisions, errors, health, models
from hybrid.server.access import Access
from hybrid.server.house import House, Traffic
from hybrid.server.limits import Door
from hybrid.server.metrics import Metrics
from hybrid.settings import Settings

ROUTERS = (chat.router, models.router, adapters.router, decisions.router, health.router)


def create_app(gateway: Gateway, settings: Settings, *, token: str | None = None) -> FastAPI:
    """The app around a running gateway. `token` is an admin key that holds as long as this process (`server.json`)."""
    house = House(gateway, settings, Metrics(gateway.status), Traffic())
    app = FastAPIOffline(
        title="hybrid",
        version=__version__,
        description="OpenAI's API over one base model, many adapters and a gate; the model 'auto' lets it decide.",
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.house = house
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    app.add_middleware(
        Door,
        settings=settings.server,
        access=Access(
            Keys(gateway.state), token=token or secrets.token_urlsafe(32), closed=not loopback(settings.server.host)
        ),
        metrics=house.metrics,
        traffic=house.traffic,
    )
    return app


def loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that listens on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
