"""The library: every corpus of a home, searched by meaning. Exact inner products over unit vectors (FAISS flat).

A search takes one snapshot of a corpus and answers through the store, so a committed document is found at once,
whichever process committed it, and a deleted one never.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from hybrid.errors import BadRequest, HybridError, NotFound, Refused
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.filters import Matches
from hybrid.knowledge.index import Snapshot, build, extended, load
from hybrid.knowledge.ingest import Ingest, IngestReport, Progress, check_embedder, parse_limits
from hybrid.knowledge.read import one_document
from hybrid.knowledge.store import About, DocumentInfo, Meta, Store
from hybrid.knowledge.visible import Holdings, Visible
from hybrid.rooms import Home, check_name
from hybrid.settings import RetrievalSettings
from hybrid.types import JSON, Passage, Rights

log = logging.getLogger("hybrid.knowledge")

#: so many passages are searched in memory beside a generation before the next one is published
FRESH = 1024

#: who runs commands here, and trains
OWNER = Rights()

Query = str | np.ndarray[Any, Any]


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


class _Corpus:
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


class Library:
    """Every corpus of a home. Safe to use from many threads and beside other processes."""

    def __init__(self, home: Home, embedder: Embedder, settings: RetrievalSettings) -> None:
        self.embedder = embedder
        self._home = home
        self._settings = settings
        self._open: dict[str, tuple[int, _Corpus]] = {}
        self._opening = threading.Lock()

    def names(self) -> list[str]:
        """The corpora that hold something, sorted."""
        found = sorted(path.parent.name for path in self._home.index.glob("*/store.db"))
        return [name for name in found if _can_name(name) and self._corpus(name).info().passages]

    def corpus(self, name: str) -> CorpusInfo:
        """What is known of a corpus. Raises NotFound naming those that exist."""
        return self._corpus(name).info()

    def search(
        self,
        corpus: str | None,
        query: Query,
        k: int,
        *,
        every_id: bool = False,
        rights: Rights = OWNER,
        matches: Matches | None = None,
    ) -> tuple[Passage, ...]:
        """The `k` texts nearest to `query` (words, or a unit vector float32 [dim]), best first; None asks all corpora.

        Only what `rights` may see is looked at, and of that the documents whose attributes match.

        A text that came with several ids is one of the `k`. It is returned under its first id, as a prompt needs
        it; with `every_id` under each of them in turn, with the same score. Raises NotFound, Refused, BadRequest.
        """
        if k < 1:
            raise BadRequest("`k` is at least 1.", param="k")
        names = [name for name in self.names() if rights.sees(name)] if corpus is None else [corpus]
        if not names:
            raise NotFound("There is no corpus yet; `hybrid index DIR --name NAME` makes one.", param="corpus")
        corpora = [self._corpus(name, rights) for name in names]
        vector = self._vector(query)
        groups = [group for found in corpora for group in found.search(vector, k, rights, matches)]
        groups.sort(key=lambda group: -group[0].score)
        return tuple(passage for group in groups[:k] for passage in (group if every_id else group[:1]))

    def sample(self, name: str, limit: int, seed: int) -> tuple[tuple[Passage, ...], Vectors]:
        """At most `limit` passages of a corpus, chosen by `seed`, and their vectors float32 [n, dim]."""
        corpus = self._corpus(name)
        meta = corpus.meta()
        rows = np.array(corpus.store.rows(), np.int64)
        if len(rows) > limit:
            rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
        named = corpus.store.passages(rows.tolist())
        kept, vectors = corpus.store.vectors(meta.dim, only=[int(row) for row in rows if int(row) in named])
        return tuple(replace(named[int(row)][0], corpus=name) for row in kept), vectors

    def called(self, name: str, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """By each of these ids that the corpus knows, the passage of that id, or the pieces of that document.

        Raises NotFound for an unknown corpus.
        """
        found = self._corpus(name).store.called(ids)
        return {key: [replace(passage, corpus=name) for passage in pieces] for key, pieces in found.items()}

    def vectors(self, name: str, limit: int) -> Vectors:
        """The vectors of a sample of a corpus, float32 [n, dim]."""
        return self.sample(name, limit, 0)[1]

    def ingest(self, name: str, path: Path, progress: Progress | None = None, *, rebuild: bool = False) -> IngestReport:
        """Brings a corpus in step with a folder or file and publishes a generation. Waits for another ingest.

        Raises DataError when nothing can be read, Refused for a name that cannot be one or a changed embedder.
        """
        with self._writing(name, progress) as (corpus, ingest):
            report = ingest.run(path, rebuild=rebuild)
            corpus.publish()
        return report

    def refresh(self) -> None:
        """Takes up what other processes published, so that the next search need not. Cheap when nothing changed."""
        for name in self.names():
            try:
                self._corpus(name).snapshot()
            except HybridError as error:
                log.debug("%s cannot be searched: %s", name, error.message)

    def add_document(
        self,
        name: str,
        document: str,
        *,
        title: str = "",
        text: str | None = None,
        file: Path | None = None,
        about: About | None = None,
    ) -> DocumentInfo:
        """Adds one document under an id of the caller's, or replaces it; the corpus is made when there is none.

        Its words are `text`, or a `file` of a type that is read (its name tells the type and stands in for a missing
        title). When this returns, the document is on disk and found by every process. Adding the same again does
        nothing; `about` may differ, and without it the document keeps what it had. An ingest of a folder never
        takes it away. Raises DataError when there are no words to read, Refused for a name that cannot be one or a
        changed embedder, NotFound never.
        """
        read = one_document(document, title, text, file, parse_limits(self._settings))
        with self._writing(name) as (corpus, ingest):
            if ingest.add(read, about):
                corpus.publish_when_due()
        return corpus.store.documents(document)[0]

    def describe_document(self, name: str, document: str, about: About) -> DocumentInfo:
        """Changes a document's attributes, owner and groups, and nothing else. Raises NotFound."""
        self.document(name, document)
        with self._writing(name) as (corpus, _), corpus.store.change() as change:
            change.describe(document, about)
        return self.document(name, document)

    def documents(self, name: str) -> list[DocumentInfo]:
        """Every document of a corpus, by id. Raises NotFound for an unknown corpus."""
        return self._corpus(name).store.documents()

    def document(self, name: str, document: str) -> DocumentInfo:
        """One document of a corpus. Raises NotFound for a corpus or a document that is not there."""
        found = self._corpus(name).store.documents(document)
        if not found:
            raise NotFound(f"The corpus {name!r} holds no document {document[:80]!r}.", param="document")
        return found[0]

    def delete_document(self, name: str, document: str) -> None:
        """Takes one document away, at once and for good. Raises NotFound."""
        self.document(name, document)
        with self._writing(name) as (corpus, _):
            with corpus.store.change() as change:
                change.remove([document])
                change.sweep()
            corpus.publish_when_due()

    def delete(self, name: str) -> None:
        """Takes a corpus away. What made it (a recipe, documents) stays. Raises NotFound."""
        self._corpus(name)
        folder = self._folder(name)
        with corpus_lock(folder), self._opening:
            opened = self._open.pop(name, None)
            if opened:
                opened[1].store.close()
            # the database first: SQLite throws the log of a database away that is not there
            for file in [folder / "store.db", *folder.glob("store*.db*")]:
                file.unlink(missing_ok=True)
            shutil.rmtree(folder / "generations", ignore_errors=True)

    def close(self) -> None:
        """Releases every connection."""
        with self._opening:
            for _, corpus in self._open.values():
                corpus.store.close()
            self._open.clear()

    @contextlib.contextmanager
    def _writing(self, name: str, progress: Progress | None = None) -> Iterator[tuple[_Corpus, Ingest]]:
        """A corpus, made if need be, under its lock, with what writes to it."""
        with corpus_lock(self._folder(name)):
            corpus = self._reopen(name)
            yield corpus, Ingest(name, corpus.store, self.embedder, self._settings, progress)

    def _vector(self, query: Query) -> Vectors:
        if isinstance(query, str):
            return self.embedder.embed_query(query)
        if query.shape != (self.embedder.dim,):
            raise BadRequest(f"a query vector has the shape ({self.embedder.dim},), not {query.shape}.", param="query")
        return np.ascontiguousarray(query, dtype=np.float32)

    def _folder(self, name: str) -> Path:
        return self._home.index / check_name(name, "corpus")

    def _corpus(self, name: str, rights: Rights = OWNER) -> _Corpus:
        """An open corpus. One that is not there and one that is not theirs are unknown alike. Raises NotFound."""
        if _can_name(name) and rights.sees(name) and (self._folder(name) / "store.db").is_file():
            return self._reopen(name)
        known = _known([known for known in self.names() if rights.sees(known)])
        raise NotFound(f"There is no corpus {name[:80]!r}. {known}", param="corpus")

    def _reopen(self, name: str) -> _Corpus:
        """The open corpus, made if need be; opened anew when its file is another one than it was."""
        folder = self._folder(name)
        database = folder / "store.db"
        with self._opening:
            opened = self._open.get(name)
            inode = database.stat().st_ino if database.exists() else 0
            if opened and opened[0] == inode:
                return opened[1]
            corpus = _Corpus(name, folder, self.embedder)
            self._open[name] = (database.stat().st_ino, corpus)
            return corpus


def _can_name(name: str) -> bool:
    try:
        check_name(name, "corpus")
    except Refused:
        return False
    return True


def _known(names: Sequence[str]) -> str:
    return f"Known: {', '.join(names)}." if names else "There is none yet; `hybrid index DIR --name NAME` makes one."
