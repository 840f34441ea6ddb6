"""Documents added one by one: durable, idempotent, with what is known about them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.errors import DataError, NotFound
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.store import About
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings

FERRY = "The ferry to Osterholm leaves at seven in the morning and carries no bicycles."
CLOCK = "The clock tower runs four minutes slow because a stork nests on the minute hand."
MINE = About({"year": 1871, "draft": False}, "ada", ("harbour", "town"))


@pytest.fixture
def library(tmp_path: Path, embedder: Embedder) -> Iterator[Library]:
    library = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
    yield library
    library.close()


def test_a_document_is_found_by_every_process_as_soon_as_it_is_added(
    library: Library, tmp_path: Path, embedder: Embedder
) -> None:
    other = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
    told = library.add_document("town", "file-1", title="Ferry", text=FERRY, about=MINE)
    assert (told.id, told.title, told.passages, told.bytes, told.about) == ("file-1", "Ferry", 1, len(FERRY), MINE)
    assert [p.id for p in other.search("town", "when does the ferry leave", 3)] == ["file-1"]
    other.add_document("town", "file-2", text=CLOCK)
    assert [d.id for d in library.documents("town")] == ["file-1", "file-2"]
    library.delete_document("town", "file-1")
    assert [p.id for p in other.search("town", "when does the ferry leave", 3)] == ["file-2"]
    with pytest.raises(NotFound, match="file-1"):
        other.document("town", "file-1")
    other.close()


def test_adding_the_same_again_writes_nothing_and_replacing_keeps_what_is_known(library: Library) -> None:
    library.add_document("town", "a", text=FERRY, about=MINE)
    before = library.document("town", "a")
    assert library.add_document("town", "a", text=FERRY) == before
    changed = library.add_document("town", "a", text=CLOCK)
    assert changed.about == MINE
    assert [p.text for p in library.search("town", "ferry", 3)] == [CLOCK]
    described = library.describe_document("town", "a", About(owner="bob"))
    assert described.about == About(owner="bob")
    assert described.hash == changed.hash


def test_an_ingest_of_a_folder_leaves_added_documents_alone(library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "clock.txt").write_text(CLOCK)
    library.add_document("town", "ferry", text=FERRY)
    report = library.ingest("town", folder)
    assert (report.added, report.deleted, report.passages) == (1, 0, 2)
    assert {d.id for d in library.documents("town")} == {"ferry", "clock.txt"}


def test_a_document_without_words_is_refused(library: Library, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        library.add_document("town", "a", text=" \n")
    with pytest.raises(DataError, match="either"):
        library.add_document("town", "a")
    with pytest.raises(DataError, match="cannot be read"):
        library.add_document("town", "a", file=tmp_path / "nothing.txt")


def test_D10_a_corpus_of_the_first_schema_is_upgraded_with_a_copy_beside_it(
    library: Library, tmp_path: Path, embedder: Embedder
) -> None:
    library.add_document("town", "a", text=FERRY)
    library.close()
    path = tmp_path / "home/index/town/store.db"
    with sqlite3.connect(path) as truth:
        for column in ("path", "bytes", "attributes", "owner", "groups"):
            truth.execute(f"ALTER TABLE documents DROP COLUMN {column}")
        truth.execute("PRAGMA user_version = 0")
    after = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
    assert after.search("town", "ferry", 1)[0].id == "a"
    assert after.document("town", "a").about == About()
    assert path.with_name("store.v1.db").is_file()
    after.delete("town")
    assert not list(path.parent.glob("*.db*"))
    after.close()


def test_passages_that_say_almost_the_same_are_grouped(library: Library) -> None:
    fact = "The lighthouse on Gull Rock was lit for the first time in 1871 by Ada Merrow, and the lamp burnt whale oil."
    texts = [fact, CLOCK, fact.replace("oil.", "oil!"), fact.replace("1871", "1872"), fact.upper(), FERRY]
    for n, text in enumerate(texts):
        library.add_document("town", f"d{n}", text=text)
    assert [[p.id for p in group] for group in library.alike("town")] == [["d0", "d2", "d4"]]
