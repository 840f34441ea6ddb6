"""The server's life: one home, one port, one engine; told to stop it finishes what it began.

lock the home → take the port → say where (server.json) → open the gateway → listen → drain → close the engine
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from filelock import FileLock, Timeout

from hybrid.boot import Progress, open_gateway
from hybrid.errors import HomeInUse, SetupError
from hybrid.gateway import Gateway
from hybrid.lifecycle.rating import Raters
from hybrid.rooms import Home, write_json
from hybrid.server.app import beside, create_app, loopback
from hybrid.server.house import Traffic
from hybrid.settings import ServerSettings, Settings

log = logging.getLogger("hybrid.server")

#: mounts the UI on the app, given the URL at which the app will answer
Face = Callable[[FastAPI, str], None]
#: work that goes on beside the serving; cancelled when it ends
Background = Callable[[Gateway], Coroutine[Any, Any, None]]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LINGER_S = 1  # for connections that no request holds: a UI's open event stream
#: an idle connection is kept longer than clients keep theirs (OpenAI's 5 s), or it would be closed just as they send
_KEEP_ALIVE_S = 75
#: objects made before the collector looks (youngest, middle, oldest generation): imports make a million that stay
_COLLECT = (20_000, 20, 50)
#: how long a thread that computes may keep the loop waiting, in seconds; Python's own 5 ms is a request's whole budget
_SWITCH_S = 0.001
_LOOK_S = 0.5


def serve(
    settings: Settings,
    *,
    progress: Progress | None = None,
    announce: Callable[[str], None] = log.info,
    face: Face | None = None,
    background: Background | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. Raises SetupError, HomeInUse (exit code 3)."""
    gc.set_threshold(*_COLLECT)
    sys.setswitchinterval(_SWITCH_S)
    factory = uvicorn.Config("").get_loop_factory()
    with (
        _locked(settings.rooms),
        take_port(settings.server) as listener,
        asyncio.Runner(loop_factory=factory) as runner,
    ):
        runner.run(_serve(settings, listener, progress, announce, face, background))


async def _serve(
    settings: Settings,
    listener: socket.socket,
    progress: Progress | None,
    announce: Callable[[str], None],
    face: Face | None,
    background: Background | None,
) -> None:
    url = _url(settings.server.host, listener.getsockname()[1])
    token = secrets.token_urlsafe(32)
    stop = Stop(settings.server.drain_s)
    with _announced(settings.rooms, url, token), stop.listening(), contextlib.suppress(_Stopped):
        async with stop.starting(), open_gateway(settings, progress, Raters(settings)) as gateway:
            app = create_app(gateway, settings, token=token)
            if face is not None:
                face(app, url)
            server = Server(_config(app))
            stop.running(server, app.state.house.traffic)
            announce(f"hybrid listens on {url} (Ctrl-C stops it).")
            if not loopback(settings.server.host):
                announce("Others can reach this address, so every request needs a key: `hybrid keys create NAME`.")
            works = [background(gateway)] if background else []
            async with beside(_settle(gateway), *works):
                await server.serve([listener])


async def _settle(gateway: Gateway) -> None:
    """Once an answer would work, what was loaded for it stays: a collection that looked through all of it would hold
    every stream up for tenths of a second."""
    while not gateway.ready()[0]:  # noqa: ASYNC110  the engine's phase is looked at, it announces nothing
        await asyncio.sleep(_LOOK_S)
    gc.freeze()


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LINGER_S,
    )


class _Stopped(Exception):
    """A signal came before the server could be asked to stop."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: its own stop listening at once, and a drain must still answer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to `Stop`."""
        yield


class Stop:
    """What SIGTERM and SIGINT do. The first drains: new requests get 503, those in flight have `drain_s` to finish.
    The second ends them too. Either way the gateway closes the engine on the way out."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._signals = 0
        self._server: Server | None = None
        self._traffic = Traffic()
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals meanwhile."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """A signal until `running` ends the block with `_Stopped`."""
        self._starting = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if not self._signals or self._starting is None:
                raise
            self._starting.uncancel()
            raise _Stopped from None

    def running(self, server: Server, traffic: Traffic) -> None:
        """From now on signals stop this server."""
        self._server, self._traffic = server, traffic

    def _signalled(self) -> None:
        self._signals += 1
        if self._server is None:
            if self._starting is not None:
                self._starting.cancel()
        elif self._signals == 1:
            self._draining = asyncio.create_task(self._drain(self._server))
        else:
            self._server.force_exit = self._server.should_exit = True

    async def _drain(self, server: Server) -> None:
        self._traffic.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._traffic.idle(), self._drain_s)
        server.should_exit = True


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    """One server a home. Raises HomeInUse naming the process that serves it."""
    home.hidden.mkdir(parents=True, exist_ok=True)
    path = home.hidden / "server.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            other = json.loads(home.server_file.read_text())
            who = f"process {other['pid']} at {other['url']}"
        except (OSError, ValueError, KeyError):
            who = "another process"
        raise HomeInUse(
            f"{home.root} is served already by {who} (lock {path}); stop it, or set HYBRID_HOME to another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def take_port(settings: ServerSettings) -> Iterator[socket.socket]:
    """The port, taken before anything slow begins. Raises SetupError when it cannot be had."""
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # inherited by every connection: a token must not wait 40 ms for the acknowledgement of the one before it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, port))
            listener.set_inheritable(False)
        except OSError as error:
            raise _no_port(host, port, error) from error
        try:
            yield listener
        except OSError as error:  # bound by two, listened to by one
            if error.errno != errno.EADDRINUSE:
                raise
            raise _no_port(host, port, error) from error


def _no_port(host: str, port: int, error: OSError) -> SetupError:
    if error.errno == errno.EADDRINUSE:
        return SetupError(f"Port {port} of {host} is taken: stop what listens there, or use --port 0 for a free one.")
    return SetupError(f"hybrid cannot listen on {host}:{port} ({error.strerror or error}); choose --host and --port.")


@contextlib.contextmanager
def _announced(home: Home, url: str, token: str) -> Iterator[None]:
    """`server.json` for the commands of this home, readable by its owner alone, gone when the server is."""
    old = os.umask(0o077)
    try:
        write_json(home.server_file, {"url": url, "pid": os.getpid(), "token": token})
    finally:
        os.umask(old)
    try:
        yield
    finally:
        home.server_file.unlink(missing_ok=True)


def _url(host: str, port: int) -> str:
    """Where a program on this machine reaches the server."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - not bound here, only named
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
