"""A corpus that is replaced a hundred times under a stream of questions (row D5)."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.knowledge.search import OWNER, Library
from hybrid.knowledge.store import About
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings
from hybrid.types.rights import Rights

ISSUES = 100
PAGES = [f"page{n}" for n in range(6)]
#: comes and goes between the issues
LEAFLET = "leaflet"
#: only its owner's
DIARY = "diary"
QUESTION = "what does the almanac say of high water at the quay?"
GUEST = Rights(caller="bob", admin=False)


class Quick(Embedder):
    """An embedder that takes no time: every text means the same."""

    def embed(self, texts: Sequence[str], progress: Any = None) -> Vectors:
        return np.tile(self.embed_query(QUESTION), (len(texts), 1))


@pytest.fixture
def libraries(tmp_path: Path, embedder: Embedder) -> Iterator[list[Library]]:
    """Two of one home, as of two processes."""
    quick = Quick(embedder.path, embedder.name)
    with contextlib.ExitStack() as stack:
        opened = [Library(Home(tmp_path / "home"), quick, RetrievalSettings()) for _ in range(2)]
        yield [stack.enter_context(contextlib.closing(library)) for library in opened]


def write(folder: Path, issue: int) -> Path:
    """The almanac of one issue: no page is as it was."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": name, "title": "", "text": f"Issue {issue}: {name} on high water at the quay."} for name in PAGES]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def issue_of(library: Library, rights: Rights) -> int:
    """The one issue that an answer is from: all of its pages, each once."""
    found = {p.id: p.text for p in library.search("almanac", QUESTION, len(PAGES) + 2, rights=rights)}
    assert (DIARY in found) == rights.admin
    assert found.keys() - {DIARY, LEAFLET} == set(PAGES), found
    (issue,) = {int(found[page].split()[1].rstrip(":")) for page in PAGES}
    return issue


def test_D5_every_answer_during_a_hundred_publications_is_of_one_generation(
    tmp_path: Path, libraries: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what survives a power cut is asked elsewhere
    (writer, reader), ended = libraries, threading.Event()
    writer.ingest("almanac", write(tmp_path / "almanac", 0))
    writer.add_document("almanac", DIARY, text="A diary on high water at the quay.", about=About({}, "ann", ()))

    def ask(rights: Rights) -> list[int]:
        seen = [issue_of(reader, rights)]
        while not ended.wait(0.01):
            seen.append(issue_of(reader, rights))
        return seen

    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(ask, rights) for rights in (OWNER, GUEST)]
        try:
            for issue in range(1, ISSUES + 1):
                writer.ingest("almanac", write(tmp_path / "almanac", issue))
                if issue % 4 == 1:
                    writer.add_document("almanac", LEAFLET, text=f"Leaflet {issue} on high water at the quay.")
                if issue % 4 == 3:
                    writer.delete_document("almanac", LEAFLET)
        finally:
            ended.set()
    for stream in streams:
        seen = stream.result()
        assert seen == sorted(seen)
        assert len(set(seen)) > 2
    assert issue_of(reader, GUEST) == ISSUES
    assert reader.corpus("almanac").generation == ISSUES + 1
