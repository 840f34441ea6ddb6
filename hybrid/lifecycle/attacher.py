"""Puts files into corpora in the background of the server, one at a time, giving way to answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hybrid.errors import BadRequest, DataError, HybridError, NotFound
from hybrid.knowledge.parse import KINDS
from hybrid.knowledge.store import About
from hybrid.lifecycle.attachments import MAX_TRIES, Attachments
from hybrid.lifecycle.child import GiveWay
from hybrid.rooms import Home
from hybrid.training.files import Files
from hybrid.types import JSON
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.lifecycle")
_POLL_S = 0.2
_EXPIRE_S = 60.0
_TICK_S = 0.1


class Attacher:
    """Takes the files that wait in `attachments`. `busy`: people's requests are being answered."""

    def __init__(self, home: Home, attachments: Attachments, files: Files, busy: Callable[[], bool]) -> None:
        self._links = home.hidden / "attaching"
        self._attachments = attachments
        self._corpora = attachments.corpora
        self._files = files
        self._busy = busy
        self._looked = float("-inf")

    async def run(self) -> None:
        """Works for ever. Cancelled, it leaves what it was at to the next start."""
        begun = False
        while True:
            try:
                if not begun:
                    await asyncio.to_thread(self._recover)
                    begun = True
                if await self._next():
                    continue
            except Exception:
                # a full disk or a busy database must not end the work for good
                log.exception("files could not be put into corpora; trying again")
            await asyncio.sleep(_POLL_S)

    async def _next(self) -> bool:
        """One file, if one waits."""
        if time.monotonic() - self._looked > _EXPIRE_S:
            self._looked = time.monotonic()
            await asyncio.to_thread(self._corpora.expire)
        row = await asyncio.to_thread(self._attachments.claim)
        if row is not None:
            await self._quiet()
            await asyncio.to_thread(self._do, row)
        return row is not None

    def _recover(self) -> None:
        self._corpora.recover()
        self._attachments.recover()
        for link in self._links.glob("*"):
            link.unlink(missing_ok=True)

    async def _quiet(self) -> None:
        """Waits while requests are answered, but never for ever."""
        way = GiveWay()
        while way.stop(self._busy(), time.monotonic()):  # noqa: ASYNC110 - answers announce nothing
            await asyncio.sleep(_TICK_S)

    def _do(self, row: JSON) -> None:
        """One file, from its bytes to its passages. What goes wrong with it is its own affair."""
        if row["tries"] >= MAX_TRIES:
            words = "The server stopped each time this was read; look into the file, or attach it again."
            self._attachments.end(row, "failed", "server_error", words)
            return
        if (suffix := Path(row["filename"]).suffix.lower()) not in KINDS:
            words = f"Files of type {suffix or '(none)'} are not read; {', '.join(KINDS)} are."
            self._attachments.end(row, "failed", "unsupported_file", words)
            return
        try:
            with self._corpora.lock(row["corpus"]):
                if self._attachments.wanted(row) and not self._attachments.end(row, "completed", size=self._put(row)):
                    self._corpora.library.delete_document(self._name(row), row["file"])  # cancelled meanwhile
        except (DataError, BadRequest) as error:
            self._attachments.end(row, "failed", "invalid_file", error.message)
        except NotFound:
            self._attachments.end(row, "failed", "invalid_file", "The file was deleted before it was read.")
        except HybridError as error:
            self._attachments.end(row, "failed", "server_error", error.message)
        except Exception:
            log.exception("%s could not be put into %s", row["file"], row["corpus"])
            self._attachments.end(row, "failed", "server_error", "Something broke; the server's log says what.")

    def _put(self, row: JSON) -> int:
        """The bytes of text that the document holds."""
        about = About(row["attributes"], row["caller"] if row["groups"] else "", tuple(row["groups"]))
        static = row["chunking"]
        cut = (static["max_chunk_size_tokens"], static["chunk_overlap_tokens"]) if static else None

        def progress(step: str, done: int, total: int) -> None:
            self._attachments.tell(row, step.partition(" ")[0], done, total)

        with self._named(row) as file:
            done = self._corpora.library.add_document(
                self._name(row), row["file"], title=row["filename"], file=file, about=about, cut=cut, progress=progress
            )
        return done.bytes

    def _name(self, row: JSON) -> str:
        return str(self._corpora.get(row["corpus"], Rights())["name"])

    @contextlib.contextmanager
    def _named(self, row: JSON) -> Iterator[Path]:
        """The upload under a name that tells its type."""
        self._links.mkdir(parents=True, exist_ok=True)
        link = self._links / f"{row['file']}{Path(row['filename']).suffix.lower()}"
        link.unlink(missing_ok=True)
        os.link(self._files.path(row["file"], row["caller"]), link)
        try:
            yield link
        finally:
            link.unlink(missing_ok=True)
