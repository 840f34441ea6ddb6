"""One open corpus: its store, the generation that is searched, and the passages committed since."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from hybrid.errors import HybridError, NotFound, Refused
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.filters import Matches
from hybrid.knowledge.index import Snapshot, build, extended, load
from hybrid.knowledge.ingest import check_embedder
from hybrid.knowledge.lexical import Words, scored
from hybrid.knowledge.ranking import Hit
from hybrid.knowledge.store import Meta, Store
from hybrid.knowledge.tuned import FILE, Tuned
from hybrid.knowledge.visible import Holdings, Visible
from hybrid.types import JSON, Passage, Rights, Scores

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


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A question: its unit vector float32 [dim], its words where they are searched for, and whether meaning is."""

    vector: Vectors
    text: str = ""
    dense: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class Candidates:
    """What one corpus has for a question, in no order, and how rare the question's words are in it."""

    hits: Sequence[Hit]
    rarity: Mapping[str, float]


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
        self._tuned = (0, Tuned())
        self._fresh: tuple[tuple[int, int, int], Words] | None = None

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

    def candidates(self, asked: Asked, k: int, rights: Rights, matches: Matches | None = None) -> Candidates:
        """The texts that a caller may find, those nearest in meaning and those with the words: `k` at least of each
        way that is asked for, where there are as many."""
        snapshot, visible = self.snapshot(), self.visible(rights, matches)
        only = visible.rows if visible else None
        words = scored(self._words(snapshot), asked.text) if asked.text else None
        wanted = k
        while True:
            near = dict(snapshot.nearest(asked.vector, wanted, only)) if asked.dense else {}
            worded = words.best(wanted, only) if words else np.empty(0, np.int64)
            rows = list(dict.fromkeys([*near, *worded.tolist()]))
            named = self._named(rows, visible)
            if len(named) >= k or max(len(near), len(worded)) < wanted:
                break
            wanted *= 2  # some hits were deleted since the snapshot
        rows = [row for row in rows if row in named]
        cosines = self._cosines(asked.vector, [row for row in rows if row not in near]) | near
        lexical = words.of(np.array(rows, np.int64)) if words else np.zeros(len(rows), np.float32)
        scores = [
            Scores(cosines[row], float(worth)) for row, worth in zip(rows, lexical, strict=True) if row in cosines
        ]
        rows = [row for row in rows if row in cosines]
        hits = [Hit(self.name, row, named[row], score) for row, score in zip(rows, scores, strict=True)]
        return Candidates(hits, words.rarity if words else {})

    def vectors(self, rows: Sequence[int]) -> dict[int, Vectors]:
        """By row, the unit vectors float32 [dim] of these passages."""
        kept, vectors = self.store.vectors(self.meta().dim, only=rows)
        return dict(zip(kept.tolist(), vectors, strict=True))

    def tuned(self) -> Tuned:
        """What its own questions taught about searching it."""
        path = self._folder / FILE
        state = path.stat().st_mtime_ns if path.is_file() else 0
        if self._tuned[0] != state:
            self._tuned = (state, Tuned.load(self._folder))
        return self._tuned[1]

    def tune(self, learned: Tuned) -> None:
        """Keeps what was learned, for every process."""
        learned.save(self._folder)

    def _words(self, snapshot: Snapshot) -> list[Words]:
        """The index of words of the generation, and of what is searched beside it."""
        old = [] if snapshot.words is None else [snapshot.words]
        if not len(snapshot.fresh_rows):
            return old
        key = (snapshot.generation, int(snapshot.fresh_rows[0]), snapshot.last)
        if self._fresh is None or self._fresh[0] != key:
            self._fresh = (key, Words.stored(self.store, snapshot.fresh_rows.tolist()))
        return [*old, self._fresh[1]]

    def _named(self, rows: Sequence[int], visible: Visible | None) -> dict[int, list[Passage]]:
        """By row, the passage under each id that the caller may see; rows that are gone or hidden are left out."""
        named = self.store.passages(rows)
        if visible is None:
            return named
        seen = {row: [p for p in group if p.document in visible.documents] for row, group in named.items()}
        return {row: group for row, group in seen.items() if group}

    def _cosines(self, vector: Vectors, rows: Sequence[int]) -> dict[int, float]:
        return {row: float(own @ vector) for row, own in self.vectors(rows).items()} if rows else {}

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
