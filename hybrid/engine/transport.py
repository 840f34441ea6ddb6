"""HTTP to the engine: one kept session over a UNIX socket or TCP, deadlines, and every failure as one of our errors."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp

from hybrid.engine.retries import RetryBudget
from hybrid.engine.wire import http_error
from hybrid.errors import EngineError, EngineTimeout, HybridError, NotReady
from hybrid.types import JSON

#: more attempts while the connection itself cannot be made (nothing was sent, so nothing is done twice), if the budget
#: has them
CONNECT_RETRIES = 2
#: seconds an idle connection is kept: under the 5 s after which vLLM closes it, so that none dies as it is used
KEEP_ALIVE_S = 3.0


class Transport:
    """Sends requests to `unix:/path/to.sock` or `http://host:port[/v1]`."""

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.retries = RetryBudget(clock)
        self._socket = address.removeprefix("unix:") if address.startswith("unix:") else None
        self._base = "http://engine" if self._socket else address.rstrip("/").removesuffix("/v1")
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def send(
        self,
        method: str,
        path: str,
        body: JSON | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float,
        check: bool = True,
        retry: bool = True,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response, with a good status unless `check` is off.

        Leaving early closes its connection, which aborts the work in the engine. `timeout_s` is until the status
        line. Raises NotReady, EngineTimeout, EngineRejected, EngineError; what goes wrong while the caller reads is
        translated here too.
        """
        try:
            async with within(timeout_s, "The engine did not begin to answer in time."):
                response = await self._connect(method, path, body, headers, retry)
            try:
                if check and response.status >= 400:
                    async with within(timeout_s, "The engine did not say in time what is wrong."):
                        raise http_error(response.status, await response.read())
                yield response
            finally:
                # at its end this has given the connection back already, and does nothing
                response.close()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineError(f"The engine broke off ({type(error).__name__}). Ask again.") from error

    async def post(self, path: str, body: JSON, headers: Mapping[str, str] | None = None, *, timeout_s: float) -> bytes:
        """The whole answer to a POST, which may take `timeout_s` seconds in all."""
        async with (
            within(timeout_s, "The engine did not answer in time."),
            self.send("POST", path, body, headers, timeout_s=timeout_s) as response,
        ):
            return await response.read()

    async def attempt(self, path: str, body: JSON, *, timeout_s: float) -> HybridError | None:
        """A POST that the engine may refuse: its refusal is returned. That it cannot be asked is raised."""
        async with (
            within(timeout_s, "The engine did not answer in time."),
            self.send("POST", path, body, timeout_s=timeout_s, check=False) as response,
        ):
            return http_error(response.status, await response.read()) if response.status >= 400 else None

    async def close(self) -> None:
        """Closes every connection; requests in flight are aborted."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _connect(
        self, method: str, path: str, body: JSON | None, headers: Mapping[str, str] | None, retry: bool
    ) -> aiohttp.ClientResponse:
        """The response, from the attempt that got through. Who asks again and again anyhow does not `retry` here."""
        again = CONNECT_RETRIES if retry else 0
        if retry:
            self.retries.request()
        for attempt in range(again + 1):
            try:
                return await self._open_session().request(method, self._base + path, json=body, headers=headers)
            except aiohttp.ClientConnectorError:
                if attempt == again or not self.retries.retry():
                    break
                await asyncio.sleep(random.uniform(0.05, 0.15) * (attempt + 1))
        raise NotReady("The engine cannot be reached; it is starting or gone. Try again in a moment.")

    def _open_session(self) -> aiohttp.ClientSession:
        """The session, made inside the running loop at the first use."""
        if self._session is None:
            connector: aiohttp.BaseConnector
            if self._socket:
                connector = aiohttp.UnixConnector(self._socket, limit=0, keepalive_timeout=KEEP_ALIVE_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
            )
        return self._session


@asynccontextmanager
async def within(seconds: float, message: str) -> AsyncIterator[None]:
    """Bounds the block to `seconds`. Raises EngineTimeout with `message` (and what took how long)."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise EngineTimeout(f"{message} (over {seconds:g} s)") from error
