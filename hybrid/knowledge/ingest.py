"""Brings a corpus in step with a folder: what is new is added, what changed replaced, what vanished taken away.

Documents are compared by the hash of what they say, and a passage is embedded only when its text is new to the
corpus. Every batch is one transaction: what was committed when the power went is there afterwards, and the next
ingest goes on from it.

A corpus that is mostly new is committed without its vectors first, and an index of its words is published: it is
searched by them within seconds, and by meaning when the vectors are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.errors import Refused
from hybrid.knowledge.chunk import Chunker
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.parser import Limits, Parser
from hybrid.knowledge.read import Document, Found, Problem, Same, scan
from hybrid.knowledge.store import About, Entry, Meta, Store, text_hash
from hybrid.settings import RetrievalSettings

Progress = Callable[[str, int, int], None]

#: new texts in one transaction while no vector is made
_WORDS_BATCH = 4096
#: the source of documents that were added one by one
ADDED = "added"
_TELL_EVERY = 256


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an ingest did, in documents; `passages` is how many the corpus holds now."""

    corpus: str
    added: int
    changed: int
    deleted: int
    unchanged: int
    passages: int
    problems: tuple[Problem, ...] = ()

    @property
    def skipped(self) -> int:
        """How many files and rows were not read."""
        return len(self.problems)

    def wire(self) -> dict[str, Any]:
        """The report as JSON."""
        counts = {name: getattr(self, name) for name in ("corpus", "added", "changed", "deleted", "unchanged")}
        problems = [asdict(problem) for problem in self.problems]
        return {**counts, "skipped": self.skipped, "passages": self.passages, "problems": problems}

    def __str__(self) -> str:
        head = (
            f"{self.corpus}: {self.added} added, {self.changed} changed, {self.deleted} deleted, "
            f"{self.unchanged} unchanged, {self.skipped} skipped; {self.passages} passages"
        )
        return "\n".join([head, *(f"  skipped {problem}" for problem in self.problems)])


class Ingest:
    """One ingest into one store. The caller holds the corpus's lock."""

    def __init__(
        self,
        corpus: str,
        store: Store,
        embedder: Embedder,
        settings: RetrievalSettings,
        progress: Progress | None = None,
        publish: Callable[[], None] = lambda: None,
    ) -> None:
        self._corpus = corpus
        self._publish = publish
        self._store = store
        self._embedder = embedder
        self._chunker = Chunker(embedder.count_tokens, settings.chunk_tokens, settings.overlap_tokens)
        self._limits = parse_limits(settings)
        self._batch = settings.embed_batch
        self._words_first = settings.words_first
        self._progress: Progress = progress or (lambda _step, _done, _total: None)

    def run(self, path: Path, *, rebuild: bool = False) -> IngestReport:
        """Brings the store in step with `path`. With `rebuild` every stored vector is made again first.

        A folder stands for everything that came from folders; a single file only for itself. Raises DataError when
        nothing can be read, Refused when another embedder made the vectors and `rebuild` is not asked for.
        """
        source = "folder" if path.is_dir() else f"file:{path.name}"
        meta = self._store.meta()
        if meta and rebuild:
            self.embed_again()
        elif meta:
            check_embedder(self._corpus, meta, self._embedder)
            self._embed_waiting()
        old = self._store.documents_known()
        with Parser(self._limits) as parser:
            found = scan(
                path,
                parser,
                lambda id_, stamp: not rebuild and id_ in old and old[id_][:2] == (source, self._hash(stamp)),
                lambda done, total: self._progress(f"reading {self._corpus}", done, total),
            )
        documents = [item for item in found if isinstance(item, Document)]
        problems = tuple(item for item in found if isinstance(item, Problem))
        self._put(list(self._entries(documents, source)))
        gone = _gone(old, source, found)
        if gone:  # last: a document that only moved finds its vectors still there
            with self._store.change() as change:
                change.remove(gone)
                change.sweep()
        added = sum(d.id not in old for d in documents)
        changed = sum(d.id in old and old[d.id][1] != self._hash(d.stamp) for d in documents)
        unchanged = len(found) - len(problems) - added - changed
        passages, _ = self._store.counts()
        return IngestReport(self._corpus, added, changed, len(gone), unchanged, passages, problems)

    def add(self, document: Document, about: About | None) -> bool:
        """Puts one document into the corpus, or in place of the one with its id; no ingest of a folder takes it away.

        Without `about` it keeps what it had. Nothing is embedded or written when it stands there already. Returns
        whether anything was changed. Raises Refused when another embedder made the corpus's vectors.
        """
        meta = self._store.meta()
        if meta:
            check_embedder(self._corpus, meta, self._embedder)
        late = self._embed_waiting()
        found = self._store.documents(document.id)
        if found and (found[0].source, found[0].hash) == (ADDED, self._hash(document.stamp)):
            if about is None or about == found[0].about:
                return late
            with self._store.change() as change:
                change.describe(document.id, about)
            return True
        self._put([replace(entry, about=about) for entry in self._entries([document], ADDED)])
        return True

    def _hash(self, stamp: str) -> str:
        """The hash of what a document says and how it is cut."""
        return hashlib.sha256(f"{self._chunker.rule}\0{stamp}".encode()).hexdigest()

    def _entries(self, documents: Sequence[Document], source: str) -> Iterator[Entry]:
        for done, document in enumerate(documents, 1):
            pieces = self._chunker.cut(document.title, document.text, markdown=document.markdown)
            yield Entry(
                document.id,
                source,
                document.title,
                self._hash(document.stamp),
                pieces,
                path=document.path,
                bytes=len(document.text.encode()),
            )
            if done % _TELL_EVERY == 0 or done == len(documents):
                self._progress(f"cutting {self._corpus}", done, len(documents))

    def _put(self, entries: Sequence[Entry]) -> None:
        """Embeds what is new and commits, a batch at a time."""
        texts = {text_hash(p.text): (p.title, p.text) for e in reversed(entries) for p in reversed(e.pieces)}
        missing = set(texts) - self._store.known(list(texts))
        total = len(missing)
        if 0 < self._words_first <= total > self._store.counts()[0]:
            self._put_words(entries, missing)
            return
        for batch in self._batches(entries, set(missing), self._batch):
            wanted = [h for h in dict.fromkeys(text_hash(p.text) for e in batch for p in e.pieces) if h in missing]
            vectors = self._vectors([texts[h] for h in wanted], total - len(missing), total)
            with self._store.change() as change:
                change.begin(self._embedder.name, self._embedder.digest, self._embedder.dim)
                change.put(batch, dict(zip(wanted, vectors, strict=True)))
                change.sweep()
            missing.difference_update(wanted)

    def _put_words(self, entries: Sequence[Entry], missing: set[str]) -> None:
        """Commits everything but the vectors, has an index of the words published, and then makes the vectors."""
        for batch in self._batches(entries, set(missing), _WORDS_BATCH):
            new = dict.fromkeys(h for h in (text_hash(p.text) for e in batch for p in e.pieces) if h in missing)
            with self._store.change() as change:
                change.begin(self._embedder.name, self._embedder.digest, self._embedder.dim)
                change.put(batch, new)
                change.sweep()
            missing -= new.keys()
        self._publish()
        self._embed_waiting()

    def _embed_waiting(self) -> bool:
        """Makes the vectors that texts wait for, also of an ingest that was cut off, and commits them a batch at a
        time; says whether there were any."""
        rows = self._store.waiting()
        for start in range(0, len(rows), self._batch):
            listed = self._store.passages(rows[start : start + self._batch])
            texts = [(named[0].title, named[0].text) for named in listed.values()]
            vectors = self._vectors(texts, start, len(rows))
            with self._store.change() as change:
                change.fill(dict(zip(listed, vectors, strict=True)))
        return bool(rows)

    def _batches(self, entries: Sequence[Entry], missing: set[str], size: int) -> Iterator[list[Entry]]:
        """Runs of documents that bring about `size` new texts each."""
        batch: list[Entry] = []
        new: set[str] = set()
        for entry in entries:
            batch.append(entry)
            new |= {h for h in (text_hash(p.text) for p in entry.pieces) if h in missing}
            if len(new) >= size:
                yield batch
                missing -= new
                batch, new = [], set()
        if batch:
            yield batch

    def embed_again(self) -> None:
        """Makes every stored vector again, in one transaction: a reader sees the old ones or the new ones."""
        listed = self._store.passages(self._store.rows())
        texts = [(named[0].title, named[0].text) for named in listed.values()]
        vectors = self._vectors(texts, 0, len(texts))
        with self._store.change() as change:
            change.begin(self._embedder.name, self._embedder.digest, self._embedder.dim)
            change.replace_vectors(dict(zip(listed, vectors, strict=True)))

    def _vectors(self, texts: Sequence[tuple[str, str]], before: int, total: int) -> Vectors:
        """The vectors of (title, text) pairs: the title says what a passage cut from the middle is about."""
        lines = [f"{title}\n{text}" if title else text for title, text in texts]
        step = f"embedding {self._corpus}"
        return self._embedder.embed(lines, lambda done, _: self._progress(step, before + done, total))


def parse_limits(settings: RetrievalSettings) -> Limits:
    """What the settings let one file cost."""
    return Limits(settings.file_mb << 20, settings.parse_mb << 20, settings.parse_s)


def _gone(old: Mapping[str, tuple[str, str, str]], source: str, found: Sequence[Found]) -> list[str]:
    """The documents of a source that are in it no more; those of a file that could not be read now are."""
    here = {item.id for item in found if isinstance(item, Document | Same)}
    kept = {item.file for item in found if isinstance(item, Problem) and item.kept}
    return [id_ for id_, (was, _, path) in old.items() if was == source and id_ not in here and path not in kept]


def check_embedder(corpus: str, meta: Meta, embedder: Embedder) -> None:
    """Raises Refused, with the command that mends it, when another embedder made the corpus's vectors."""
    if meta.digest != embedder.digest:
        raise Refused(
            f"The corpus {corpus!r} was embedded by {meta.embedder}, and the embedder is {embedder.name} now: their "
            f"vectors cannot be compared. Run `hybrid index DIR --name {corpus} --rebuild`, or set `embedder` back.",
            param="corpus",
        )
