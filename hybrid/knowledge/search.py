"""The library: every corpus of a home, searched by meaning (exact inner products, FAISS flat) and by words (BM25).

A search takes one snapshot of a corpus and answers through the store, so a committed document is found at once,
whichever process committed it, and a deleted one never.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import BadRequest, HybridError, NotFound, NotReady, Refused
from hybrid.knowledge import backup
from hybrid.knowledge.alike import groups
from hybrid.knowledge.answerable import Found
from hybrid.knowledge.corpus import Asked, Candidates, Corpus, CorpusInfo, corpus_lock
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.faults import spoken
from hybrid.knowledge.filters import Matches
from hybrid.knowledge.ingest import Ingest, IngestReport, Progress, parse_limits
from hybrid.knowledge.pg import PgEngine
from hybrid.knowledge.quote import Quote, quote
from hybrid.knowledge.read import one_document
from hybrid.knowledge.reader import Reader
from hybrid.knowledge.room import OWNER, Room
from hybrid.knowledge.stages import Stages
from hybrid.knowledge.store import About, DocumentInfo
from hybrid.knowledge.tuned import Tuned
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings
from hybrid.types import JSON
from hybrid.types.passage import Passage
from hybrid.types.rights import Rights

log = logging.getLogger("hybrid.knowledge")

#: candidates of each way of searching, at least
POOL = 50


@dataclass(frozen=True, eq=False, slots=True)
class Question:
    """Words whose unit vector float32 [dim] is known already."""

    text: str
    vector: Vectors


Query = str | np.ndarray[Any, Any] | Question


class Library:
    """Every corpus of a home. Safe to use from many threads and beside other processes."""

    def __init__(self, home: Home, embedder: Embedder, settings: RetrievalSettings) -> None:
        self.embedder = embedder
        self._settings = settings
        url = settings.vector_engine.get_secret_value()
        self._engine = PgEngine(url, settings.exact_up_to) if url else None
        self._room = Room(home, embedder, settings, self._engine)
        self._stages = Stages(settings)

    @property
    def engine(self) -> str:
        """What searches vectors, and where, for who owns it."""
        return self._engine.name if self._engine else "faiss"

    @property
    def trouble(self) -> str:
        """What is not searched at this moment, in words for everybody; empty while everything is."""
        missing = "A corpus cannot be read and is left out; the server's log says which."
        return self._words_alone or (missing if self._room.unreadable else "")

    @property
    def _words_alone(self) -> str:
        """Why meaning is not searched for at this moment; empty while it is."""
        if self._engine is None or self._engine.trouble:
            return self._engine.trouble if self._engine else ""
        return self._room.trouble

    def names(self) -> list[str]:
        """The corpora that hold something, sorted."""
        return self._room.names()

    def is_unreadable(self, name: str) -> bool:
        """Whether there is such a corpus, and it was left out of `names` because it cannot be read."""
        return name in self._room.unreadable

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
        """The `k` best texts for `query` (words, or a unit vector float32 [dim]), best first; None asks all corpora.

        Words are searched for by meaning and as words, as the settings say; a vector by meaning alone. `score` is the
        cosine all the same, and `scores` what each stage made of a passage. Only what `rights` may see is looked at,
        and of that the documents whose attributes match.

        A text that came with several ids is one of the `k`. It is returned under its first id, as a prompt needs
        it; with `every_id` under each of them in turn, with the same score. Raises NotFound, Refused, BadRequest.
        """
        hits = self._stages.ranked(*self._found(corpus, query, k, rights, matches), k)
        return tuple(passage for hit in hits for passage in hit.named()[: None if every_id else 1])

    def look_up(self, corpus: str | None, query: Query, k: int, *, rights: Rights = OWNER) -> Found:
        """As `search`; and how likely what was found holds an answer, where one corpus is searched by meaning and
        words and its own questions taught to tell. Raises NotFound, Refused, BadRequest.
        """
        asked, corpora, found = self._found(corpus, query, k, rights, None)
        first = self._stages.shortlist(asked, corpora, found)
        passages = tuple(hit.named()[0] for hit in self._stages.ranked(asked, corpora, found, k, first))
        if len(corpora) > 1 or not (asked.text and asked.dense and found[0].ready) or self._words_alone:
            return Found(passages)
        return corpora[0].tuned().judged(passages, first)

    def around(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        """The passages, then as many pieces before and after each in its document as the setting `neighbours` says.

        A caller who may see a passage may see its document.
        """
        reach, out = self._settings.neighbours, {(p.corpus, p.id): p for p in passages}
        for passage in passages if reach else ():
            pieces = self.called(passage.corpus, [passage.document]).get(passage.document, [])
            at = next((i for i, piece in enumerate(pieces) if piece.id == passage.id), 0)
            for piece in pieces[max(0, at - reach) : at + reach + 1]:
                out.setdefault((piece.corpus, piece.id), piece)
        return tuple(out.values())

    def quote(self, question: str, passage: Passage) -> Quote | None:
        """The sentence of a passage that a question asks for. Raises NotFound where its corpus is no more."""
        return quote(question, passage, self.embedder, self._corpus(passage.corpus).reader())

    def tuned(self, name: str) -> Tuned:
        """What a corpus's own questions taught about searching it; the defaults where nothing did. Raises NotFound."""
        return self._corpus(name).tuned()

    def tune(self, name: str, learned: Tuned, reader: Reader | None = None) -> None:
        """Keeps what was learned for a corpus, with the `reader` that it was learned with; every process searches by it
        at once. Raises NotFound."""
        self._corpus(name).tune(learned, reader)

    def candidates(self, name: str, query: str) -> Candidates:
        """What is ranked in a search of one corpus, in no order. Raises NotFound, and NotReady where meaning is not
        searched for now: nothing is to be learned from that."""
        found = self._corpus(name).candidates(Asked(self._vector(query), query), POOL, OWNER)
        if self._words_alone:
            raise NotReady(self._words_alone)
        if not found.ready:
            raise NotReady(f"The vectors of {name} are still being made; repeat when `hybrid index` has ended.")
        return found

    def _found(
        self, corpus: str | None, query: Query, k: int, rights: Rights, matches: Matches | None
    ) -> tuple[Asked, list[Corpus], list[Candidates]]:
        """The question, the corpora that are asked, and what each has."""
        if k < 1:
            raise BadRequest("`k` is at least 1.", param="k")
        names = [name for name in self.names() if rights.sees(name)] if corpus is None else [corpus]
        if not names:
            raise NotFound("There is no corpus yet; `hybrid index DIR --name NAME` makes one.", param="corpus")
        corpora = [self._corpus(name, rights) for name in names]
        asked = self._asked(query)
        wanted = max(k, POOL) if asked.said or self._settings.mmr else k
        return asked, corpora, [one.candidates(asked, wanted, rights, matches) for one in corpora]

    def _asked(self, query: Query) -> Asked:
        text = query if isinstance(query, str) else query.text if isinstance(query, Question) else ""
        vector, way = self._vector(query), self._settings.search
        return Asked(vector, text if way != "dense" else "", way != "lexical" or not text, text)

    def sample(
        self, name: str, limit: int, seed: int, *, rights: Rights = OWNER, near: Vectors | None = None
    ) -> tuple[tuple[Passage, ...], Vectors]:
        """At most `limit` passages of a corpus, chosen by `seed`, and their vectors float32 [n, dim]; those nearest to
        `near`, a unit vector [dim], are always among them. Only what `rights` may see is looked at.
        """
        return self._corpus(name, rights).sample(limit, seed, rights, near)

    def called(self, name: str, ids: Sequence[str]) -> dict[str, list[Passage]]:
        """By each of these ids that the corpus knows, the passage of that id, or the pieces of that document.

        Raises NotFound for an unknown corpus.
        """
        found = self._corpus(name).store.called(ids)
        return {key: [replace(passage, corpus=name) for passage in pieces] for key, pieces in found.items()}

    def alike(self, name: str) -> list[list[Passage]]:
        """Groups of passages that say almost the same, the largest first. Equal ones are one passage already.

        Raises NotFound for an unknown corpus.
        """
        store = self._corpus(name).store
        listed = [named[0] for named in store.passages(store.rows()).values()]
        found = groups([passage.text for passage in listed])
        return sorted(([replace(listed[n], corpus=name) for n in group] for group in found), key=len, reverse=True)

    def vectors(self, name: str, limit: int) -> Vectors:
        """The vectors of a sample of a corpus, float32 [n, dim]."""
        return self.sample(name, limit, 0)[1]

    def ingest(self, name: str, path: Path, progress: Progress | None = None, *, rebuild: bool = False) -> IngestReport:
        """Brings a corpus in step with a folder or file and publishes a generation. Waits for another ingest.

        Raises DataError when nothing can be read, Refused for a name that cannot be one or a changed embedder.
        """
        with self._writing(name, progress) as (corpus, ingest):
            report = ingest.run(path, rebuild=rebuild)
            corpus.keep_up()
        return report

    def rebuild(self, name: str, progress: Progress | None = None) -> CorpusInfo:
        """Makes every vector of a corpus again with the embedder of now, then a generation of them; until both are
        there, searches see the old ones. What `progress` raises ends it and changes nothing. Raises NotFound."""
        self._corpus(name)
        with self._writing(name, progress) as (corpus, ingest):
            ingest.embed_again()
            corpus.publish()
        return corpus.info()

    def stale(self, name: str) -> bool:
        """Whether another embedder made a corpus's vectors, so that it must be rebuilt. Raises NotFound."""
        meta = self._corpus(name).store.meta()
        return meta is not None and meta.digest != self.embedder.digest

    def refresh(self) -> None:
        """Takes up what other processes published, so that the next search need not. Cheap when nothing changed."""
        if self._engine is not None:
            self._engine.probe()
        for name in self.names():
            try:
                corpus = self._corpus(name)
                corpus.snapshot()
                corpus.settle()
                if (reader := corpus.reader()) is not None:
                    reader.load()
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
        cut: tuple[int, int] | None = None,
        progress: Progress | None = None,
    ) -> DocumentInfo:
        """Adds one document under an id of the caller's, or replaces it; the corpus is made when there is none.

        Its words are `text`, or a `file` of a type that is read (its name tells the type and stands in for a missing
        title). When this returns, the document is on disk and found by every process. Adding the same again does
        nothing; `about` may differ, and without it the document keeps what it had. An ingest of a folder never
        takes it away. `cut` are the tokens of a passage and of the overlap, where they are not the settings'.
        Raises DataError when there are no words to read, Refused for a name that cannot be one or a changed
        embedder, NotFound never.
        """
        read = one_document(document, title, text, file, parse_limits(self._settings))
        with self._writing(name, progress, cut) as (corpus, ingest):
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
        """Takes a corpus away, be it damaged. What made it (a recipe, documents) stays. Raises NotFound."""
        self._room.remove(name)

    def rename(self, name: str, new: str) -> None:
        """Gives a corpus another name; one that holds nothing yet has none. Raises Conflict, Refused."""
        self._room.rename(name, new)

    def backup(self, name: str, file: Path) -> JSON:
        """Writes all that a corpus has committed to one file, while others may write to it; returns what the file
        says of itself. Raises NotFound, Conflict when the file exists, StorageError.
        """
        self._corpus(name)
        return backup.write(self._room.folder(name) / backup.STORE, name, file)

    def restore(self, file: Path, name: str | None = None) -> CorpusInfo:
        """Makes a corpus of a backup, under its own name or another, once every byte of it is checked.

        Raises Refused for a file that is none or is damaged, Conflict when the corpus exists, StorageError.
        """
        name = name or backup.named(file)
        folder = self._room.folder(name)
        with corpus_lock(folder):
            backup.read(file, folder)
            corpus = self._room.made(name)
            with contextlib.suppress(Refused):  # another embedder's: whoever searches it is told the command
                corpus.publish()
        return corpus.info()

    def close(self) -> None:
        """Releases every connection."""
        self._room.close()
        if self._engine is not None:
            self._engine.close()

    @contextlib.contextmanager
    def _writing(
        self, name: str, progress: Progress | None = None, cut: tuple[int, int] | None = None
    ) -> Iterator[tuple[Corpus, Ingest]]:
        """A corpus, made if need be, under its lock, with what writes to it."""
        folder = self._room.folder(name)
        size, overlap = cut or (self._settings.chunk_tokens, self._settings.overlap_tokens)
        settings = self._settings.model_copy(update={"chunk_tokens": size, "overlap_tokens": overlap})
        with spoken(folder), corpus_lock(folder):
            corpus = self._room.made(name)
            yield corpus, Ingest(name, corpus.store, self.embedder, settings, progress, corpus.publish)

    def _vector(self, query: Query) -> Vectors:
        if isinstance(query, str):
            return self.embedder.embed_query(query)
        if isinstance(query, Question):
            query = query.vector
        if query.shape != (self.embedder.dim,):
            raise BadRequest(f"a query vector has the shape ({self.embedder.dim},), not {query.shape}.", param="query")
        return np.ascontiguousarray(query, dtype=np.float32)

    def _corpus(self, name: str, rights: Rights = OWNER) -> Corpus:
        return self._room.corpus(name, rights)
