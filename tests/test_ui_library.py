"""The tab Library and its routes: documents in and out, the score of every stage, the map, vectors made again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from conftest import Served, start_server, stop_server
from gradio_client import Client as Page
from gradio_client import handle_file
from server_kit import TOKEN, Running, chat, make_home, running, until
from test_ui_adapters import uploads

from hybrid.errors import HybridError
from hybrid.knowledge.plane import Plane
from hybrid.ui.client import Client
from hybrid.ui.library_map import COLOURS, OTHERS, picture
from hybrid.ui.library_views import (
    FOLDED,
    arrived,
    corpora_table,
    corpus_head,
    document_view,
    documents_table,
    hits_list,
    picked_place,
    place,
    size,
)

one_loop = pytest.mark.asyncio(loop_scope="module")

EVIL = "<img src=x onerror=alert(1)>"
FERRY = "The ferry to Osterholm leaves at seven in the morning and carries no bicycles."
CLOCK = "The clock tower of Brell runs four minutes slow because a stork nests on the minute hand."
BREAD = "Rye bread is baked on Thursdays in the oven behind the town hall."
SECRET = "The oven of the town hall holds forty loaves of rye bread at once."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """With keys, and with passages spread out."""
    async with running(make_home(tmp_path_factory.mktemp("library"), retrieval={"mmr": 0.3})) as server:
        server.keys().create("somebody")
        yield server


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = start_server(tmp_path_factory.mktemp("face"), "--engine", "scripted", "--no-quickstart")
    yield served
    assert stop_server(served) == 0


async def corpus_of(server: Running, name: str, key: str, *texts: str, **more: Any) -> str:
    """The id of a corpus of these texts, read."""
    client = server.client(key)
    files = [(await client.files.create(file=(f"{name}-{i}.md", t.encode()), purpose="assistants")).id
             for i, t in enumerate(texts)]  # fmt: skip
    store = await client.vector_stores.create(name=name, file_ids=files, **more)

    async def read() -> bool:
        counts = (await client.vector_stores.retrieve(store.id)).file_counts
        return bool(counts.completed == len(files))

    await until(read)
    return store.id


async def told(server: Running, store: str) -> dict[str, Any]:
    """What the API says of a corpus besides what OpenAI's does."""
    found: dict[str, Any] = (await Client(server.url).store(TOKEN, store))["hybrid"]
    return found


async def made_again(server: Running, store: str) -> None:
    """Waits until the vectors of a corpus were made again."""

    async def done() -> bool:
        rebuild = (await told(server, store))["rebuild"]
        assert rebuild is None or rebuild["status"] != "failed", rebuild
        return rebuild is None

    await until(done)


# --- the routes ------------------------------------------------------------------------------------------------------


@one_loop
async def test_a_search_shows_what_every_stage_made_of_a_passage(server: Running) -> None:
    store = await corpus_of(server, "stages", TOKEN, FERRY, CLOCK, BREAD)
    hits = await Client(server.url).search(TOKEN, store, "when does the ferry to Osterholm leave?", 3)
    assert hits[0]["content"][0]["text"] == FERRY
    scores = [hit["hybrid"]["scores"] for hit in hits]
    assert all(set(one) == {"lexical", "dense", "fused", "rerank", "mmr"} for one in scores)
    assert scores[0]["lexical"] == max(one["lexical"] for one in scores) > 0
    assert scores[0]["fused"] == 1.0  # the best in both
    assert scores[0]["dense"] == pytest.approx(hits[0]["score"], abs=1e-3)
    assert scores[0]["rerank"] is None  # nothing was learned
    assert [one["mmr"] for one in scores] == sorted((one["mmr"] for one in scores), reverse=True)


@one_loop
async def test_S6_a_map_and_its_axes_are_of_what_the_caller_may_read(server: Running) -> None:
    key = server.keys().create("blue", groups=["blue"])["key"]
    owner, asked = server.client(TOKEN), "how many loaves does the oven hold?"
    store = await corpus_of(server, "town", TOKEN, BREAD, FERRY, CLOCK)
    client = Client(server.url)
    alone = await client.chart(key, store, asked, 100)
    secret = (await owner.files.create(file=("secret.md", SECRET.encode()), purpose="assistants")).id
    await owner.vector_stores.files.create_and_poll(
        secret, vector_store_id=store, extra_body={"hybrid": {"groups": ["red"]}}, poll_interval_ms=50
    )
    assert await client.chart(key, store, asked, 100) == alone
    whole = await client.chart(TOKEN, store, asked, 100)
    assert {spot["file_id"] for spot in whole["data"]} - {spot["file_id"] for spot in alone["data"]} == {secret}
    assert (whole["groups"], alone["groups"]) == ({secret: ["red"]}, {})
    assert 0 < sum(whole["shares"]) <= 1.0001
    spots = {spot["text"]: np.array([spot["x"], spot["y"]]) for spot in whole["data"]}
    asked_at = np.array([whole["query"]["x"], whole["query"]["y"]])
    assert min(spots, key=lambda text: float(np.linalg.norm(spots[text] - asked_at))) in (SECRET, BREAD)
    few = await client.chart(key, store, asked, 1)
    assert [spot["text"] for spot in few["data"]] == [BREAD]  # the nearest of a sample is never left out
    assert (await client.chart(key, store, "", 100))["query"] is None


@one_loop
async def test_S7_another_ones_corpus_has_no_map_and_is_not_made_again(server: Running) -> None:
    key, client = server.keys().create("green", groups=["green"])["key"], Client(server.url)
    hidden = await corpus_of(server, "hidden", TOKEN, FERRY, extra_body={"hybrid": {"groups": ["red"]}})
    for refused in (client.chart(key, hidden, "", 10), client.rebuild(key, hidden), client.document(key, hidden, "x")):
        with pytest.raises(HybridError, match="There is no vector store"):
            await refused
    shared = await corpus_of(server, "shared", TOKEN, FERRY)
    for end in (False, True):
        with pytest.raises(HybridError, match="Another key"):
            await client.rebuild(key, shared, end=end)
    bearer = {"authorization": f"Bearer {TOKEN}"}
    for body in ({"limit": 0}, {"limit": 5001}, {"limit": True}, {"query": 7}):
        assert (await server.post(f"/v1/vector_stores/{shared}/map", body, **bearer))[0] == 400
    empty = await client.create_store(TOKEN, "empty")
    assert (await client.chart(TOKEN, empty["id"], "anything", 10))["data"] == []
    with pytest.raises(HybridError, match="holds nothing"):
        await client.rebuild(TOKEN, empty["id"])


@one_loop
async def test_vectors_of_another_embedder_are_told_and_made_again(server: Running) -> None:
    store, client = await corpus_of(server, "old", TOKEN, FERRY, BREAD), Client(server.url)
    before = await client.search(TOKEN, store, "rye bread", 2)
    assert ((await told(server, store))["passages"], (await told(server, store))["stale"]) == (2, False)
    database = server.settings.rooms.index / "old" / "store.db"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("update meta set digest = 'another', revision = revision + 1")
        connection.execute("update passages set vector = zeroblob(length(vector))")
    assert (await told(server, store))["stale"]
    with pytest.raises(HybridError, match="embedd"):
        await client.search(TOKEN, store, "rye bread", 2)
    ordered = await client.rebuild(TOKEN, store)
    assert ordered["hybrid"]["rebuild"]["status"] in ("queued", "running")
    await made_again(server, store)
    assert not (await told(server, store))["stale"]
    after = await client.search(TOKEN, store, "rye bread", 2)
    assert [hit["filename"] for hit in after] == [hit["filename"] for hit in before]
    assert [hit["score"] for hit in after] == pytest.approx([hit["score"] for hit in before], abs=0.01)


@one_loop
async def test_a_rebuild_waits_for_answers_and_can_be_called_off(server: Running) -> None:
    store, client = await corpus_of(server, "waiting", TOKEN, CLOCK), Client(server.url)
    library = server.gateway.library
    generation = library.corpus("waiting").generation
    slow = chat("@tokens 400 @delay 30ms", max_tokens=400, stream=True)
    asking = asyncio.create_task(server.post("/v1/chat/completions", slow, authorization=f"Bearer {TOKEN}"))
    await until(lambda: server.gateway.answering > 0)
    await client.rebuild(TOKEN, store)

    async def begun() -> bool:
        return bool((await told(server, store))["rebuild"]["status"] == "running")

    await until(begun)
    assert (await client.rebuild(TOKEN, store, end=True))["hybrid"]["rebuild"] is None
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: server.gateway.answering == 0)
    assert library.corpus("waiting").generation == generation
    assert (await client.search(TOKEN, store, "clock tower", 1))[0]["content"][0]["text"] == CLOCK
    await client.rebuild(TOKEN, store)
    await made_again(server, store)
    assert library.corpus("waiting").generation > generation


# --- through the page ------------------------------------------------------------------------------------------------


async def test_the_tab_reads_documents_searches_and_draws(face: Served, tmp_path: Path) -> None:
    page = await asyncio.to_thread(Page, face.url, verbose=False)

    async def do(verb: str, /, **values: Any) -> Any:
        return await asyncio.to_thread(page.predict, **values, key="", api_name=verb)

    assert "a name first" in (await do("/new_corpus", name=" "))[1]
    assert (await do("/new_corpus", name="Town papers"))[1] == ""
    assert "is taken" in (await do("/new_corpus", name="Town papers"))[1]
    guide = "# Guide\n\n" + "".join(f"## Part {i}\n\nLoaf {i}. {BREAD} {'Nothing else. ' * 60}\n\n" for i in range(8))
    written = {"guide.md": guide, "ferry.txt": FERRY, "tool.exe": "MZ", "hostile.md": f"{EVIL} {{{{x}}}} ${{y}}"}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    said = (await do("/add_documents", files=[handle_file(tmp_path / name) for name in written]))[1]
    assert "4 received" in said
    assert not list(uploads().glob("*/guide.md"))

    client = Client(face.url)
    store = (await client.stores(""))[0]["id"]

    async def read() -> bool:
        return bool((await client.store("", store))["status"] == "completed")

    await until(read)
    listed = {file["hybrid"]["filename"]: file for file in (await client.documents("", store, "", 50))[0]}
    assert {name for name, file in listed.items() if file["status"] == "completed"} == {*written} - {"tool.exe"}
    assert "not read" in documents_table([listed["tool.exe"]], more=False)
    failed, more = await client.documents("", store, "failed", 50)
    assert ([file["id"] for file in failed], more) == ([listed["tool.exe"]["id"]], False)

    assert "Say what" in (await do("/search_corpus", query=" "))[0]
    hits, _ = await do("/search_corpus", query="when does the ferry leave?")
    assert hits.index("The ferry to Osterholm") < hits.index("Rye bread")
    assert "<dt>words</dt>" in hits
    assert "<img" not in hits
    drawn = await do("/map_corpus", query="when does the ferry leave?", by="document")
    assert 'class="hy-star"' in drawn
    assert 'class="hy-ringed"' in drawn
    assert "<img" not in drawn

    found = await client.search("", store, "Part 5 rye bread", 1)
    file, parts = await client.document("", store, found[0]["file_id"])
    assert [part["hybrid"]["id"] for part in parts] == [f"{file['id']}#{i}" for i in range(len(parts))]
    shown = document_view(file, parts, found[0]["filename"])
    assert shown.count("<mark>") == 1
    assert "Part 5" in shown.partition('class="hy-here"')[2].partition("</h5>")[0]
    assert "before</summary>" in shown
    await client.delete_document("", store, listed["ferry.txt"]["id"])
    assert "Osterholm" not in (await do("/search_corpus", query="when does the ferry leave?"))[0]
    await client.delete_store("", store)
    assert "There is no vector store" in (await do("/search_corpus", query="ferry"))[0]
    assert "There is no vector store" in await do("/map_corpus", query="", by="group")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.md", "/etc/passwd", "home"])
@pytest.mark.parametrize("verb", ["add_documents", "upload"])
async def test_S17_no_address_and_no_file_of_the_server_is_taken_for_an_upload(
    face: Served, address: str, verb: str
) -> None:
    (face.home / "secret.jsonl").write_text('{"messages": []}\n')
    path = str(face.home / "secret.jsonl") if address == "home" else address
    file = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}
    data = [[file], ""] if verb == "add_documents" else [file, "", ""]
    async with aiohttp.ClientSession(face.url) as http:
        async with http.post(f"/gradio_api/call/{verb}", json={"data": data}) as answer:
            event = (await answer.json())["event_id"]
        async with http.get(f"/gradio_api/call/{verb}/{event}") as answer:
            assert "event: error" in await answer.text()
        async with http.get("/v1/files") as answer:
            assert not {file["filename"] for file in (await answer.json())["data"]} & {"passwd", "secret.jsonl"}


# --- what is painted -------------------------------------------------------------------------------------------------


def a_store(**more: Any) -> dict[str, Any]:
    counts = {"completed": 2, "in_progress": 0, "failed": 0, "cancelled": 0, "total": 2}
    told = {"groups": [], "passages": 9, "stage": "meaning", "stale": False, "rebuild": None, **more.pop("hybrid", {})}
    fields = {"id": "vs_1", "name": "town", "status": "completed", "usage_bytes": 12_345}
    return {**fields, "file_counts": {**counts, **more.pop("counts", {})}, "hybrid": told, **more}


def a_file(**more: Any) -> dict[str, Any]:
    told = {"filename": "guide.md", "groups": [], "progress": None, **more.pop("hybrid", {})}
    fields = {"id": "file-1", "status": "completed", "usage_bytes": 10, "attributes": {}, "last_error": None}
    return {**fields, "hybrid": told, **more}


def some_parts(count: int) -> list[dict[str, Any]]:
    headings = [f"guide.md › Part {i // 4}" for i in range(count)]
    return [{"text": f"words {i}", "hybrid": {"id": f"file-1#{i}", "title": t}} for i, t in enumerate(headings)]


def a_hit(n: int, **scores: Any) -> dict[str, Any]:
    told = {
        "title": f"guide.md › {n}",
        "scores": {"dense": 0.5, "lexical": 0.0, "fused": 0.5, **scores},
        "alike": n - 1,
    }
    return {"file_id": "d", "filename": f"d#{n}", "content": [{"type": "text", "text": "words"}], "hybrid": told}


def a_map(count: int, documents: int, **more: Any) -> dict[str, Any]:
    spots = [
        {"id": f"d{i % documents}#{i}", "file_id": f"d{i % documents}", "title": f"paper {i % documents} › x",
         "text": f"text {i}", "x": i / count, "y": (i * i % count) / count}
        for i in range(count)
    ]  # fmt: skip
    return {"data": spots, "query": None, "shares": [0.2, 0.1], "groups": {}, **more}


def test_S17_the_library_shows_text_alone() -> None:
    rebuild = {"status": "failed", "error": EVIL, "done": 0, "total": 0}
    store = a_store(name=EVIL, hybrid={"groups": [EVIL], "rebuild": rebuild})
    running = {"filename": EVIL, "progress": {"phase": EVIL, "done": 1, "total": 2}}
    files = [
        a_file(id=EVIL, hybrid={"filename": EVIL, "groups": [EVIL]}, attributes={EVIL: EVIL}),
        a_file(id=EVIL, status="failed", last_error={"message": EVIL}, hybrid={"filename": EVIL}),
        a_file(id=EVIL, status="in_progress", hybrid=running),
        a_file(id=EVIL, status=EVIL, hybrid={"filename": EVIL}),
    ]
    part = {"text": EVIL, "hybrid": {"id": EVIL, "title": EVIL}}
    hit = {**a_hit(1), "file_id": EVIL, "filename": EVIL, "content": [{"type": "text", "text": EVIL}]}
    hit["hybrid"]["title"] = EVIL
    spots = [{**spot, **dict.fromkeys(("id", "file_id", "title", "text"), EVIL)} for spot in a_map(9, 1)["data"]]
    drawn = a_map(9, 1, data=spots, groups={EVIL: [EVIL]}, query={"x": 0.5, "y": 0.5})
    painted = corpora_table([store], EVIL) + corpus_head(store) + documents_table(files, more=True)
    painted += "".join(document_view(file, [part, part], EVIL) + document_view(file, []) for file in files)
    painted += hits_list([hit]) + arrived(1, [(EVIL, EVIL)])
    painted += picture(drawn, "document", [place(EVIL, EVIL)]) + picture(drawn, "group")
    assert "<img" not in painted


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "ready"),
        ({"hybrid": {"passages": 0}}, "empty"),
        ({"counts": {"in_progress": 3, "failed": 2}}, "reading 3"),
        ({"counts": {"failed": 2}}, "2 failed"),
        ({"hybrid": {"stale": True}}, "re-index it"),
        ({"hybrid": {"stage": "words"}}, "by its words"),
        ({"hybrid": {"rebuild": {"status": "queued", "done": 0, "total": 9, "error": None}}}, "waits"),
        ({"hybrid": {"rebuild": {"status": "running", "done": 4, "total": 10, "error": None}}}, "40 %"),
        ({"hybrid": {"rebuild": {"status": "failed", "done": 0, "total": 0, "error": "No space."}}}, "No space."),
        ({"status": "expired"}, "expired"),
    ],
)
def test_a_corpus_says_in_a_word_how_it_is(more: dict[str, Any], words: str) -> None:
    shown = corpora_table([a_store(**more)], "vs_1")
    assert words in shown
    assert 'data-picked="vs_1"' in shown
    assert "Give one a name" in corpora_table([], "")


def test_a_document_says_how_far_it_is_and_what_was_wrong() -> None:
    going = a_file(status="in_progress", hybrid={"progress": {"phase": "embedding", "done": 3, "total": 4}})
    waiting = a_file(status="in_progress", hybrid={"progress": {"phase": "waiting", "done": 0, "total": 0}})
    broken = a_file(status="failed", last_error={"code": "invalid_file", "message": "It is empty."})
    shown = documents_table([going, waiting, broken, a_file(id="papers/guide.md")], more=False)
    for words in ("embedding", "75 %", "waiting", "It is empty.", "<small>papers/guide.md</small>"):
        assert words in shown
    assert "There are more" in documents_table([going], more=True)
    assert "Drop documents above" in documents_table([], more=False)
    assert [size(n) for n in (0, 999, 1_500, 52_000, 3_000_000)] == ["0 B", "999 B", "1.5 kB", "52 kB", "3.0 MB"]
    assert "2 received, 3 to be sent" in arrived(2, [], 3)
    assert "too large" in arrived(0, [("a.md", "too large")])


def test_a_passage_is_opened_among_its_neighbours() -> None:
    shown = document_view(a_file(), some_parts(20), "file-1#9")
    before, _, rest = shown.partition("<details")[2].partition("</details>")
    assert "7 passages before" in before
    open_, _, after = rest.partition("<details")
    assert [f"words {i}" in open_ for i in (6, 7, 9, 11, 12)] == [False, True, True, True, False]
    assert "<mark>words 9</mark>" in open_
    assert open_.count("<h5>Part") == 2  # the headings of the first one shown, and of the next part
    assert "8 passages after" in after
    whole = document_view(a_file(), some_parts(5))
    assert "<mark>" not in whole
    assert "<details" not in whole
    long = document_view(a_file(), some_parts(3 * FOLDED), f"file-1#{2 * FOLDED}")
    assert "more are not shown" in long
    assert long.count("<section") == FOLDED + 5 + FOLDED - 3
    assert "not read yet" in document_view(a_file(status="in_progress"), [])


def test_every_stage_says_where_it_alone_would_put_a_passage() -> None:
    hits = [a_hit(1, lexical=3.25, dense=0.4, rerank=None), a_hit(2, lexical=0.0, dense=0.9, rerank=None)]
    first, second = hits_list(hits).split("<li ")[1:]
    assert "<dt>words</dt><dd>3.2 <small>#1</small>" in first
    assert "<dt>meaning</dt><dd>0.40 <small>#2</small>" in first
    assert "<dt>words</dt><dd>0.0</dd>" in second
    assert ("almost the same" in first, "and 1 almost the same" in second) == (False, True)
    assert 'class="hy-off"><dt>closer look</dt><dd>–' in second
    assert picked_place(place("d", "d#1")) == ("d", "d#1")
    for forged in ("", "no json", "[1]", "{}", "[1, 2, 3]", "7"):
        assert picked_place(forged) == ("", "")


def test_the_map_colours_what_stands_out_and_numbers_what_was_found() -> None:
    drawn = a_map(30, 3, query={"x": 0.5, "y": 0.5})
    found = [place(drawn["data"][i]["file_id"], drawn["data"][i]["id"]) for i in (4, 7)]
    shown = picture(drawn, "document", found)
    assert [shown.count(colour) for colour in COLOURS[:4]] == [11, 11, 11, 0]  # ten points and the legend each
    assert shown.count("<circle") == 30
    assert shown.index(">2</text>") < shown.index(">1</text>") < shown.index("hy-star")  # the best lies on top
    groups = picture({**drawn, "groups": {"d1": ["red", "blue"]}}, "group")
    assert "red, blue <small>10</small>" in groups
    assert "everyone <small>20</small>" in groups
    many = picture(a_map(40, 40), "document")
    assert many.count(OTHERS) == 41
    assert "hy-star" not in many
    assert "<circle" in picture(a_map(1, 1), "document")
    assert "Nothing to draw" in picture(a_map(3, 1, data=[]), "document")
    xs = [float(part.partition('"')[0]) for part in shown.split('cx="')[1:]]
    assert min(xs) >= 0
    assert max(xs) <= 560


def test_the_plane_is_where_vectors_differ_most() -> None:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(200, 2)) * [3, 1] @ np.linalg.qr(rng.normal(size=(16, 2)))[0].T
    vectors = (flat + 5 + 0.01 * rng.normal(size=(200, 16))).astype(np.float32)
    plane = Plane.of(vectors)
    assert plane.shares[0] > plane.shares[1]
    assert sum(plane.shares) == pytest.approx(1, abs=1e-3)
    places = plane.places(vectors)
    assert places.mean(axis=0) == pytest.approx([0, 0], abs=1e-4)
    apart = np.linalg.norm(vectors[:50, None] - vectors[None, :50], axis=2)
    assert np.linalg.norm(places[:50, None] - places[None, :50], axis=2) == pytest.approx(apart, abs=0.15)
    assert plane.axes @ plane.axes.T == pytest.approx(np.eye(2), abs=1e-9)
    assert np.array_equal(Plane.of(vectors).axes, plane.axes)
    one = Plane.of(vectors[:1])
    assert one.shares == (0.0, 0.0)
    assert one.places(vectors[:1]) == pytest.approx(np.zeros((1, 2)))
    assert json.dumps(one.places(vectors[:1]).tolist())
