"""Only what changed is done again, a failing disk is told in words, and backups hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.errors import Conflict, NotFound, Refused, StorageError
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.store import About
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings


@pytest.fixture
def library(tmp_path: Path, embedder: Embedder) -> Iterator[Library]:
    library = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
    yield library
    library.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(12):
        (folder / f"note{i}.md").write_text(f"# Note {i}\n\nKeeper number {i} lit the lamp of tower {i}.")
    return folder


def ingest(library: Library, folder: Path) -> tuple[int, int]:
    """(texts embedded, files read) by an ingest."""
    steps: dict[str, int] = {}
    library.ingest("town", folder, lambda step, done, _: steps.update({step: done}))
    return steps.get("embedding town", 0), steps["reading town"]


def ids(library: Library) -> set[str]:
    return {p.id for p in library.search("town", "who lit the lamp", 50)}


# --- increments ------------------------------------------------------------------------------------------------------


def test_what_moves_is_not_embedded_again(library: Library, folder: Path) -> None:
    assert ingest(library, folder) == (12, 12)
    (folder / "old").mkdir()
    for i in range(3):
        (folder / f"note{i}.md").rename(folder / "old" / f"note{i}.md")
    (folder / "copy.md").write_text((folder / "note5.md").read_text())
    assert ingest(library, folder) == (0, 13)
    assert {p for p in ids(library) if "/" in p} == {f"old/note{i}.md" for i in range(3)}
    assert len(library.documents("town")) == 13
    assert library.corpus("town").passages == 12


def test_one_changed_document_is_one_vector_in_the_next_generation(
    library: Library, folder: Path, tmp_path: Path, embedder: Embedder
) -> None:
    ingest(library, folder)
    (folder / "note7.md").write_text("# Note 7\n\nTower 7 was struck by lightning.")
    (folder / "note8.md").unlink()
    assert ingest(library, folder) == (1, 11)
    scratch = Library(Home(tmp_path / "scratch"), embedder, RetrievalSettings())
    scratch.ingest("town", folder)
    fresh = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())  # reads the generation from disk
    for query in ("lightning", "who lit the lamp of tower 3", "note 8"):
        found = fresh.search("town", query, 12)
        assert {p.id: round(p.score, 3) for p in found} == {
            p.id: round(p.score, 3) for p in scratch.search("town", query, 12)
        }
    scratch.close()
    fresh.close()


def test_a_file_that_breaks_keeps_what_was_read_from_it(library: Library, folder: Path) -> None:
    ingest(library, folder)
    (folder / "note3.md").write_bytes(b"\xff\xfe\0\0broken\0")
    (folder / "note4.md").write_text("  ")
    report = library.ingest("town", folder)
    assert {(p.file, p.kept) for p in report.problems} == {("note3.md", True), ("note4.md", False)}
    assert report.deleted == 1
    assert ids(library) == {f"note{i}.md" for i in range(12)} - {"note4.md"}


# --- disks -----------------------------------------------------------------------------------------------------------

#: no file may grow beyond what it is: what a full disk says to whoever writes
FULL = """
import resource, sys
from pathlib import Path
from hybrid.errors import StorageError
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings
home, model, name, folder, size = sys.argv[1:]
library = Library(Home(Path(home)), Embedder(Path(model), name), RetrievalSettings())
library.embedder.embed_query("loaded before the disk fills")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
try:
    library.ingest("town", Path(folder))
except StorageError as error:
    print(error.message)
"""


@pytest.mark.parametrize("size", [4_000, 70_000])
def test_D2_a_full_disk_is_told_in_words_and_the_corpus_stays_whole(
    library: Library, folder: Path, tmp_path: Path, embedder: Embedder, size: int
) -> None:
    ingest(library, folder)
    before, generation = ids(library), library.corpus("town").generation
    more = tmp_path / "more"
    more.mkdir()
    for i in range(100):
        (more / f"late{i}.txt").write_text(f"Late note {i}. " + "The lamp was lit again and again. " * 20)
    argv = [sys.executable, "-c", FULL, str(tmp_path / "home"), str(embedder.path), embedder.name, str(more), str(size)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "free some space" in done.stdout.lower() or "look at the disk" in done.stdout, done.stderr
    after = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
    assert ids(after) == before
    assert after.corpus("town").generation == generation
    assert not list((tmp_path / "home/index/town/generations").glob(".staging-*"))
    assert ingest(after, folder) == (0, 12)
    after.close()


def test_D2_a_damaged_store_says_how_to_mend_it(library: Library, folder: Path, tmp_path: Path) -> None:
    ingest(library, folder)
    library.close()
    path = tmp_path / "home/index/town/store.db"
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(bytes(content))
    with pytest.raises(StorageError, match="hybrid corpora restore"):
        library.search("town", "lamp", 1)


# --- backups ---------------------------------------------------------------------------------------------------------


def test_D11_a_backup_taken_while_writing_is_one_whole_moment(
    library: Library, folder: Path, tmp_path: Path, embedder: Embedder
) -> None:
    ingest(library, folder)
    stop = threading.Event()

    def write() -> None:
        other = Library(Home(tmp_path / "home"), embedder, RetrievalSettings())
        n = 0
        while not stop.is_set():
            other.add_document("town", f"late{n}", text=f"Late note {n} on the lamp.", about=About(owner="ada"))
            n += 1
        other.close()

    writer = threading.Thread(target=write)
    writer.start()
    elsewhere = Library(Home(tmp_path / "elsewhere"), embedder, RetrievalSettings())
    try:
        for i in range(4):
            library.backup("town", tmp_path / f"{i}.backup")
            restored = elsewhere.restore(tmp_path / f"{i}.backup", f"town{i}")
            late = sorted(int(d.id[4:]) for d in elsewhere.documents(f"town{i}") if d.id.startswith("late"))
            assert late == list(range(len(late)))  # what was committed up to a moment, and nothing after it
            assert restored.documents == restored.passages == 12 + len(late)
    finally:
        stop.set()
        writer.join()
    library.backup("town", tmp_path / "last.backup")
    elsewhere.restore(tmp_path / "last.backup")
    for query in ("who lit the lamp", "tower 3", "late note 0"):
        found, there = ({p.id: p.score for p in one.search("town", query, 999)} for one in (library, elsewhere))
        assert there == pytest.approx(found)
    assert elsewhere.documents("town") == library.documents("town")
    elsewhere.close()


def test_a_backup_is_never_written_over_and_a_corpus_neither(library: Library, folder: Path, tmp_path: Path) -> None:
    ingest(library, folder)
    file = tmp_path / "town.backup"
    library.backup("town", file)
    with pytest.raises(Conflict, match="another name"):
        library.backup("town", file)
    with pytest.raises(Conflict, match="delete it first"):
        library.restore(file)
    with pytest.raises(NotFound, match="Known: town"):
        library.backup("city", tmp_path / "city.backup")
    with pytest.raises(Refused, match="cannot name"):
        library.restore(file, "../town")
    library.delete("town")
    library.restore(file)
    assert len(ids(library)) == 12


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
def test_D3_a_flipped_byte_in_a_backup_is_refused(library: Library, folder: Path, tmp_path: Path, where: float) -> None:
    ingest(library, folder)
    file = tmp_path / "town.backup"
    library.backup("town", file)
    content = bytearray(file.read_bytes())
    content[int(len(content) * where)] ^= 0x40
    file.write_bytes(bytes(content))
    with pytest.raises(Refused):
        library.restore(file, "copy")
    assert library.names() == ["town"]
    assert not list((tmp_path / "home/index/copy").glob("store.db*"))


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_D1_kills_at_random_moments_lose_nothing_and_invent_nothing(tmp_path: Path) -> None:
    seed = os.getpid()  # other moments every time; a failure names it
    argv = [sys.executable, "-m", "hybrid.cli", "bench", "ingest", "--kills", "5", "--seed", str(seed), "--json"]
    environment = {**os.environ, "HYBRID_HOME": str(tmp_path)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["rows"]) == 5
    assert told["summary"]["documents"] > 0
    assert all(goal["met"] for goal in told["goals"]), f"seed {seed}: {told}"
