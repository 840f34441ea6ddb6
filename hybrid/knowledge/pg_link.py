"""Connections to a PostgreSQL server, with an end to every wait: a server that is gone, slow or frozen costs seconds.

After a failure nobody tries again for `RETRY_S`, so that a search in an outage does not wait for it. The password
stands in the address alone: no message, log line or `repr` has it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from hybrid.errors import NotReady, Refused, SetupError

if TYPE_CHECKING:
    from psycopg import Connection, Cursor, Error

log = logging.getLogger("hybrid.knowledge")

CONNECT_S = 3
#: a search, from the first byte sent to the last one read
ASK_S = 5.0
#: one statement of a publication: loading many vectors, or building the graph over them
WRITE_S = 4 * 3600.0
RETRY_S = 5.0
#: connections at once
MOST = 16

#: a server whose machine vanished is noticed within seconds, also while it is written to
_WIRE = {"connect_timeout": CONNECT_S, "keepalives_idle": 5, "keepalives_interval": 2, "tcp_user_timeout": 10_000}
#: SQLSTATE classes that say something of the server, not of what was asked: connection, login, no such database,
#: resources, shutdown or a time-out
_OF_THE_SERVER = ("08", "28", "3D", "53", "57")
_CANCELED = "57014"

T = TypeVar("T")


class Link:
    """One server, safe to use from many threads. Raises SetupError for an address that is none."""

    def __init__(self, url: str) -> None:
        self._conninfo, self._password, self.name = _read(url)
        self._idle: deque[Connection[Any]] = deque()
        self._room = threading.BoundedSemaphore(MOST)
        self._away_until = 0.0
        #: why nobody asks the server at this moment, for everybody to read; empty while it answers
        self.trouble = ""

    def ask(self, work: Callable[[Cursor[Any]], T]) -> T:
        """What `work` returns, in one transaction of at most `ASK_S`. Work may be done twice.

        Raises NotReady while the server does not answer, Refused where a table is not there, and what `work` raises.
        """
        return self._run(work, ASK_S, 1.5 * ASK_S)  # the server's own time-out comes first, unless it hangs

    def write(self, work: Callable[[Cursor[Any]], T]) -> T:
        """The same for work that may take long; each of its statements has `WRITE_S`."""
        return self._run(work, WRITE_S, None)

    def probe(self) -> None:
        """Looks whether the server answers, so that `trouble` is known before anybody searches."""
        with contextlib.suppress(NotReady):
            self.ask(lambda cursor: None)

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        while (kept := self._kept()) is not None:
            kept.close()

    def _run(self, work: Callable[[Cursor[Any]], T], statement_s: float, whole_s: float | None) -> T:
        import psycopg

        if time.monotonic() < self._away_until:
            raise NotReady(self.trouble)
        if not self._room.acquire(timeout=ASK_S):
            raise NotReady(f"The vector engine is busy: {MOST} connections are in use. Try again shortly.")
        try:
            answer = self._answer(work, statement_s, whole_s)
        except psycopg.errors.UndefinedTable:
            raise Refused("The vector engine does not hold what was published to it.") from None
        except psycopg.Error as error:
            raise self._failed(error) from None  # what psycopg says stays here: it is told without the password
        finally:
            self._room.release()
        if self.trouble:
            log.warning("%s answers again.", self.name)
        self.trouble = ""
        return answer

    def _answer(self, work: Callable[[Cursor[Any]], T], statement_s: float, whole_s: float | None) -> T:
        import psycopg

        kept = self._kept()
        if kept is not None:
            try:
                return self._once(kept, work, statement_s, whole_s)
            except psycopg.OperationalError as error:
                if error.sqlstate == _CANCELED:
                    raise
                self.close()  # the server was started anew since, and every other one is broken as well
        return self._once(self._connected(), work, statement_s, whole_s)

    def _kept(self) -> Connection[Any] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _once(
        self, connection: Connection[Any], work: Callable[[Cursor[Any]], T], statement_s: float, whole_s: float | None
    ) -> T:
        try:
            with _fuse(connection, whole_s), connection.transaction(), connection.cursor() as cursor:
                limit = str(round(statement_s * 1000))
                # within the transaction alone, as a pool in front of the server may give the session to another
                cursor.execute(
                    "SELECT set_config('statement_timeout', %s, true), set_config('jit', 'off', true)", [limit]
                )
                answer = work(cursor)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return answer

    def _connected(self) -> Connection[Any]:
        import psycopg

        # nothing is prepared on the server: a pool in front of it would mix sessions up
        connection = psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=None)
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        return connection

    def _failed(self, error: Error) -> NotReady:
        """What is told of a failure; of one of the server itself everybody is told for a while."""
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        reason = reason.replace(self._password, "…") if self._password else reason
        if error.sqlstate is not None and error.sqlstate[:2] not in _OF_THE_SERVER:
            log.warning("%s refused what was asked of it: %s", self.name, reason)
            return NotReady("The vector engine refused what was asked of it; the log says why.")
        if not self.trouble:
            log.warning("%s does not answer: %s", self.name, reason)
        self.trouble = "The vector engine does not answer; corpora are searched by their words until it does."
        self._away_until = time.monotonic() + RETRY_S
        return NotReady(self.trouble)


@contextlib.contextmanager
def _fuse(connection: Connection[Any], seconds: float | None) -> Iterator[None]:
    """Breaks the connection after so long. The server's own time-out is of no use where the server hangs."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, _cut, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _cut(connection: Connection[Any]) -> None:
    import psycopg

    with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.fileno())) as wire:
        wire.shutdown(socket.SHUT_RDWR)


def _read(url: str) -> tuple[str, str, str]:
    """(libpq's connection string, the password in it, the server as it may be named). Raises SetupError."""
    try:
        import psycopg
        from psycopg.conninfo import conninfo_to_dict, make_conninfo
    except ImportError:
        raise SetupError(
            "retrieval.vector_engine needs the package psycopg; run `pip install 'hybrid[pgvector]'`."
        ) from None
    try:
        if not url.startswith(("postgresql://", "postgres://")):
            raise psycopg.ProgrammingError
        parts = conninfo_to_dict(url)
        # a bare sign in a password makes a port or a database of what follows it, and those are shown
        port = str(parts.get("port") or "")
        if not re.fullmatch(r"[\d,]*", port) or "@" in f"{parts.get('host')}{parts.get('dbname')}":
            raise psycopg.ProgrammingError
    except psycopg.Error:
        raise SetupError(
            "retrieval.vector_engine is no address of the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE; signs "
            "such as @ and / in a password are written %40 and %2F."
        ) from None
    host = parts.get("host") or "this machine"
    name = f"pgvector at {host}{f':{port}' if port else ''}/{parts.get('dbname') or parts.get('user') or ''}"
    ours: dict[str, str | int | None] = {**_WIRE, "application_name": "hybrid"}
    return make_conninfo("", **{**ours, **parts}), str(parts.get("password") or ""), name
