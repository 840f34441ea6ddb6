"""Corpora whose vectors lie in PostgreSQL with pgvector: a real server, which crashes, freezes and forgets."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from library_kit import FACTS, Open, coded, libraries, write
from pg_kit import PASSWORD, Postgres
from server_kit import chat, make_home, running, until
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import NotReady, Refused, SetupError
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.pg import PgEngine
from hybrid.knowledge.search import Library
from hybrid.knowledge.store import About
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings, Settings
from hybrid.types.rights import Rights

PARTS = coded(30)
#: what comes later
PIER = "Fishing boats set out from the pier at sunrise."
#: asked in words that no fact has
PARAPHRASE = "when does the boat leave in the morning?"
QUESTIONS = (PARAPHRASE, "kittens sleeping", "what does ZX-4117Q cost?", "bread", "a slow clock")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again soon."""
    monkeypatch.setattr("hybrid.knowledge.pg_link.RETRY_S", 0.2)
    monkeypatch.setattr("hybrid.knowledge.corpus.AGAIN_S", 0.2)


@pytest.fixture
def open_library(home: Path, embedder: Embedder, postgres: Postgres) -> Iterator[Open]:
    with libraries(home, embedder) as open_:
        yield lambda where=home, engine=postgres.url, **settings: open_(where, vector_engine=engine, **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "documents", PARTS | FACTS)


def same(one: Library, other: Library, questions: Iterable[object] = QUESTIONS, k: int = 5) -> None:
    here, there = (
        [hit for question in questions for hit in library.search("town", question, k)] for library in (one, other)
    )
    assert [hit.id for hit in here] == [hit.id for hit in there]
    assert [hit.score for hit in here] == pytest.approx([hit.score for hit in there], abs=1e-5)


def ids(library: Library, query: object, k: int = 5, name: str = "town", **more: object) -> list[str]:
    return [p.id for p in library.search(name, query, k, **more)]


def settled(library: Library) -> None:
    """Waits until a server that serves this home would have taken up everything."""
    deadline = time.monotonic() + 30
    while True:
        library.refresh()
        if not library.trouble:
            return
        assert time.monotonic() < deadline, library.trouble
        time.sleep(0.05)


# --- the same answers ------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_faiss(open_library: Open, folder: Path, tmp_path: Path, postgres: Postgres) -> None:
    before, library, faiss = postgres.tables(), open_library(), open_library(tmp_path / "other", "")
    for one in (library, faiss):
        one.ingest("town", folder)
    assert (library.corpus("town").engine, faiss.corpus("town").engine) == ("pgvector", "faiss")
    for way in ("hybrid", "dense", "lexical"):
        same(open_library(search=way), open_library(tmp_path / "other", "", search=way))
    same(library, faiss, [library.embedder.embed_query(PARAPHRASE)], 40)
    assert not list((tmp_path / "home/index/town").rglob("*.faiss"))
    rows = [postgres.run(f"SELECT count(*) FROM {name}")[0][0] for name in postgres.tables() - before]
    assert rows == [library.corpus("town").passages]


def test_a_changed_setting_is_followed_with_what_the_store_holds(
    open_library: Open, folder: Path, postgres: Postgres
) -> None:
    faiss = open_library(engine="")
    faiss.ingest("town", folder)
    before = {question: ids(faiss, question) for question in QUESTIONS}
    for engine in (postgres.url, ""):
        library = open_library(engine=engine)
        assert {question: ids(library, question) for question in QUESTIONS} == before


def test_what_changed_and_went_is_as_in_a_corpus_made_at_once(
    open_library: Open, folder: Path, tmp_path: Path, postgres: Postgres
) -> None:
    library = open_library()
    library.ingest("town", folder)
    reader = open_library()  # as another process
    assert ids(reader, PARAPHRASE, 1) == ["ferry"]
    tables = postgres.tables()
    texts = {**PARTS, **FACTS, "ferry": "The harbour was filled with sand.", "new": "A boat leaves before breakfast."}
    del texts["cat"]
    library.ingest("town", write(folder, texts))
    assert postgres.tables() == tables  # the next generation went into the same table
    once = open_library(tmp_path / "once")
    once.ingest("town", folder)
    for one in (library, reader, open_library()):
        same(one, once, (*QUESTIONS, "sand in the harbour"))
    library.delete_document("town", "new")  # and what is not published yet
    library.add_document("town", "pier", text=PIER)
    for one in (library, reader):
        assert "new" not in ids(one, PARAPHRASE, 40)
        assert "pier" in ids(one, PARAPHRASE, 2)


def test_what_a_caller_may_not_read_takes_no_place(open_library: Open) -> None:
    library = open_library(search="dense")
    for n in range(12):
        library.add_document("town", f"hidden{n}", text=f"The zebra eats {n} apples.", about=About({}, "ann", ()))
    library.add_document("town", "open", text="Rye bread is sold in Mill Lane.", about=About({"kind": "shop"}))
    library._corpus("town").publish()
    guest = Rights(caller="bob", admin=False)
    assert ids(library, "what do zebras eat", 1, rights=guest) == ["open"]
    assert ids(library, "what do zebras eat", 1, matches=lambda about: about.get("kind") == "shop") == ["open"]
    assert ids(library, "what do zebras eat", 9, rights=guest) == ["open"]
    assert "open" not in ids(library, "what do zebras eat", 1)
    library.describe_document("town", "open", About({}, "ann", ()))  # at once, whatever the engine holds
    assert ids(library, "what do zebras eat", 1, rights=guest) == []


def test_two_corpora_and_two_homes_are_apart(open_library: Open, tmp_path: Path, postgres: Postgres) -> None:
    before = postgres.tables()
    library, other = open_library(), open_library(tmp_path / "other")
    library.ingest("town", write(tmp_path / "a", FACTS))
    library.ingest("parts", write(tmp_path / "b", PARTS))
    other.ingest("town", write(tmp_path / "c", {"pier": PIER}))
    assert set(ids(library, PARAPHRASE, 50)) == set(FACTS)
    assert set(ids(library, PARAPHRASE, 50, "parts")) == set(PARTS)
    assert ids(other, PARAPHRASE, 50) == ["pier"]
    assert len(postgres.tables() - before) == 3
    library.delete("town")
    other.rename("town", "city")
    assert len(postgres.tables() - before) == 2
    assert set(ids(library, PARAPHRASE, 50, "parts")) == set(PARTS)
    assert ids(open_library(tmp_path / "other"), PARAPHRASE, 50, "city") == ["pier"]


def test_another_embedder_is_refused_and_a_rebuild_brings_a_new_table(
    open_library: Open, folder: Path, home: Path, postgres: Postgres
) -> None:
    library = open_library()
    library.ingest("town", folder)
    tables = postgres.tables()
    with contextlib.closing(sqlite3.connect(home / "index/town/store.db")) as truth, truth:
        truth.execute("UPDATE meta SET digest = 'of-another', embedder = 'another', revision = revision + 1")
    for one in (library, open_library()):
        with pytest.raises(Refused, match=r"another.*--name town --rebuild"):
            one.search("town", PARAPHRASE, 1)
    library.ingest("town", folder, rebuild=True)
    assert ids(library, PARAPHRASE, 1) == ["ferry"]
    assert len(postgres.tables() - tables) == 1
    assert len(postgres.tables()) == len(tables)


# --- the engine itself -----------------------------------------------------------------------------------------------


def points(count: int, dim: int = 16) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def best(vectors: np.ndarray, query: np.ndarray, k: int, only: np.ndarray) -> list[int]:
    return (only[np.argsort(-(vectors[only - 1] @ query), kind="stable")][:k]).tolist()


def publish(engine: PgEngine, folder: Path, number: int, rows: np.ndarray, vectors: np.ndarray, before=None):
    place = engine.publish(
        folder, before, number, vectors.shape[1], rows, lambda part: (np.array(part), vectors[np.array(part) - 1])
    )
    return engine.open(place, rows)


@pytest.mark.parametrize("exact_up_to", [10**9, 1000])
def test_many_rows_few_rights_and_a_graph(postgres: Postgres, tmp_path: Path, exact_up_to: int) -> None:
    vectors, engine = points(12_000), PgEngine(postgres.url, exact_up_to)
    everything = np.arange(1, len(vectors) + 1)
    index = publish(engine, tmp_path, 1, everything, vectors)
    most, few = everything[everything % 12 != 0], everything[::400]
    hits = 0
    for query in points(12_010)[-10:]:
        for only in (most, few):
            near = [row for row, _ in index.nearest(query, 10, only)]
            assert len(near) == 10
            assert set(near) <= set(only.tolist())
            hits += len(set(near) & set(best(vectors, query, 10, only)))
        near = index.nearest(query, 10)
        hits += len({row for row, _ in near} & set(best(vectors, query, 10, everything)))
        assert [score for _, score in near] == pytest.approx(
            [float(vectors[row - 1] @ query) for row, _ in near], abs=1e-5
        )
    assert hits == 300 if exact_up_to > len(vectors) else hits > 270
    assert index.nearest(points(1)[0], 5, np.empty(0, np.int64)) == []
    engine.tidy(tmp_path)
    engine.close()


def test_a_publication_that_never_became_current_is_taken_back(postgres: Postgres, tmp_path: Path) -> None:
    vectors, engine = points(40), PgEngine(postgres.url, 1000)
    query = vectors[30]
    first = publish(engine, tmp_path, 1, np.arange(1, 21), vectors)
    killed = publish(engine, tmp_path, 2, np.arange(11, 36), vectors, before=first)  # its publisher died here
    assert [row for row, _ in first.nearest(query, 30)] == best(vectors, query, 30, np.arange(1, 21))
    again = publish(engine, tmp_path, 2, np.arange(5, 32), vectors, before=first)
    assert [row for row, _ in again.nearest(query, 30)] == best(vectors, query, 30, np.arange(5, 32))
    assert [row for row, _ in first.nearest(query, 30)] == best(vectors, query, 30, np.arange(1, 21))
    with pytest.raises(Refused):
        killed.nearest(query, 5)
    third = publish(engine, tmp_path, 3, np.arange(1, 41), vectors, before=again)  # what went came again
    assert [row for row, _ in third.nearest(query, 50)] == best(vectors, query, 50, np.arange(1, 41))
    assert len(postgres.run(f"SELECT * FROM {third.place.table} WHERE died <= 1")) == 0
    engine.tidy(tmp_path)
    assert third.place.table not in postgres.tables()
    engine.close()


# --- when it fails ---------------------------------------------------------------------------------------------------


def test_a_crash_costs_the_meaning_alone_and_all_of_it_comes_back(
    open_library: Open, folder: Path, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    library, problems, ended = open_library(), [], threading.Event()
    library.ingest("town", folder)

    def ask() -> None:
        while not ended.wait(0.02):
            try:
                assert ids(library, "what does ZX-4117Q cost?", 1) == ["ZX-4117Q"]
            except Exception as error:  # shown by the assertion below
                problems.append(error)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        postgres.crash()
        try:
            assert ids(library, "what does ZX-4117Q cost?", 1) == ["ZX-4117Q"]
            assert ids(open_library(), "what does ZX-4117Q cost?", 1) == ["ZX-4117Q"]  # a process that starts meanwhile
            assert "by their words" in library.trouble
            assert ids(library, library.embedder.embed_query(PARAPHRASE)) == []
            with pytest.raises(NotReady):
                library.candidates("town", PARAPHRASE)
            library.ingest("town", write(folder, {**PARTS, **FACTS, "pier": PIER}))  # committed, and found by its words
            assert ids(library, "which fishing boats set out from the pier?", 1) == ["pier"]
        finally:
            postgres.start()
        settled(library)
    finally:
        ended.set()
        for asker in askers:
            asker.join()
    assert problems == []
    for one in (library, open_library()):
        assert set(ids(one, library.embedder.embed_query(PARAPHRASE), 2)) == {"ferry", "pier"}
    assert "answers again" in caplog.text
    assert not any(part in caplog.text for part in (PASSWORD, "not%2Ffor"))


def test_a_server_that_hangs_is_not_waited_for(
    open_library: Open, folder: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = open_library()
    library.ingest("town", folder)
    monkeypatch.setattr("hybrid.knowledge.pg_link.ASK_S", 0.3)
    postgres.freeze()
    try:
        assert ids(library, "what does ZX-4117Q cost?", 1) == ["ZX-4117Q"]
        assert library.trouble
    finally:
        postgres.thaw()
    monkeypatch.undo()
    settled(library)
    assert ids(library, library.embedder.embed_query(PARAPHRASE), 1) == ["ferry"]


@pytest.mark.parametrize("register", [True, False])
def test_what_the_engine_lost_is_published_again_from_the_store(
    open_library: Open, folder: Path, postgres: Postgres, register: bool
) -> None:
    before, library = postgres.tables(), open_library()
    library.ingest("town", folder)
    vector = library.embedder.embed_query(PARAPHRASE)
    for table in ["hybrid_generations"] if register else postgres.tables() - before:
        postgres.run(f"DROP TABLE {table}")
    assert ids(library, "what does ZX-4117Q cost?", 1) == ["ZX-4117Q"]
    assert ids(library, vector) == []
    assert library.trouble
    settled(library)
    for one in (library, open_library()):
        assert ids(one, vector, 1) == ["ferry"]
    assert len(postgres.tables() - before) == 1


async def test_readiness_and_the_decision_say_that_the_engine_is_away(tmp_path: Path, postgres: Postgres) -> None:
    settings = make_home(tmp_path / "home", retrieval={"vector_engine": postgres.url})
    async with running(settings) as server:
        for name, text in FACTS.items():
            server.gateway.library.add_document("town", name, text=text)
        server.gateway.library._corpus("town").publish()

        async def detail() -> str:
            status, body, _ = await server.get("/readyz")
            assert status == 200
            return str(body["detail"])

        async def answer() -> str:
            status, body, _ = await server.post("/v1/chat/completions", asked)
            assert (status, body["hybrid"]["passages"][0]["filename"]) == (200, "tower")
            return str(body["hybrid"]["reason"])

        asked = chat("why is the clock slow?", model="rag:town", hybrid={"explain": True})
        assert (await detail(), "vector engine" in await answer()) == ("", False)
        assert (await server.get("/v1/status"))[1]["corpora"][0]["engine"] == "pgvector"
        postgres.crash()
        try:
            await until(lambda: bool(server.gateway.library.trouble))
            assert "by their words" in await detail()
            assert "by their words" in await answer()
        finally:
            postgres.start()
        await until(lambda: not server.gateway.library.trouble)
        assert (await detail(), "vector engine" in await answer()) == ("", False)


# --- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [f"postgresql://me:{PASSWORD}@host:x/db", f"mysql://me:{PASSWORD}@host/db"])
def test_a_wrong_address_is_refused_without_its_password(tmp_path: Path, embedder: Embedder, url: str) -> None:
    with pytest.raises(SetupError, match="postgresql://") as refused:
        Library(Home(tmp_path), embedder, RetrievalSettings(vector_engine=url))
    assert "not/for" not in str(refused.value)
    assert "the:log" not in str(refused.value)


def test_the_password_is_told_to_child_processes_alone(postgres: Postgres) -> None:
    settings = Settings.load(retrieval={"vector_engine": postgres.url})
    assert "not%2Ffor" not in f"{settings!r} {settings.model_dump_json()}"
    assert json.loads(settings.environment()["HYBRID_RETRIEVAL"])["vector_engine"] == postgres.url


def test_the_list_of_corpora_shows_the_engine(
    open_library: Open, folder: Path, home: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_library().ingest("town", folder)
    monkeypatch.setenv("HYBRID_HOME", str(home))
    monkeypatch.setenv("HYBRID_RETRIEVAL__VECTOR_ENGINE", postgres.url)
    done = CliRunner().invoke(app, ["corpora", "list", "--json"])
    (corpus,) = json.loads(done.stdout)["corpora"]
    assert corpus["engine"] == f"pgvector at 127.0.0.1:{postgres.port}/postgres"
    assert "not%2Ffor" not in done.output
