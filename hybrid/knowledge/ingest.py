"""Brings a corpus in step with a folder: what is new is added, what changed replaced, what vanished taken away.

Documents are compared by the hash of what they say, and a passage is embedded only when its text is new to the
corpus. Every batch is one transaction: what was committed when the power went is there afterwards, and the next
ingest goes on from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.errors import Refused
from hybrid.knowledge.chunk import Chunker
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.read import Document, Problem, read
from hybrid.knowledge.store import About, Entry, Meta, Store, text_hash

Progress = Callable[[str, int, int], None]

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
        self, corpus: str, store: Store, embedder: Embedder, chunker: Chunker, batch: int, progress: Progress | None
    ) -> None:
        self._corpus = corpus
        self._store = store
        self._embedder = embedder
        self._chunker = chunker
        self._batch = batch
        self._progress: Progress = progress or (lambda _step, _done, _total: None)

    def run(self, path: Path, *, rebuild: bool = False) -> IngestReport:
        """Brings the store in step with `path`. With `rebuild` every stored vector is made again first.

        A folder stands for everything that came from folders; a single file only for itself. Raises DataError when
        nothing can be read, Refused when another embedder made the vectors and `rebuild` is not asked for.
        """
        documents, problems = read(path)
        source = "folder" if path.is_dir() else f"file:{path.name}"
        meta = self._store.meta()
        if meta and rebuild:
            self._embed_again()
        elif meta:
            check_embedder(self._corpus, meta, self._embedder)
        old = self._store.hashes()
        new = {d.id: self._hash(d) for d in documents}
        gone = [id_ for id_, (came_from, _) in old.items() if came_from == source and id_ not in new]
        if gone:
            with self._store.change() as change:
                change.remove(gone)
                change.sweep()
        stale = [d for d in documents if rebuild or old.get(d.id) != (source, new[d.id])]
        self._put(list(self._entries(stale, source, new)))
        changed = sum(d.id in old and old[d.id][1] != new[d.id] for d in documents)
        added = sum(d.id not in old for d in documents)
        unchanged = len(documents) - added - changed
        passages, _ = self._store.counts()
        return IngestReport(self._corpus, added, changed, len(gone), unchanged, passages, tuple(problems))

    def add(self, document: Document, about: About | None) -> bool:
        """Puts one document into the corpus, or in place of the one with its id; no ingest of a folder takes it away.

        Without `about` it keeps what it had. Nothing is embedded or written when it stands there already. Returns
        whether anything was changed. Raises Refused when another embedder made the corpus's vectors.
        """
        meta = self._store.meta()
        if meta:
            check_embedder(self._corpus, meta, self._embedder)
        new = {document.id: self._hash(document)}
        found = self._store.documents(document.id)
        if found and (found[0].source, found[0].hash) == (ADDED, new[document.id]):
            if about is None or about == found[0].about:
                return False
            with self._store.change() as change:
                change.describe(document.id, about)
            return True
        self._put([replace(entry, about=about) for entry in self._entries([document], ADDED, new)])
        return True

    def _hash(self, document: Document) -> str:
        """The hash of what a document says and how it is cut."""
        digest = hashlib.sha256()
        for part in (self._chunker.rule, document.title, document.text):
            digest.update(part.encode())
            digest.update(b"\0")
        return digest.hexdigest()

    def _entries(self, documents: Sequence[Document], source: str, hashes: dict[str, str]) -> Iterator[Entry]:
        for done, document in enumerate(documents, 1):
            pieces = self._chunker.cut(document.title, document.text, markdown=document.markdown)
            size = len(document.text.encode())
            yield Entry(document.id, source, document.title, hashes[document.id], pieces, document.id, size)
            if done % _TELL_EVERY == 0 or done == len(documents):
                self._progress(f"cutting {self._corpus}", done, len(documents))

    def _put(self, entries: Sequence[Entry]) -> None:
        """Embeds what is new and commits, a batch at a time."""
        texts = {text_hash(p.text): (p.title, p.text) for e in reversed(entries) for p in reversed(e.pieces)}
        missing = set(texts) - self._store.known(list(texts))
        total = len(missing)
        for batch in self._batches(entries, set(missing)):
            wanted = [h for h in dict.fromkeys(text_hash(p.text) for e in batch for p in e.pieces) if h in missing]
            vectors = self._vectors([texts[h] for h in wanted], total - len(missing), total)
            with self._store.change() as change:
                change.begin(self._embedder.name, self._embedder.digest, self._embedder.dim)
                change.put(batch, dict(zip(wanted, vectors, strict=True)))
                change.sweep()
            missing.difference_update(wanted)

    def _batches(self, entries: Sequence[Entry], missing: set[str]) -> Iterator[list[Entry]]:
        """Runs of documents that bring about `batch` new texts each."""
        batch: list[Entry] = []
        new: set[str] = set()
        for entry in entries:
            batch.append(entry)
            new |= {h for h in (text_hash(p.text) for p in entry.pieces) if h in missing}
            if len(new) >= self._batch:
                yield batch
                missing -= new
                batch, new = [], set()
        if batch:
            yield batch

    def _embed_again(self) -> None:
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


def check_embedder(corpus: str, meta: Meta, embedder: Embedder) -> None:
    """Raises Refused, with the command that mends it, when another embedder made the corpus's vectors."""
    if meta.digest != embedder.digest:
        raise Refused(
            f"The corpus {corpus!r} was embedded by {meta.embedder}, and the embedder is {embedder.name} now: their "
            f"vectors cannot be compared. Run `hybrid index DIR --name {corpus} --rebuild`, or set `embedder` back.",
            param="corpus",
        )
