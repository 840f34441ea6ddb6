"""One open corpus: its store, the generation that is searched, and the passages committed since."""

from __future__ import annotations

import contextlib
import logging
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from hybrid.errors import HybridError, NotFound, Refused
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.filters import Matches
from hybrid.knowledge.index import Snapshot, build, extended, load
from hybrid.knowledge.ingest import check_embedder
from hybrid.knowledge.store import Meta, Store
from hybrid.knowledge.visible import Holdings, Visible
from hybrid.types import JSON, Passage, Rights

log = logging.getLogger("hybrid.knowledge")

#: so many passages are searched in memory beside a generation before the next one is published
FRESH = 1024


@dataclass(frozen=True, slots=True)
class CorpusInfo:
    """A corpus as it is listed."""

    name: str
    passages: int
    documents: int
    generation: int
    embedder: str
    bytes: int = 0

    def wire(self) -> JSON:
        return asdict(self)


class Corpus:
    """One corpus open for reading, and for mending its generation when that turns out damaged."""

    def __init__(self, name: str, folder: Path, embedder: Embedder) -> None:
        self.name = name
        self.store = Store(folder / "store.db")
        self._folder = folder
        self._embedder = embedder
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._counts = (-1, 0, 0, 0)
        self._holdings: Holdings | None = None

    def info(self) -> CorpusInfo:
        meta = self.store.meta() or Meta(0, 0, "", "", "", 0)
        if self._counts[0] != meta.revision:
            self._counts = (meta.revision, *self.store.counts(), self.store.size())
        _, passages, documents, size = self._counts
        return CorpusInfo(self.name, passages, documents, meta.generation, meta.embedder, size)

    def meta(self) -> Meta:
        """The row of `meta`. Raises Refused when the vectors are another embedder's."""
        meta = self.store.meta()
        if meta is None:
            raise NotFound(f"The corpus {self.name!r} is empty; run `hybrid index DIR --name {self.name}`.")
        check_embedder(self.name, meta, self._embedder)
        return meta

    def snapshot(self) -> Snapshot:
        """What is committed now."""
        meta = self.meta()
        current = self._snapshot
        if current and current.revision == meta.revision:
            return current
        with self._lock:
            current = self._snapshot
            if current is None or current.generation != meta.generation:
                current, meta = self._open(meta)
            if current.revision != meta.revision:
                current = extended(current, meta, self.store)
            self._snapshot = current
            return current

    def visible(self, rights: Rights, matches: Matches | None = None) -> Visible | None:
        """What a caller may find here; None for everything."""
        if rights.admin and matches is None:
            return None
        revision, held = self.meta().revision, self._holdings
        if held is None or held.revision != revision:
            held = self._holdings = Holdings(revision, *self.store.holdings())
        return held.visible(rights, matches)

    def search(self, vector: Vectors, k: int, rights: Rights, matches: Matches | None = None) -> list[list[Passage]]:
        """The `k` nearest texts that a caller may find, best first, each under all its ids."""
        snapshot, visible = self.snapshot(), self.visible(rights, matches)
        wanted = k
        while True:
            hits = snapshot.nearest(vector, wanted, visible.rows if visible else None)
            named = self.store.passages([row for row, _ in hits])
            if visible:
                seen = {row: [p for p in group if p.document in visible.documents] for row, group in named.items()}
                named = {row: group for row, group in seen.items() if group}
            found = [(named[row], score) for row, score in hits if row in named]
            if len(found) >= k or len(hits) < wanted:
                break
            wanted *= 2  # some hits were deleted since the snapshot
        return [[replace(p, score=score, corpus=self.name) for p in group] for group, score in found[:k]]

    def publish(self) -> None:
        """Builds a generation unless the current one is whole and holds everything. The caller holds the lock."""
        meta = self.meta()
        with contextlib.suppress(Refused):
            if load(self.generations, meta).revision == meta.revision:
                return
        build(self.generations, self.store)

    def publish_when_due(self) -> None:
        """Publishes once much was added or taken away since the last time. The caller holds the lock.

        Until then what is new is searched in memory beside the generation, and what is gone is left out.
        """
        snapshot, held = self.snapshot(), self.info().passages
        added = len(snapshot.fresh_rows)
        gone = len(snapshot) - held
        if added + gone > max(FRESH, held // 10):
            self.publish()

    @property
    def generations(self) -> Path:
        return self._folder / "generations"

    def _open(self, meta: Meta) -> tuple[Snapshot, Meta]:
        """The current generation; a damaged one is built again from the store, which is always served from."""
        from_store = Snapshot(meta.generation, -1, 0)
        if meta.generation == 0:
            return from_store, meta
        try:
            return load(self.generations, meta), meta
        except Refused as error:
            latest = self.meta()
            if latest.generation != meta.generation:  # another process published and swept meanwhile
                return self._open(latest)
            log.warning("%s It is built again from the store.", error.message)
        try:
            with corpus_lock(self._folder, timeout=0):
                build(self.generations, self.store)
            latest = self.meta()
            return load(self.generations, latest), latest
        except (Timeout, OSError, HybridError) as error:
            log.warning("%s is searched from the store: no new generation was built (%s).", self.name, error)
            return from_store, meta


def corpus_lock(folder: Path, timeout: float = -1) -> FileLock:
    """The lock of whoever writes to a corpus; others wait for it. A crash frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "store.lock", timeout=timeout)
