"""Makes the vectors of a corpus again, in the background of the server, one corpus at a time, giving way to answers.

The new ones are committed in one transaction, and until then searches see the old ones: a stop of the server loses the
work of a rebuild and nothing else, so what is in line is kept in memory alone.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from hybrid.errors import Conflict, HybridError
from hybrid.lifecycle.child import GiveWay
from hybrid.lifecycle.corpora import Corpora
from hybrid.types import JSON
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.lifecycle")
_POLL_S = 0.2
_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How far one is: `done` of `total` passages have their new vector. A failed one stays until the next."""

    status: Literal["queued", "running", "failed"]
    done: int = 0
    total: int = 0
    error: str | None = None


class _UnwantedError(Exception):
    """The one at work was called off."""


class Rebuilder:
    """The corpora that are to be made again. `busy`: people's requests are being answered."""

    def __init__(self, corpora: Corpora, busy: Callable[[], bool]) -> None:
        self._corpora = corpora
        self._busy = busy
        self._known: dict[str, Rebuild] = {}  # by corpus id, in the order they came
        self._lock = threading.Lock()

    def order(self, corpus: JSON) -> None:
        """Puts a corpus in line, unless it stands there. Raises Conflict for one that holds nothing."""
        info = self._corpora.info(corpus)
        if info is None or not info.passages:
            raise Conflict(f"{corpus['name']} holds nothing to be made again; put documents into it first.")
        with self._lock:
            if self._status(corpus["id"]) not in ("queued", "running"):
                self._known.pop(corpus["id"], None)
                self._known[corpus["id"]] = Rebuild("queued", total=info.passages)

    def told(self, corpus: JSON) -> JSON | None:
        """How far the one of a corpus is; None where none waits, runs or failed."""
        found = self._known.get(corpus["id"])
        return None if found is None else asdict(found)

    def cancel(self, corpus: JSON) -> None:
        """Calls off the one of a corpus; its vectors stay as they are."""
        with self._lock:
            self._known.pop(corpus["id"], None)

    async def run(self) -> None:
        """Works for ever. Cancelling it calls off the one at work."""
        try:
            while True:
                waiting = [corpus for corpus, one in list(self._known.items()) if one.status == "queued"]
                if waiting:
                    await asyncio.to_thread(self._do, waiting[0])
                else:
                    await asyncio.sleep(_POLL_S)
        finally:
            self._known.clear()  # the thread sees that nobody wants it any more

    def _do(self, corpus_id: str) -> None:
        way = GiveWay()

        def progress(_step: str, done: int, total: int) -> None:
            self._tell(corpus_id, Rebuild("running", done, total))
            while way.stop(self._busy(), time.monotonic()):
                time.sleep(_TICK_S)
                self._tell(corpus_id, Rebuild("running", done, total))

        try:
            progress("", 0, 0)
            self._corpora.library.rebuild(self._corpora.get(corpus_id, Rights())["name"], progress)
            with self._lock:
                self._known.pop(corpus_id, None)
        except _UnwantedError:
            log.info("the rebuild of %s was called off", corpus_id)
        except HybridError as error:
            self._fail(corpus_id, error.message)
        except Exception:
            log.exception("%s could not be made again", corpus_id)
            self._fail(corpus_id, "Something broke; the server's log says what. The corpus is as it was.")

    def _tell(self, corpus_id: str, now: Rebuild) -> None:
        """Raises _UnwantedError once it was called off."""
        with self._lock:
            if corpus_id not in self._known:
                raise _UnwantedError
            self._known[corpus_id] = now

    def _fail(self, corpus_id: str, error: str) -> None:
        with self._lock:
            if corpus_id in self._known:
                self._known[corpus_id] = Rebuild("failed", error=error)

    def _status(self, corpus_id: str) -> str:
        found = self._known.get(corpus_id)
        return found.status if found else ""
