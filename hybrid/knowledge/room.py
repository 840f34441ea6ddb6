"""The room `index/`: which corpora lie there, which of them are open here, and how they come and go."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from hybrid.errors import Conflict, NotFound, Refused, SetupError, StorageError
from hybrid.knowledge.corpus import Corpus, corpus_lock
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.pg import PgEngine
from hybrid.knowledge.reader import FILE as READER
from hybrid.knowledge.tuned import FILE
from hybrid.rooms import Home, check_name
from hybrid.settings import RetrievalSettings
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.knowledge")

#: who runs commands here, and trains
OWNER = Rights()


class Room:
    """The corpora of a home, each opened when it is first asked for. Safe to use from many threads and beside other
    processes."""

    def __init__(
        self, home: Home, embedder: Embedder, settings: RetrievalSettings, engine: PgEngine | None = None
    ) -> None:
        self._home = home
        self._embedder = embedder
        self._settings = settings
        self._engine = engine
        #: by name, the number of the file that is open, which a corpus that was restored does not share
        self._open: dict[str, tuple[int, Corpus]] = {}
        self._opening = threading.Lock()
        #: the corpora that were left out of `names`, because they are damaged, or a newer version's
        self.unreadable: set[str] = set()

    @property
    def trouble(self) -> str:
        """Why meaning is not searched for in an open corpus, in words for everybody; empty while it is in all."""
        return next((corpus.trouble for _, corpus in [*self._open.values()] if corpus.trouble), "")

    def names(self) -> list[str]:
        """The corpora that hold something, sorted."""
        found = sorted(path.parent.name for path in self._home.index.glob("*/store.db"))
        self.unreadable.intersection_update(found)
        return [name for name in found if _can_name(name) and self._held(name)]

    def _held(self, name: str) -> int:
        """The passages of a corpus. One that cannot be read is told of and taken for empty: it must not take the others
        with it."""
        try:
            passages = self.corpus(name).info().passages
        except (StorageError, SetupError) as error:
            if name not in self.unreadable:
                log.error("%s is left out. %s", name, error.message)
            self.unreadable.add(name)
            return 0
        self.unreadable.discard(name)
        return passages

    def folder(self, name: str) -> Path:
        """Where a corpus lies. Raises Refused for a name that cannot be one."""
        return self._home.index / check_name(name, "corpus")

    def corpus(self, name: str, rights: Rights = OWNER) -> Corpus:
        """An open corpus. One that is not there and one that is not theirs are unknown alike. Raises NotFound."""
        if _can_name(name) and rights.sees(name) and (self.folder(name) / "store.db").is_file():
            return self.made(name)
        known = _known([known for known in self.names() if rights.sees(known)])
        raise NotFound(f"There is no corpus {name[:80]!r}. {known}", param="corpus")

    def made(self, name: str) -> Corpus:
        """The open corpus, made if need be; opened anew when its file is another one than it was."""
        folder = self.folder(name)
        database = folder / "store.db"
        with self._opening:
            opened = self._open.get(name)
            inode = database.stat().st_ino if database.exists() else 0
            if opened and opened[0] == inode:
                return opened[1]
            corpus = Corpus(name, folder, self._embedder, self._settings, self._engine)
            self._open[name] = (database.stat().st_ino, corpus)
            return corpus

    def remove(self, name: str) -> None:
        """Takes a corpus away, be it damaged. What made it (a recipe, documents) stays. Raises NotFound."""
        with contextlib.suppress(StorageError):
            self.corpus(name)
        folder = self.folder(name)
        with corpus_lock(folder):
            with self._opening:
                self._shut(name)
                # the database first: SQLite throws the log of a database away that is not there
                for file in [folder / "store.db", *folder.glob("store*.db*"), folder / FILE, folder / READER]:
                    file.unlink(missing_ok=True)
                shutil.rmtree(folder / "generations", ignore_errors=True)
            if self._engine is not None:
                self._engine.tidy(folder)

    def rename(self, name: str, new: str) -> None:
        """Gives a corpus another name; one that holds nothing yet has none. Raises Conflict, Refused."""
        folder, target = self.folder(name), self.folder(new)
        if not (folder / "store.db").is_file():
            return
        with corpus_lock(folder), self._opening:
            if (target / "store.db").exists():
                raise Conflict(f"There is a corpus {new!r} already.", param="name")
            self._shut(name)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)

    def close(self) -> None:
        """Releases every connection to a store."""
        with self._opening:
            for name in [*self._open]:
                self._shut(name)

    def _shut(self, name: str) -> None:
        """Closes a corpus if it is open. The caller holds `_opening`."""
        opened = self._open.pop(name, None)
        if opened:
            opened[1].store.close()


def _can_name(name: str) -> bool:
    try:
        check_name(name, "corpus")
    except Refused:
        return False
    return True


def _known(names: Sequence[str]) -> str:
    return f"Known: {', '.join(names)}." if names else "There is none yet; `hybrid index DIR --name NAME` makes one."
