"""Corpora: what is ingested is found, what is deleted is not, and neither a crash nor a flipped bit changes that."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from library_kit import Open

from hybrid.errors import BadRequest, DataError, NotFound, Refused
from hybrid.knowledge.chunk import Chunker, markdown_title
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings

FACTS = {
    "lighthouse": "The lighthouse on Gull Rock was lit for the first time in 1871 by Ada Merrow.",
    "bakery": "The bakery in Mill Lane sells rye bread on Tuesdays and plum cake on Fridays.",
    "ferry": "The ferry to Osterholm leaves at seven in the morning and carries no bicycles.",
    "library": "The town library lends telescopes to anyone who can name three constellations.",
    "orchard": "The orchard behind the chapel grows forty kinds of apples, most of them sour.",
    "clock": "The clock tower runs four minutes slow because a stork nests on the minute hand.",
    "museum": "The museum of knots keeps a rope that was tied on a whaling ship in 1790.",
    "school": "Pupils of the village school learn to sail before they learn long division.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one text file a fact."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in FACTS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def write_rows(folder: Path, rows: list[dict | str]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def answers(library: Library, name: str = "town") -> dict[str, list[str]]:
    """What a search for each fact finds: the comparison between two indexes."""
    return {fact: [p.id for p in library.search(name, text, 3)] for fact, text in FACTS.items()}


# --- embedding -------------------------------------------------------------------------------------------------------


def test_vectors_are_unit_float32_and_a_query_is_embedded_as_in_bulk(embedder: Embedder) -> None:
    texts = [*FACTS.values(), "a", "word " * 1000, ""]
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), embedder.dim)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    for text, vector in zip(texts, embedder.embed_queries(texts), strict=True):
        assert embedder.embed_query(text) @ vector > 0.999
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_vectors_are_those_of_the_reference_implementation(embedder: Embedder) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(embedder.path), device="cpu").encode(
        list(FACTS.values()), normalize_embeddings=True
    )
    assert ((embedder.embed(list(FACTS.values())) * reference).sum(axis=1) > 0.999).all()


def test_a_cached_query_cannot_be_spoiled_by_its_reader(embedder: Embedder) -> None:
    with pytest.raises(ValueError, match="read-only"):
        embedder.embed_query("what time is it")[0] = 1.0


def test_threads_do_not_disturb_one_another(embedder: Embedder) -> None:
    fresh = Embedder(embedder.path, embedder.name)
    long = "word " * 1000
    texts = [f"{fact} {i}" for i in range(4) for fact in FACTS.values()]
    expected = embedder.embed(texts)
    with ThreadPoolExecutor(8) as pool:
        bulk = [pool.submit(fresh.embed, texts) for _ in range(2)]
        counts = [pool.submit(fresh.count_tokens, [long]) for _ in range(20)]
        queries = list(pool.map(fresh.embed_query, texts))
    assert all(count.result() == [1000] for count in counts)
    for vectors in (queries, *(job.result() for job in bulk)):
        assert (np.einsum("nd,nd->n", np.stack(vectors), expected) > 0.999).all()


def test_bulk_progress_reaches_the_total(embedder: Embedder) -> None:
    seen: list[tuple[int, int]] = []
    embedder.embed(list(FACTS.values()), lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(FACTS), len(FACTS))


# --- cutting ---------------------------------------------------------------------------------------------------------


def words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_headings_become_the_title_and_offsets_point_into_the_document() -> None:
    prose = " ".join(f"Sentence number {i} says little." for i in range(12))
    text = (
        f"# Guide\n\nIntro. {prose}\n\n## Setup\n{prose}\n```\n# no heading\n```\n### Linux\n{prose}\n## Use\n{prose}\n"
    )
    pieces = Chunker(words, 40).cut(markdown_title(text, "guide"), text, markdown=True)
    assert list(dict.fromkeys(p.title for p in pieces)) == [
        "Guide",
        "Guide › Setup",
        "Guide › Setup › Linux",
        "Guide › Use",
    ]
    assert all(text[p.start : p.end] == p.text for p in pieces)
    assert all(len(p.text.split()) <= 50 for p in pieces)
    assert "".join("".join(p.text for p in pieces).split()).count("Sentencenumber") == 48


def test_a_short_document_stays_whole() -> None:
    text = "# Title\n\nA line.\n\n## Part\n\nAnother."
    [piece] = Chunker(words, 40).cut("Title", text, markdown=True)
    assert piece.text == text


# --- ingest and search -----------------------------------------------------------------------------------------------


def test_a_folder_is_found_by_meaning(open_library: Open, folder: Path) -> None:
    library = open_library()
    report = library.ingest("town", folder)
    assert (report.added, report.skipped, report.passages) == (8, 0, 8)
    [hit] = library.search("town", "When was the light on the rock first lit?", 1)
    assert (hit.id, hit.document, hit.corpus, hit.text) == (
        "lighthouse.txt",
        "lighthouse.txt",
        "town",
        FACTS["lighthouse"],
    )
    assert 0.3 < hit.score <= 1
    assert library.corpus("town").wire()["documents"] == 8


def test_only_changes_are_embedded(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    (folder / "bakery.txt").write_text("The bakery has become a cinema.")
    (folder / "ferry.txt").unlink()
    (folder / "bridge.txt").write_text("The bridge is made of glass.")
    seen: list[tuple[str, int, int]] = []
    report = library.ingest("town", folder, progress=lambda *step: seen.append(step))
    assert (report.added, report.changed, report.deleted, report.unchanged, report.passages) == (1, 1, 1, 6, 8)
    assert seen[-1] == ("embedding town", 2, 2)
    assert library.search("town", "cinema", 1)[0].id == "bakery.txt"
    assert "ferry.txt" not in {p.id for p in library.search("town", FACTS["ferry"], 50)}
    assert library.ingest("town", folder).unchanged == 8


def test_long_documents_are_cut_and_named(open_library: Open, tmp_path: Path) -> None:
    long = "\n\n".join(f"Chapter {i}. {fact} " * 4 for i, fact in enumerate(FACTS.values()))
    rows = [{"id": "D", "title": "Town", "text": long}, {"id": "E", "title": "", "text": "Short."}]
    library = open_library(chunk_tokens=64)
    library.ingest("town", write_rows(tmp_path / "rows", rows))
    found = library.search("town", FACTS["museum"], 50)
    assert {p.document for p in found} == {"D", "E"}
    parts = sorted(int(p.id.removeprefix("D#")) for p in found if p.document == "D")
    assert parts == list(range(len(parts)))
    assert len(parts) > 3
    assert [p.id for p in found if p.document == "E"] == ["E"]


def test_equal_text_is_stored_once_and_found_under_every_id(open_library: Open, tmp_path: Path) -> None:
    same = FACTS["clock"]
    rows = [{"id": f"c{i}", "title": "Clock", "text": same} for i in range(3)]
    rows.append({"id": "b", "title": "", "text": FACTS["bakery"]})
    source = write_rows(tmp_path / "rows", rows)
    library = open_library()
    assert library.ingest("town", source).passages == 2
    assert [p.id for p in library.search("town", same, 2)] == ["c0", "b"]
    every = library.search("town", same, 2, every_id=True)
    assert [p.id for p in every] == ["c0", "c1", "c2", "b"]
    assert len({p.score for p in every[:3]}) == 1
    write_rows(source, rows[1:])
    library.ingest("town", source)
    assert [p.id for p in library.search("town", same, 1, every_id=True)] == ["c1", "c2"]


def test_bad_rows_and_files_are_told_and_the_rest_goes_on(open_library: Open, tmp_path: Path, folder: Path) -> None:
    rows = [
        {"id": "good", "title": "", "text": "Fine."},
        "{not json",
        {"id": "no-text"},
        {"id": 7, "text": "x"},
        {"id": "good", "text": "again"},
        '{"id": "surrogate", "text": "\\ud800"}',
        "[" * 100_000,
        {"id": "last", "text": "Also fine."},
    ]
    library = open_library()
    report = library.ingest("rows", write_rows(tmp_path / "rows", rows))
    assert (report.added, report.skipped) == (2, 6)
    assert [p["line"] for p in report.wire()["problems"]] == [2, 3, 4, 5, 6, 7]
    assert "line 1" in report.problems[3].reason

    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "empty.md").write_text(" \n")
    (folder / "outside.txt").symlink_to(tmp_path / "rows" / "corpus.jsonl")
    (folder / ".hidden.txt").write_text("nobody asked for this")
    report = library.ingest("town", folder)
    assert {p.file for p in report.problems} == {"picture.png", "latin.txt", "empty.md", "outside.txt"}
    assert report.added == 8


def test_a_single_file_stands_beside_a_folder(open_library: Open, tmp_path: Path, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    extra = tmp_path / "harbour.md"
    extra.write_text("# Harbour\n\nThe harbour freezes every ninth winter.")
    assert library.ingest("town", extra).passages == 9
    assert library.ingest("town", folder).passages == 9
    assert library.search("town", "when does the harbour freeze", 1)[0].title == "Harbour"


def test_an_empty_folder_is_a_mistake_and_forgets_nothing(open_library: Open, tmp_path: Path, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no document"):
        library.ingest("town", tmp_path / "empty")
    with pytest.raises(DataError, match="does not exist"):
        library.ingest("town", tmp_path / "missing")
    assert library.corpus("town").documents == 8


def test_all_corpora_are_searched_together(open_library: Open, tmp_path: Path, folder: Path) -> None:
    library = open_library()
    with pytest.raises(NotFound, match="no corpus yet"):
        library.search(None, "anything", 3)
    library.ingest("town", folder)
    library.ingest("sea", write_rows(tmp_path / "sea", [{"id": "w", "title": "", "text": "Whales sleep upright."}]))
    assert library.names() == ["sea", "town"]
    found = library.search(None, "how do whales sleep", 3)
    assert (found[0].corpus, found[0].id) == ("sea", "w")
    assert {p.corpus for p in found[1:]} == {"town"}
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)


def test_what_cannot_be_searched_says_why(open_library: Open, folder: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    for name in ("city", "../town", "rag"):
        with pytest.raises(NotFound, match="Known: town"):
            library.search(name, "x", 1)
    with pytest.raises(Refused):
        library.ingest("../town", folder)
    with pytest.raises(BadRequest, match="k"):
        library.search("town", "x", 0)
    with pytest.raises(BadRequest, match="shape"):
        library.search("town", np.ones(3, np.float32), 1)


def test_a_sample_is_passages_with_their_vectors(open_library: Open, folder: Path, embedder: Embedder) -> None:
    library = open_library()
    library.ingest("town", folder)
    passages, vectors = library.sample("town", 5, 1)
    assert len(passages) == len(vectors) == 5
    assert passages == library.sample("town", 5, 1)[0]
    assert passages != library.sample("town", 5, 2)[0]
    for passage, vector in zip(passages, vectors, strict=True):
        assert library.search("town", vector, 1)[0].id == passage.id
    assert library.vectors("town", 100).shape == (8, embedder.dim)


# --- deletion --------------------------------------------------------------------------------------------------------


def test_D6_a_deleted_document_is_never_returned(open_library: Open, folder: Path) -> None:
    writer, reader = open_library(), open_library()
    writer.ingest("town", folder)
    assert reader.search("town", FACTS["orchard"], 1)[0].id == "orchard.txt"
    writer.delete_document("town", "orchard.txt")
    for library in (writer, reader, open_library()):
        assert "orchard.txt" not in {p.id for p in library.search("town", FACTS["orchard"], 50)}
        assert len(library.search("town", FACTS["orchard"], 3)) == 3
        assert "orchard.txt" not in {p.id for p in library.sample("town", 50, 0)[0]}
    with pytest.raises(NotFound):
        writer.delete_document("town", "orchard.txt")


def test_D6_the_store_filters_what_a_snapshot_still_holds(open_library: Open, folder: Path, home: Path) -> None:
    library = open_library()
    library.ingest("town", folder)
    library.search("town", "x", 1)
    with sqlite3.connect(home / "index/town/store.db") as truth:  # committed by another; no generation is published
        truth.execute("PRAGMA foreign_keys=ON")
        truth.execute("DELETE FROM documents WHERE id IN ('orchard.txt', 'clock.txt')")
        truth.execute("DELETE FROM passages WHERE row NOT IN (SELECT passage FROM names)")
    found = [p.id for p in library.search("town", FACTS["orchard"], 6)]
    assert len(found) == 6
    assert not {"orchard.txt", "clock.txt"} & set(found)


def test_a_corpus_can_be_deleted_and_made_again(open_library: Open, folder: Path) -> None:
    library, other = open_library(), open_library()
    library.ingest("town", folder)
    assert other.search("town", "bread", 1)
    library.delete("town")
    assert library.names() == other.names() == []
    with pytest.raises(NotFound):
        other.search("town", "bread", 1)
    (folder / "bakery.txt").unlink()
    library.ingest("town", folder)
    assert "bakery.txt" not in {p.id for p in other.search("town", "bread", 50)}


# --- generations -----------------------------------------------------------------------------------------------------


def test_another_process_s_publication_is_seen(open_library: Open, folder: Path) -> None:
    writer, reader = open_library(), open_library()
    writer.ingest("town", folder)
    reader.refresh()
    before = reader.corpus("town").generation
    (folder / "moon.txt").write_text("The moon over the town is lent by the theatre.")
    writer.ingest("town", folder)
    reader.refresh()
    assert reader.corpus("town").generation > before
    assert reader.search("town", "who lends the moon", 1)[0].id == "moon.txt"


def test_two_generations_are_kept_and_rubbish_is_swept(open_library: Open, folder: Path, home: Path) -> None:
    library = open_library()
    generations = home / "index/town/generations"
    (generations / ".staging-dead").mkdir(parents=True)
    for i in range(4):
        (folder / "diary.txt").write_text(f"Day {i}: nothing happened.")
        library.ingest("town", folder)
    assert sorted(p.name for p in generations.iterdir()) == ["3", "4"]


@pytest.mark.parametrize("file", ["vectors.faiss", "manifest.json"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.95])
def test_D3_a_flipped_byte_is_noticed_and_mended(
    open_library: Open, folder: Path, home: Path, file: str, where: float
) -> None:
    library = open_library()
    library.ingest("town", folder)
    expected = answers(library)
    path = home / "index/town/generations/1" / file
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0x40
    path.write_bytes(bytes(content))
    fresh = open_library()
    assert answers(fresh) == expected
    assert fresh.corpus("town").generation == 2


@pytest.mark.parametrize("lost", ["vectors.faiss", "manifest.json", ""])
def test_D3_a_lost_or_truncated_generation_is_built_again(
    open_library: Open, folder: Path, home: Path, lost: str
) -> None:
    library = open_library()
    library.ingest("town", folder)
    expected = answers(library)
    generation = home / "index/town/generations/1"
    if lost:
        os.truncate(generation / lost, 10)
    else:
        generation.rename(home / "elsewhere")
    assert answers(open_library()) == expected


def test_a_damaged_generation_is_served_from_the_store_while_another_writes(
    open_library: Open, folder: Path, home: Path
) -> None:
    library = open_library()
    library.ingest("town", folder)
    expected = answers(library)
    os.truncate(home / "index/town/generations/1/vectors.faiss", 10)
    holder = child("""
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True); sys.stdin.read()
""", str(home / "index/town/store.lock"))  # fmt: skip
    try:
        assert line(holder) == "held"
        assert answers(open_library()) == expected
    finally:
        holder.kill()
        holder.wait()


def test_D12_a_changed_embedder_is_refused_with_the_command(
    open_library: Open, folder: Path, home: Path, embedder: Embedder
) -> None:
    library = open_library()
    library.ingest("town", folder)
    expected = answers(library)
    with sqlite3.connect(home / "index/town/store.db") as truth:
        truth.execute("UPDATE meta SET digest = 'of-another', embedder = 'another', revision = revision + 1")
        truth.execute("UPDATE passages SET vector = zeroblob(length(vector))")
    for refused in (
        lambda: library.search("town", "bread", 1),
        lambda: open_library().sample("town", 1, 0),
        lambda: library.ingest("town", folder),
    ):
        with pytest.raises(Refused, match=r"another.*--name town --rebuild"):
            refused()
    report = library.ingest("town", folder, rebuild=True)
    assert (report.unchanged, report.passages) == (8, 8)
    assert answers(library) == answers(open_library()) == expected


# --- crashes and neighbours ------------------------------------------------------------------------------------------

PRELUDE = "import os, signal, sys\nfrom pathlib import Path\n"


def child(code: str, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


INGEST = """
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings
home, model, name, source, batch = sys.argv[1:]
library = Library(Home(Path(home)), Embedder(Path(model), name), RetrievalSettings(embed_batch=int(batch)))
library.embedder.dim
print("ready", flush=True)
sys.stdin.readline()
report = library.ingest("town", Path(source), progress=lambda text, done, total: print(text, done, flush=True))
print("done", report.added, flush=True)
"""


def start_ingest(home: Path, embedder: Embedder, source: Path, batch: int) -> subprocess.Popen[str]:
    return child(INGEST, str(home), str(embedder.path), embedder.name, str(source), str(batch))


def go(process: subprocess.Popen[str]) -> None:
    assert line(process) == "ready"
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_D1_a_kill_during_ingest_loses_nothing_acknowledged(
    open_library: Open, tmp_path: Path, home: Path, embedder: Embedder
) -> None:
    rows: list[dict | str] = [
        {"id": f"r{i}", "title": "", "text": f"{fact} It was written down as note number {i}."}
        for i, fact in enumerate(list(FACTS.values()) * 20)
    ]
    source = write_rows(tmp_path / "rows", rows)
    process = start_ingest(home, embedder, source, 16)
    go(process)
    while line(process) != "embedding town 96":
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    after = open_library()
    # a batch's progress is told before it is committed: the one before it is on disk
    for i in range(80):
        assert after.search("town", rows[i]["text"], 1)[0].id == f"r{i}"  # type: ignore[index]
    assert after.corpus("town").documents < len(rows)
    report = after.ingest("town", source)
    assert report.unchanged >= 80
    assert report.added == len(rows) - report.unchanged
    scratch = Library(Home(tmp_path / "scratch"), embedder, RetrievalSettings())
    scratch.ingest("town", source)
    for query in FACTS.values():
        found, wanted = after.search("town", query, 5), scratch.search("town", query, 5)
        assert [p.score for p in found] == pytest.approx([p.score for p in wanted], abs=2e-3)
    assert not list((home / "index/town/generations").glob(".staging-*"))
    scratch.close()


#: an interpreter's own audit events name every place where publication can be cut off
FAILPOINTS = {
    "before the manifest": ("os.rename", ".manifest.json."),
    "before the rename": ("os.rename", ".staging-"),
    "before the flip": ("shutil.rmtree", ".staging-"),
}
PUBLISH = """
from hybrid.knowledge.index import build
from hybrid.knowledge.store import Store
from hybrid.settings import RetrievalSettings
folder, event, mark = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = Store(folder / "store.db")
with store.change() as change:
    change.remove(["clock.txt"]); change.sweep()
def die(name, args):
    if name == event and mark in Path(args[0]).name: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
build(folder / "generations", store, RetrievalSettings())
"""


@pytest.mark.parametrize("point", FAILPOINTS)
def test_D1_a_kill_during_publication_leaves_a_whole_index(
    open_library: Open, folder: Path, home: Path, point: str
) -> None:
    library = open_library()
    library.ingest("town", folder)
    process = child(PUBLISH, str(home / "index/town"), *FAILPOINTS[point])
    assert process.wait(timeout=60) == -signal.SIGKILL
    after = open_library()
    ids = {p.id for p in after.search("town", FACTS["clock"], 50)}
    assert ids == {f"{name}.txt" for name in FACTS} - {"clock.txt"}
    (folder / "clock.txt").unlink()
    (folder / "well.txt").write_text("The well answers questions in Latin.")
    after.ingest("town", folder)
    assert after.search("town", "which language does the well speak", 1)[0].id == "well.txt"
    left = sorted(p.name for p in (home / "index/town/generations").iterdir())
    assert all(name.isdecimal() for name in left)
    assert len(left) <= 2


def test_two_ingests_at_once_take_turns(open_library: Open, tmp_path: Path, home: Path, embedder: Embedder) -> None:
    def rows(mark: str) -> list[dict | str]:
        return [{"id": f"{mark}{i}", "title": "", "text": f"{mark} {i}: {t}"} for i, t in enumerate(FACTS.values())]

    both = [*rows("first"), *rows("second")]
    processes = []
    for i, own in enumerate((both, both)):
        processes.append(start_ingest(home, embedder, write_rows(tmp_path / f"rows{i}", own), 4))
    for process in processes:
        go(process)
    ends = [process.communicate(timeout=120)[0].split()[-1] for process in processes]
    assert sorted(ends) == ["0", "16"]  # the second waited, and found the work done
    assert open_library().corpus("town").documents == 16
