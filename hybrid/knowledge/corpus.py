"""One open corpus: its store, the generation that is searched, and the passages committed since."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from hybrid.errors import DataError, HybridError, NotFound, NotReady, Refused
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.filters import Matches
from hybrid.knowledge.index import Snapshot, build, extended, load, manifest
from hybrid.knowledge.ingest import check_embedder
from hybrid.knowledge.kinds import REFINE
from hybrid.knowledge.lexical import Scored, Words, grown, scored
from hybrid.knowledge.pg import PgEngine, PgIndex
from hybrid.knowledge.ranking import Hit
from hybrid.knowledge.reader import FILE as READER
from hybrid.knowledge.reader import Reader
from hybrid.knowledge.store import Holdings, Meta, Rows, Store
from hybrid.knowledge.tuned import FILE, Tuned
from hybrid.knowledge.visible import Visible, shown
from hybrid.settings import RetrievalSettings
from hybrid.types import JSON
from hybrid.types.passage import Passage, Scores
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.knowledge")

#: so many passages are searched in memory beside a generation before the next one is published
FRESH = 1024
#: after a publication that failed the next one is tried so many seconds later
AGAIN_S = 5.0
#: so often is a search done at most that commits overtake while it looks
LOOKS = 16
#: of a sample for a question, so many are those nearest to it
NEAREST = 20


@dataclass(frozen=True, slots=True)
class CorpusInfo:
    """A corpus as it is listed. `stage` is `words` while the vectors of a new corpus are being made and its words alone
    are searched, then `meaning`. `tuned` names what was learned about searching it, where anything was."""

    name: str
    passages: int
    documents: int
    generation: int
    embedder: str
    bytes: int = 0
    engine: str = "faiss"
    stage: str = "meaning"
    tuned: str = ""

    def wire(self) -> JSON:
        return asdict(self)


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A question: its unit vector float32 [dim], its words where they are searched for, and whether meaning is.

    `said` are its words where meaning alone is searched for: they stand in while no vector engine
    answers and while vectors are being made.
    """

    vector: Vectors
    text: str = ""
    dense: bool = True
    said: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Candidates:
    """What one corpus has for a question, in no order, and how rare the question's words are in it. Unless it is
    `ready` vectors are still being made, and the words alone were searched for."""

    hits: Sequence[Hit]
    rarity: Mapping[str, float]
    ready: bool = True


class Corpus:
    """One corpus open for reading, and for mending its generation when that turns out damaged."""

    def __init__(
        self,
        name: str,
        folder: Path,
        embedder: Embedder,
        settings: RetrievalSettings,
        engine: PgEngine | None = None,
    ) -> None:
        self.name = name
        self.store = Store(folder / "store.db")
        self._folder = folder
        self._embedder = embedder
        self._settings = settings
        self._engine = engine
        #: why the vector engine is of no use to this corpus; `settle` mends it
        self.trouble = ""
        self._again_at = 0.0
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._counts = (-1, 0, 0, 0, False)
        self._holdings: tuple[int, Holdings] | None = None
        self._tuned: tuple[int, Tuned, str, Reader | None] = (0, Tuned(), "", None)
        #: the index of words: of which generation, up to which row, and its parts
        self._lexicon: tuple[int, int, tuple[Words, ...]] = (-1, 0, ())

    def info(self) -> CorpusInfo:
        meta = self.store.meta() or Meta(0, 0, "", "", "", 0)
        if self._counts[0] != meta.revision:
            self._counts = (meta.revision, *self.store.counts(), self.store.size(), self.store.is_waiting())
        _, passages, documents, size, waits = self._counts
        engine = "pgvector" if self._engine else "faiss"
        stage = "words" if waits else "meaning"
        return CorpusInfo(
            self.name, passages, documents, meta.generation, meta.embedder, size, engine, stage, self._learned()[1]
        )

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
        if held is None or held[0] != revision:
            held = self._holdings = (revision, self.store.holdings())
        return shown(held[1], rights, matches)

    def candidates(self, asked: Asked, k: int, rights: Rights, matches: Matches | None = None) -> Candidates:
        """The texts that a caller may find, those nearest in meaning and those with the words: `k` at least of each
        way that is asked for, where there are as many.

        While a vector engine is of no use, or vectors are still being made, words alone are searched for, and a vector
        alone finds nothing.
        """
        try:
            return self._candidates(asked, k, rights, matches)
        except NotReady:
            by_words = replace(asked, text=asked.text or asked.said, dense=False)
            return self._candidates(by_words, k, rights, matches) if by_words.text else Candidates((), {})

    def _candidates(self, asked: Asked, k: int, rights: Rights, matches: Matches | None) -> Candidates:
        """What one state of the corpus has: where a commit changed it while it was looked at, it is looked at again."""
        for _ in range(LOOKS):
            snapshot, visible = self.snapshot(), self.visible(rights, matches)
            found, whole = self._look(snapshot, visible, asked, k)
            if (whole and visible is None) or self.meta().revision == snapshot.revision:
                break
        return found

    def _look(self, snapshot: Snapshot, visible: Visible | None, asked: Asked, k: int) -> tuple[Candidates, bool]:
        """What a snapshot has, and whether the store still holds all that was ranked."""
        if not snapshot.ready:
            asked = replace(asked, text=asked.text or asked.said, dense=False)
        only = visible.rows if visible else None
        words = scored(self._words(snapshot), asked.text) if asked.text else None
        wanted = k
        while True:
            near, more = self._near(snapshot, asked.vector, wanted, only) if asked.dense else ({}, False)
            worded = words.best(wanted, only) if words else np.empty(0, np.int64)
            rows = list(dict.fromkeys([*near, *worded.tolist()]))
            held = self.store.passages(rows)
            named = _named(held, visible)
            if len(named) >= k or not (more or len(worded) == wanted):
                break
            wanted *= 2  # some hits were deleted since the snapshot
        scores = self._scores([row for row in rows if row in named], asked.vector, near, words, snapshot.ready)
        hits = [Hit(self.name, row, named[row], score) for row, score in scores.items()]
        whole = len(held) == len(rows) and len(scores) == len(named)
        return Candidates(hits, words.rarity if words else {}, snapshot.ready), whole

    def _scores(
        self, rows: Sequence[int], vector: Vectors, near: Mapping[int, float], words: Scored | None, ready: bool
    ) -> dict[int, Scores]:
        """What meaning and words make of each row. One that was deleted meanwhile is left out; one whose vector
        is still to be made has no cosine."""
        cosines = self._cosines(vector, [row for row in rows if row not in near]) | dict(near)
        lexical = words.of(np.array(rows, np.int64)) if words else np.zeros(len(rows), np.float32)
        return {
            row: Scores(cosines.get(row, 0.0), float(worth))
            for row, worth in zip(rows, lexical, strict=True)
            if row in cosines or not ready
        }

    def vectors(self, rows: Sequence[int]) -> dict[int, Vectors]:
        """By row, the unit vectors float32 [dim] of these passages."""
        kept, vectors = self.store.vectors(self.meta().dim, only=rows)
        return dict(zip(kept.tolist(), vectors, strict=True))

    def sample(
        self, limit: int, seed: int, rights: Rights, near: Vectors | None = None
    ) -> tuple[tuple[Passage, ...], Vectors]:
        """At most `limit` passages that a caller may find, chosen by `seed`, and their vectors float32 [n, dim]; those
        nearest to `near` [dim] are always among them."""
        meta, visible = self.meta(), self.visible(rights)
        rows = np.array(self.store.rows(), np.int64) if visible is None else visible.rows
        if len(rows) > limit:
            close = np.empty(0, np.int64)
            if near is not None:
                with contextlib.suppress(NotReady):
                    only = visible.rows if visible else None
                    found, _ = self._near(self.snapshot(), near, min(NEAREST, limit), only)
                    close = np.intersect1d(np.array(list(found), np.int64), rows)
            others = np.setdiff1d(rows, close)
            drawn = np.random.default_rng(seed).choice(others, limit - len(close), replace=False)
            rows = np.union1d(close, drawn)
        named = _named(self.store.passages(rows.tolist()), visible)
        kept, vectors = self.store.vectors(meta.dim, only=sorted(named))
        return tuple(replace(named[int(row)][0], corpus=self.name) for row in kept), vectors

    def tuned(self) -> Tuned:
        """What its own questions taught about searching it."""
        return self._learned()[0]

    def reader(self) -> Reader | None:
        """What reads the best candidates beside the question, where one was taught."""
        return self._learned()[2]

    def _learned(self) -> tuple[Tuned, str, Reader | None]:
        """What was learned, its digest and its reader, made once a file: a corpus is listed at every request."""
        path = self._folder / FILE
        state = path.stat().st_mtime_ns if path.is_file() else 0
        if self._tuned[0] != state:
            tuned, reader = Tuned.load(self._folder), None
            try:
                reader = Reader.open(self._folder / READER, self._embedder) if tuned.reader else None
            except DataError as error:
                log.warning("%s What was learned with it is not used.", error.message)
                tuned = Tuned()
            self._tuned = (state, tuned, tuned.digest, reader)
        return self._tuned[1:]

    def tune(self, learned: Tuned, reader: Reader | None) -> None:
        """Keeps what was learned, for every process, and the reader that it was learned with."""
        file = self._folder / READER
        if reader is not None:
            learned = replace(learned, reader=reader.save(file))
        learned.save(self._folder)
        if reader is None:
            file.unlink(missing_ok=True)

    def _words(self, snapshot: Snapshot) -> tuple[Words, ...]:
        """The index of words of the generation, and of what was committed since: each passage is read for it once."""
        with self._lock:
            generation, last, parts = self._lexicon
            if generation != snapshot.generation:
                last, parts = snapshot.last, snapshot.words
            new = snapshot.newer[snapshot.newer > last]
            if len(new):
                last, parts = int(new[-1]), grown(parts, self.store, new)
            self._lexicon = (snapshot.generation, last, parts)
            return parts

    def _near(self, snapshot: Snapshot, vector: Vectors, k: int, only: Rows | None) -> tuple[dict[int, float], bool]:
        """The cosines of the rows nearest in meaning, and whether there may be more of them; compressed vectors only
        say which ones to measure. Raises NotReady while the vector engine is of no use."""
        wanted = k if snapshot.exact else k * REFINE
        try:
            found = snapshot.nearest(vector, wanted, only)
            if snapshot.exact:
                return dict(found), len(found) == wanted
            measured = self._cosines(vector, [row for row, _ in found])
            best = sorted(measured.items(), key=lambda hit: (-hit[1], hit[0]))[:k]
            return dict(best), len(found) == wanted
        except Refused as error:
            self.trouble = f"{error.message} It is published again; until then words alone are searched."
            raise NotReady(self.trouble) from error

    def _cosines(self, vector: Vectors, rows: Sequence[int]) -> dict[int, float]:
        if not rows:
            return {}
        kept, vectors = self.store.vectors(len(vector), only=rows)
        return dict(zip(kept.tolist(), (vectors @ vector).tolist(), strict=True))

    def publish(self) -> None:
        """Builds a generation unless the current one is whole and holds everything. The caller holds the lock.

        While a vector engine is of no use none is built; `settle` makes up for it.
        """
        try:
            meta = self.meta()
            old, whole = self._current(meta)
            if not whole:
                build(self.generations, self.store, self._settings, self._engine, old)
            self.trouble = ""
        except NotReady as error:
            self.trouble, self._again_at = error.message, time.monotonic() + AGAIN_S
            log.warning("%s: no new generation was published. %s", self.name, error.message)

    def _current(self, meta: Meta) -> tuple[Snapshot | None, bool]:
        """The current generation, for the caller alone, and whether it is whole and holds everything."""
        old: Snapshot | None = None
        with contextlib.suppress(Refused):
            old = load(self.generations, meta, self._engine)
            if isinstance(old.near, PgIndex):
                old.near.check()
            return old, old.revision == meta.revision
        return old, False

    def keep_up(self) -> None:
        """Publishes what an ingest brought: of a new or small corpus at once, of a large one when it is due. The caller
        holds the lock."""
        if not self.meta().generation or self.info().passages <= self._settings.exact_up_to:
            self.publish()
        else:
            self.publish_when_due()

    def publish_when_due(self) -> None:
        """Publishes once much was added or taken away since the last time. The caller holds the lock.

        Until then what is new is searched in memory beside the generation, and what is gone is left out.
        """
        if self._due():
            self.publish()

    def settle(self) -> None:
        """Brings the vector engine in step once it answers again, or when it lost what it held. Cheap otherwise."""
        if self._engine is None or self._engine.trouble or time.monotonic() < self._again_at:
            return
        if not (self.trouble or self._due()):
            return
        with contextlib.suppress(Timeout), corpus_lock(self._folder, timeout=0):
            self.publish()

    def _due(self) -> bool:
        told: JSON = {"passages": 0, "watermark": 0, "waiting": 0}
        with contextlib.suppress(Refused):
            told = manifest(self.generations, self.meta())
        held = self.info().passages
        added = len(self.store.rows(after=told["watermark"]))
        gone = told["passages"] + added - held
        if told["waiting"] and not self.store.is_waiting():
            return True
        return bool(max(added, gone) > max(FRESH, held // 10))

    @property
    def generations(self) -> Path:
        return self._folder / "generations"

    def _open(self, meta: Meta) -> tuple[Snapshot, Meta]:
        """The current generation; a damaged one is built again from the store, which is always served from."""
        from_store = Snapshot(meta.generation, -1, 0)
        if meta.generation == 0:
            return from_store, meta
        try:
            return load(self.generations, meta, self._engine), meta
        except Refused as error:
            latest = self.meta()
            if latest.generation != meta.generation:  # another process published and swept meanwhile
                return self._open(latest)
            log.warning("%s It is built again from the store.", error.message)
        try:
            with corpus_lock(self._folder, timeout=0):
                build(self.generations, self.store, self._settings, self._engine)
            latest = self.meta()
            return load(self.generations, latest, self._engine), latest
        except (Timeout, OSError, HybridError) as error:
            log.warning("%s is searched from the store: no new generation was built (%s).", self.name, error)
            if self._engine is not None:
                self.trouble = "The vector engine does not hold the corpus yet; it is searched from the store."
            return from_store, meta


def _named(held: Mapping[int, list[Passage]], visible: Visible | None) -> Mapping[int, list[Passage]]:
    """By row, the passage under each id that the caller may see; rows that are hidden are left out."""
    if visible is None:
        return held
    seen = {row: [p for p in group if p.document in visible] for row, group in held.items()}
    return {row: group for row, group in seen.items() if group}


def corpus_lock(folder: Path, timeout: float = -1) -> FileLock:
    """The lock of whoever writes to a corpus; others wait for it. A crash frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "store.lock", timeout=timeout)
