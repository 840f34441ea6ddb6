"""Large corpora: every kind of index finds what looking at all of them finds, hides what is hidden and forgets what is
gone; a new corpus is searched by its words first; copies are shown once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from library_kit import Open, libraries, write
from typer.testing import CliRunner

from hybrid.bench.synthetic import Made, texts
from hybrid.cli import app
from hybrid.errors import NotReady
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.store import About
from hybrid.types.rights import Rights

KINDS: dict[str, dict[str, int]] = {
    "flat": {},
    "hnsw": {"exact_up_to": 100},
    "ivfpq": {"exact_up_to": 100, "graph_up_to": 200},
}
TEXTS = list(texts(600))
GUEST = Rights(caller="guest", admin=False)


@pytest.fixture(scope="module")
def made(embedder: Embedder) -> Made:
    """Vectors that cost nothing, in clusters."""
    return Made(embedder.path, embedder.name)


@pytest.fixture
def open_library(home: Path, made: Made) -> Iterator[Open]:
    with libraries(home, made) as open_:
        yield open_


def numbered(numbers: range) -> dict[str, str]:
    return {f"p{n}": TEXTS[n] for n in numbers}


def manifest(home: Path, name: str = "big") -> dict:
    """What the newest generation says of itself."""
    newest = max((home / "index" / name / "generations").glob("[0-9]*"), key=lambda path: int(path.name))
    told: dict = json.loads((newest / "manifest.json").read_text())
    return told


def nearest(library: Library, made: Made, question: str, allowed: set[str]) -> list[str]:
    """The five ids nearest to a question among those allowed, by looking at all of them."""
    kept, vectors = library.sample("big", 10_000, 0)
    products = vectors @ made.embed_query(question)
    order = [kept[at].id for at in np.argsort(-products, kind="stable")]
    return [name for name in order if name in allowed][:5]


def agreement(library: Library, made: Made, questions: list[str], allowed: set[str], rights: Rights) -> float:
    """The share of the nearest that a search finds; nothing else than what is allowed may be found."""
    right = 0
    for question in questions:
        found = [p.id for p in library.search("big", question, 5, rights=rights)]
        assert set(found) <= allowed
        assert len(found) == min(5, len(allowed))
        right += len(set(found) & set(nearest(library, made, question, allowed)))
    return right / (len(questions) * min(5, len(allowed)))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_finds_the_nearest_and_tells_their_cosines(
    open_library: Open, tmp_path: Path, home: Path, made: Made, kind: str
) -> None:
    library = open_library(search="dense", **KINDS[kind])
    library.ingest("big", write(tmp_path / "rows", numbered(range(600))))
    assert manifest(home)["index"]["kind"] == kind
    questions = made.ask_about(TEXTS[:20], 1)
    assert agreement(library, made, questions, set(numbered(range(600))), Rights()) >= 0.95
    kept, vectors = library.sample("big", 10_000, 0)
    own = {p.id: vector for p, vector in zip(kept, vectors, strict=True)}
    for passage in library.search("big", questions[0], 5):
        assert passage.score == pytest.approx(float(own[passage.id] @ made.embed_query(questions[0])), abs=1e-4)


@pytest.mark.parametrize(("kind", "every"), [("flat", 3), ("hnsw", 3), ("hnsw", 40), ("ivfpq", 40)])
def test_what_is_hidden_takes_no_place_in_any_kind(
    open_library: Open, tmp_path: Path, made: Made, kind: str, every: int
) -> None:
    library = open_library(search="dense", **KINDS[kind])
    library.ingest("big", write(tmp_path / "rows", numbered(range(600))))
    shown = {f"p{n}" for n in range(0, 600, every)}
    with library._corpus("big").store.change() as change:
        for n in range(600):
            name, mine = f"p{n}", f"p{n}" in shown
            change.describe(name, About({"kind": "open" if mine else "closed"}, "" if mine else "ann"))
    questions = made.ask_about(TEXTS[100:112], 2)
    assert agreement(library, made, questions, shown, GUEST) >= 0.95
    by_filter = library.search("big", questions[0], 5, matches=lambda about: about.get("kind") == "open")
    assert [p.id for p in by_filter] == [p.id for p in library.search("big", questions[0], 5, rights=GUEST)]
    assert len(library.search("big", questions[0], 600, rights=GUEST)) == len(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_and_went_is_as_in_an_index_built_from_scratch(
    open_library: Open, tmp_path: Path, home: Path, made: Made, kind: str
) -> None:
    library = open_library(search="dense", **KINDS[kind])
    library.ingest("big", write(tmp_path / "rows", numbered(range(400))))
    changed = {"p30": "It says something else.", "p31": "And so does this."}
    held = numbered(range(20, 400)) | changed | numbered(range(400, 430))
    library.ingest("big", write(tmp_path / "rows", held))
    questions = made.ask_about([TEXTS[n] for n in (5, 30, 50, 200, 401, 420)], 3)
    scratch = open_library(tmp_path / "scratch", search="dense", **KINDS[kind])
    scratch.ingest("big", tmp_path / "rows")
    wanted = [[p.id for p in scratch.search("big", question, 5)] for question in questions]
    for one in (library, open_library(search="dense", **KINDS[kind])):
        assert [[p.id for p in one.search("big", question, 5)] for question in questions] == wanted
    library._corpus("big").publish()
    told = manifest(home)
    assert (told["passages"], told["index"]["vectors"]) == (410, 410)
    assert told["index"]["positions"] == (410 if kind == "flat" else 432)
    fresh = open_library(search="dense", **KINDS[kind])
    assert [[p.id for p in fresh.search("big", question, 5)] for question in questions] == wanted
    for n in range(20, 80):
        if n not in (30, 31):
            library.delete_document("big", f"p{n}")
    library._corpus("big").publish()
    assert manifest(home)["index"]["positions"] == 352, "a tenth was gone: built anew"
    everything = {p.id for p in library.search("big", questions[0], 600)}
    assert everything == set(held) - {f"p{n}" for n in range(20, 80) if n not in (30, 31)}


def test_the_kind_follows_the_number_of_passages(open_library: Open, tmp_path: Path, home: Path) -> None:
    library = open_library(exact_up_to=100)
    for count, kind in ((90, "flat"), (110, "hnsw"), (95, "flat")):
        library.ingest("big", write(tmp_path / "rows", numbered(range(count))))
        library._corpus("big").publish()
        assert manifest(home)["index"]["kind"] == kind


def test_a_flipped_byte_in_the_row_numbers_is_noticed(open_library: Open, tmp_path: Path, home: Path) -> None:
    library = open_library(exact_up_to=10, search="dense")
    library.ingest("big", write(tmp_path / "rows", numbered(range(60))))
    before = [p.id for p in library.search("big", TEXTS[7], 5)]
    path = home / "index/big/generations/1/vectors.rows.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    other = open_library(exact_up_to=10, search="dense")
    assert [p.id for p in other.search("big", TEXTS[7], 5)] == before
    assert other.corpus("big").generation == 2


def test_the_index_of_words_grows_by_parts_and_forgets(open_library: Open, tmp_path: Path, home: Path) -> None:
    library = open_library(exact_up_to=10, search="lexical", collapse=False)
    library.ingest("big", write(tmp_path / "rows", numbered(range(300))))
    for n in range(12):
        library.add_document("big", f"new{n}", text=f"Keeper number{n} saw a heron. {TEXTS[n]}")
        assert library.search("big", f"number{n}", 1)[0].id == f"new{n}"
    library.delete_document("big", "new3")

    def found(one: Library) -> tuple[set[str], str, str]:
        seven, old = (one.search("big", question, 1)[0].id for question in ("number7", TEXTS[250]))
        return {p.id for p in one.search("big", "heron", 20)}, seven, old

    wanted = ({f"new{n}" for n in range(12)} - {"new3"}, "new7", "p250")
    assert found(library) == wanted
    library._corpus("big").publish()
    parts = {name.split("/")[1] for name in manifest(home)["files"] if name.startswith("words/")}
    assert len(parts) > 1
    fresh = open_library(exact_up_to=10, search="lexical", collapse=False)
    assert found(fresh) == wanted
    assert fresh.search("big", "number3", 1) == ()


# --- words first -----------------------------------------------------------------------------------------------------


def test_a_new_corpus_is_searched_by_its_words_while_it_is_embedded(
    open_library: Open, tmp_path: Path, made: Made
) -> None:
    writer = open_library(words_first=50, embed_batch=40)
    stages: list[tuple[str, str, str]] = []

    def watch(step: str, done: int, _total: int) -> None:
        if step.startswith("embedding"):
            for way in ("hybrid", "dense", "lexical"):
                reader = open_library(search=way)
                [first] = reader.search("big", TEXTS[99], 1)
                stages.append((reader.corpus("big").stage, way, first.id))
                with pytest.raises(NotReady, match="still being made"):
                    reader.candidates("big", "which one is it")

    writer.ingest("big", write(tmp_path / "rows", numbered(range(100))), watch)
    assert set(stages) == {("words", way, "p99") for way in ("hybrid", "dense", "lexical")}
    assert writer.corpus("big").stage == "meaning"
    [question] = made.ask_about([TEXTS[99]], 4)
    assert open_library(search="dense").search("big", question, 1)[0].id == "p99"
    assert len(open_library().search("big", made.embed_query(question), 100)) == 100


def test_an_ingest_cut_off_before_the_vectors_goes_on_with_them(open_library: Open, tmp_path: Path, made: Made) -> None:
    source = write(tmp_path / "rows", numbered(range(100)))
    writer = open_library(words_first=50, embed_batch=40)

    def cut(step: str, done: int, _total: int) -> None:
        if step.startswith("embedding") and done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.ingest("big", source, cut)
    after = open_library(words_first=50)
    assert after.corpus("big").stage == "words"
    assert {p.id for n in range(0, 100, 9) for p in after.search("big", TEXTS[n], 1)} == {
        f"p{n}" for n in range(0, 100, 9)
    }
    seen: list[tuple[int, int]] = []
    report = after.ingest("big", source, lambda step, *told: seen.append(told) if "embedding" in step else None)
    assert (report.unchanged, seen[-1]) == (100, (60, 60))
    assert after.corpus("big").stage == "meaning"
    [question] = made.ask_about([TEXTS[80]], 5)
    assert after.search("big", question, 1)[0].id == "p80"


def test_a_document_beside_vectors_that_wait_finds_them_made(open_library: Open, tmp_path: Path) -> None:
    source = write(tmp_path / "rows", numbered(range(60)))

    def cut(step: str, *_told: int) -> None:
        if step.startswith("embedding"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_library(words_first=50).ingest("big", source, cut)
    library = open_library(words_first=50)
    library.add_document("big", "late", text="A heron stood in the harbour.")
    assert library.corpus("big").stage == "meaning"
    assert open_library(search="lexical").search("big", "heron", 1)[0].id == "late"
    assert len(library.sample("big", 100, 0)[0]) == 61


# --- copies ----------------------------------------------------------------------------------------------------------

NOTICE = (
    "The ferry to Osterholm leaves from the northern pier at dawn on every weekday and carries bicycles, prams and "
    "small carts, but neither horses nor the wagons of the brewery, whose driver has been told so by the harbour master"
)


def test_of_copies_one_is_shown_with_their_count_as_far_as_the_caller_sees_them(
    open_library: Open, embedder: Embedder
) -> None:
    library = open_library(embedder=embedder)
    library.add_document("big", "notice", text=f"{NOTICE}.")
    library.add_document("big", "copy", text=f"{NOTICE}!")
    library.add_document("big", "secret", text=f"{NOTICE}?", about=About(owner="ann"))
    library.add_document("big", "other", text="Tickets to Osterholm cost four coins.")
    library.add_document("big", "numbered", text=f"{NOTICE}, 2 times.")
    query = "when does the ferry leave for Osterholm"
    alike = {p.id: p.alike for p in library.search("big", query, 5)}
    assert sorted(alike.values()) == [0, 0, 2]
    assert {"other", "numbered"} < set(alike)
    assert sorted(p.alike for p in library.search("big", query, 5, rights=GUEST)) == [0, 0, 1]
    assert "secret" not in {p.id for p in library.search("big", query, 5, rights=GUEST)}
    every = open_library(embedder=embedder, collapse=False).search("big", query, 5)
    assert len(every) == 5
    assert {p.alike for p in every} == {0}


# --- benchmarks ------------------------------------------------------------------------------------------------------


def test_the_benchmarks_of_size_measure_what_they_say(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    run = partial(CliRunner().invoke, app, env={"HYBRID_HOME": str(home)}, catch_exceptions=False)
    out = tmp_path / "measured"
    sizes = ["--scale", "150", "--documents", "5", "--questions", "6"]
    told = json.loads(run(["bench", "search", *sizes, "--out", str(out), "--json"]).stdout)
    assert told["summary"]["passages"] == 150
    assert told["summary"]["index"] == "flat"
    stages = [row["stage"] for row in told["rows"]]
    assert stages[0] == "all stages"
    assert {"embedding the question", "meaning", "words", "reading the candidates"} <= set(stages)
    assert len(told["goals"]) == 3
    wanted = ["--points", "300", "--kinds", "flat,ivfpq", "--dim", "16"]
    told = json.loads(run(["bench", "vectors", *wanted, "--out", str(out), "--json"]).stdout)
    assert [(row["kind"], row["vectors"]) for row in told["rows"]] == [("flat", 300), ("ivfpq", 300)]
    assert told["rows"][0]["recall@10"] == 1.0
    assert told["rows"][1]["recall@10"] > 0.9
    assert {file.name for file in out.iterdir()} == {
        f"{name}.{suffix}" for name in ("search", "vectors") for suffix in ("json", "png")
    }
    assert json.loads((out / "vectors.json").read_text()) == told
