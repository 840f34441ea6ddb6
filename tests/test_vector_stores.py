"""Corpora as vector stores, with nothing but the official client: files in, passages out, and everybody's own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from server_kit import TOKEN, Running, chat, make_home, running, until

from hybrid.types.arm import Arm
from hybrid.types.rights import Rights

pytestmark = pytest.mark.asyncio(loop_scope="module")

FERRY = "The ferry to Osterholm leaves at seven in the morning and carries no bicycles."
CLOCK = "The clock tower of Brell runs four minutes slow because a stork nests on the minute hand."
BREAD = "Rye bread is baked on Thursdays in the oven behind the town hall."
WAIT = {"poll_interval_ms": 50}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Open: no key exists."""
    async with running(make_home(tmp_path_factory.mktemp("open"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Keys exist; the gate is given time, as it is asked what it decides."""
    async with running(make_home(tmp_path_factory.mktemp("closed"), gate={"deadline_ms": 10_000})) as server:
        server.keys().create("somebody")
        yield server


async def upload(client: openai.AsyncOpenAI, text: str | bytes, name: str = "note.md") -> str:
    content = text if isinstance(text, bytes) else text.encode()
    return (await client.files.create(file=(name, content), purpose="assistants")).id


async def store_of(client: openai.AsyncOpenAI, name: str, *texts: str, **more: Any) -> tuple[str, list[str]]:
    """A vector store of these texts, and the ids of their files."""
    files = [await upload(client, text, f"note-{i}.md") for i, text in enumerate(texts)]
    store = await client.vector_stores.create(name=name, file_ids=files, **more)

    async def read() -> bool:
        return (await client.vector_stores.retrieve(store.id)).file_counts.completed == len(files)

    await until(read)
    return store.id, files


async def found(client: openai.AsyncOpenAI, store_id: str, query: Any, **more: Any) -> list[Any]:
    return (await client.vector_stores.search(store_id, query=query, **more)).data


# --- what the client expects ----------------------------------------------------------------------------------------


async def test_a_file_is_attached_found_and_taken_away(server: Running) -> None:
    client = server.client()
    store = await client.vector_stores.create(name="town", metadata={"team": "harbour"})
    assert (store.object, store.name, store.status, store.usage_bytes) == ("vector_store", "town", "completed", 0)
    assert await found(client, store.id, "ferry") == []
    file_id = await upload(client, FERRY, "ferry.md")
    file = await client.vector_stores.files.create_and_poll(file_id, vector_store_id=store.id, **WAIT)
    assert (file.id, file.object, file.status, file.last_error) == (file_id, "vector_store.file", "completed", None)
    assert file.usage_bytes == len(FERRY)
    hit, *others = await found(client, store.id, "when does the ferry leave?")
    assert (hit.file_id, hit.filename, hit.content[0].text, others) == (file_id, file_id, FERRY, [])
    assert 0.3 < hit.score <= 1
    content = await client.vector_stores.files.content(file_id, vector_store_id=store.id)
    assert [part.text for part in content.data] == [FERRY]
    told = await client.vector_stores.retrieve(store.id)
    assert told.file_counts.model_dump() == {
        "cancelled": 0, "completed": 1, "failed": 0, "in_progress": 0, "total": 1,
    }  # fmt: skip
    assert (told.usage_bytes, told.metadata) == (len(FERRY), {"team": "harbour"})
    gone = await client.vector_stores.files.delete(file_id, vector_store_id=store.id)
    assert (gone.deleted, gone.object) == (True, "vector_store.file.deleted")
    assert await found(client, store.id, "ferry") == []
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.files.retrieve(file_id, vector_store_id=store.id)
    assert (await client.files.retrieve(file_id)).id == file_id  # the upload stays


async def test_a_deleted_upload_is_in_no_store(server: Running) -> None:
    client = server.client()
    store, (file_id,) = await store_of(client, "short-lived", BREAD)
    await client.files.delete(file_id)
    assert await found(client, store, "rye bread") == []
    assert (await client.vector_stores.files.list(store)).data == []


async def test_a_store_is_a_corpus_and_a_corpus_a_store(server: Running, tmp_path: Path) -> None:
    client = server.client()
    rows = [{"id": "bread", "title": "Bread", "text": BREAD}, {"id": "clock", "title": "", "text": CLOCK}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.gateway.library.ingest("indexed", tmp_path)
    store = next(s for s in (await client.vector_stores.list()).data if s.name == "indexed")
    assert store.file_counts.completed == 2
    hit = (await found(client, store.id, "where is rye bread baked?"))[0]
    assert (hit.filename, hit.file_id, hit.content[0].text) == ("bread", "bread", BREAD)
    assert [f.id async for f in client.vector_stores.files.list(store.id, order="asc")] == ["bread", "clock"]
    answer = await client.chat.completions.create(
        model="rag:indexed", messages=[{"role": "user", "content": "rye bread?"}], extra_headers={"x-hybrid-debug": "1"}
    )
    assert BREAD in json.dumps(answer.model_extra["hybrid"]["passages"])
    renamed = await client.vector_stores.update(store.id, name="bakery", metadata={"a": "b"})
    assert (renamed.id, renamed.name, renamed.file_counts.completed) == (store.id, "bakery", 2)
    assert server.gateway.library.search("bakery", "rye bread", 1)[0].id == "bread"
    assert (await client.vector_stores.delete(store.id)).deleted
    assert "bakery" not in server.gateway.library.names()
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.retrieve(store.id)


async def test_names_are_unique_fitting_and_made_where_none_is_given(server: Running) -> None:
    client = server.client()
    first = await client.vector_stores.create(name="Support FAQ")
    assert first.name == "Support-FAQ"
    with pytest.raises(openai.ConflictError):
        await client.vector_stores.create(name="Support FAQ")
    made = await client.vector_stores.create()
    assert made.name.startswith("store-")
    with pytest.raises(openai.ConflictError):
        await client.vector_stores.update(made.id, name="Support-FAQ")
    with pytest.raises(openai.BadRequestError):
        await client.vector_stores.create(name="rag")
    for store in (first, made):
        await client.vector_stores.delete(store.id)


async def test_filters_choose_before_the_ranking(server: Running) -> None:
    client = server.client()
    store = (await client.vector_stores.create(name="filtered")).id
    texts = {"a": "The ferry timetable of spring.", "b": "The ferry timetable of summer.", "c": "The ferry prices."}
    years: dict[str, Any] = {"a": {"year": 2023, "draft": True}, "b": {"year": 2024, "kind": "plan"}, "c": {}}
    files = {key: await upload(client, text, f"{key}.md") for key, text in texts.items()}
    names = {file_id: key for key, file_id in files.items()}
    batch = await client.vector_stores.file_batches.create(
        store, files=[{"file_id": files[key], "attributes": years[key]} for key in texts]
    )
    batch = await client.vector_stores.file_batches.poll(batch.id, vector_store_id=store, **WAIT)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.total) == ("completed", 3, 3)
    listed = client.vector_stores.file_batches.list_files(batch.id, vector_store_id=store)
    assert {f.id async for f in listed} == set(names)

    async def passed(**filters: Any) -> str:
        hits = await found(client, store, "ferry timetable", max_num_results=1 if filters.pop("one", 0) else 10,
                           filters=filters)  # fmt: skip
        return "".join(sorted(names[hit.file_id] for hit in hits))

    def one(kind: str, key: str, value: Any) -> dict[str, Any]:
        return {"type": kind, "key": key, "value": value}

    assert await passed(**one("eq", "year", 2024)) == "b"
    assert await passed(**one("ne", "year", 2024)) == "ac"
    assert await passed(**one("gte", "year", 2023)) == "ab"
    assert await passed(**one("lt", "year", 2024)) == "a"
    assert await passed(**one("in", "kind", ["plan", "map"])) == "b"
    assert await passed(**one("nin", "kind", ["plan"])) == "ac"
    assert await passed(**one("eq", "draft", True)) == "a"
    assert await passed(**one("eq", "year", "2024")) == ""
    assert await passed(type="or", filters=[one("eq", "draft", True), one("eq", "kind", "plan")]) == "ab"
    assert await passed(type="and", filters=[one("gt", "year", 2000), one("eq", "kind", "plan")]) == "b"
    assert await passed(one=1, **one("nin", "year", [2023, 2024])) == "c"  # though the others rank higher
    with pytest.raises(openai.BadRequestError):
        await passed(type="like", key="year", value=1)
    moved = await client.vector_stores.files.update(files["c"], vector_store_id=store, attributes={"year": 1999})
    assert moved.attributes == {"year": 1999}
    assert await passed(**one("lt", "year", 2000)) == "c"
    hits = await found(client, store, ["ferry prices", "summer"], max_num_results=2, rewrite_query=True)
    assert {names[hit.file_id] for hit in hits} == {"b", "c"}
    assert await found(client, store, "ferry", ranking_options={"score_threshold": 0.999}) == []


async def test_lists_come_in_pages(server: Running) -> None:
    client = server.client()
    stores = [(await client.vector_stores.create(name=f"page-{i}")).id for i in range(5)]
    forward = [s.id async for s in client.vector_stores.list(limit=2, order="asc") if s.name.startswith("page-")]
    assert forward == stores
    newest = await client.vector_stores.list(limit=2)
    assert [s.id for s in newest.data] == [stores[4], stores[3]]
    assert newest.has_more
    second = await client.vector_stores.list(limit=2, after=stores[3])
    assert [s.id for s in second.data] == [stores[2], stores[1]]
    back = await client.vector_stores.list(limit=2, before=stores[1])
    assert [s.id for s in back.data] == [stores[3], stores[2]]
    for bad in ({"after": "vs_none"}, {"limit": 0}):
        with pytest.raises(openai.BadRequestError):
            await client.vector_stores.list(**bad)
    for store in stores:
        await client.vector_stores.delete(store)


async def test_a_file_that_cannot_be_read_fails_in_words_and_the_others_go_on(server: Running) -> None:
    client = server.client()
    store = (await client.vector_stores.create(name="mixed", expires_after={"anchor": "last_active_at", "days": 7})).id
    bad, good = await upload(client, b"MZ\x00\x01", "tool.exe"), await upload(client, CLOCK)
    for file_id in (bad, good):
        await client.vector_stores.files.create(store, file_id=file_id, attributes={"n": 1})
    told = await client.vector_stores.files.poll(bad, vector_store_id=store, **WAIT)
    assert (told.status, told.last_error.code) == ("failed", "unsupported_file")
    assert (await client.vector_stores.files.poll(good, vector_store_id=store, **WAIT)).status == "completed"
    failed = await client.vector_stores.files.list(store, filter="failed")
    assert [f.id for f in failed.data] == [bad]
    counts = (await client.vector_stores.retrieve(store)).file_counts
    assert (counts.failed, counts.completed, counts.total) == (1, 1, 2)
    with pytest.raises(openai.NotFoundError):
        await client.vector_stores.files.create(store, file_id="file-none")
    for wrong in ({"metadata": {"n": 1}}, {"expires_after": {"anchor": "created_at", "days": 1}}):
        with pytest.raises(openai.BadRequestError):
            await client.vector_stores.update(store, **wrong)


async def test_a_cancelled_batch_keeps_what_is_done(server: Running) -> None:
    client = server.client()
    store, (first,) = await store_of(client, "cancelled", FERRY)
    files = [await upload(client, f"{BREAD} Batch {i}.") for i in range(12)]
    batch = await client.vector_stores.file_batches.create(store, file_ids=files)
    batch = await client.vector_stores.file_batches.cancel(batch.id, vector_store_id=store)
    counts = batch.file_counts
    assert batch.status == "cancelled"
    assert (counts.in_progress, counts.completed + counts.cancelled, counts.total) == (0, 12, 12)
    assert counts.cancelled
    hits = await found(client, store, "rye bread", max_num_results=50)
    assert len({hit.file_id for hit in hits} - {first}) <= counts.completed + 1


# --- everybody's own ------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tenants(closed: Running) -> dict[str, Any]:
    """Two keys of two groups, each with a store of its group; one document that is for nobody else."""
    keys = {name: closed.keys().create(name, groups=[name])["key"] for name in ("red", "blue")}
    clients = {name: closed.client(key) for name, key in keys.items()}
    sharing = {name: {"extra_body": {"hybrid": {"groups": [name]}}} for name in keys}
    red, (ferry,) = await store_of(clients["red"], "red-papers", FERRY, **sharing["red"])
    blue, _ = await store_of(clients["blue"], "blue-papers", CLOCK, **sharing["blue"])
    owner = closed.client(TOKEN)
    town, (bread,) = await store_of(owner, "town", BREAD)
    secret = await upload(owner, "The oven of the town hall holds forty loaves of rye.", "secret.md")
    await owner.vector_stores.files.create_and_poll(
        secret, vector_store_id=town, extra_body={"hybrid": {"groups": ["red"]}}, **WAIT
    )
    return {**clients, "keys": keys, "owner": owner, "stores": {"red": red, "blue": blue, "town": town},
            "ferry": ferry, "bread": bread, "secret": secret}  # fmt: skip


async def test_S6_a_tenant_finds_nothing_of_another_anywhere(closed: Running, tenants: dict[str, Any]) -> None:
    blue, red_store = tenants["blue"], tenants["stores"]["red"]
    assert {s.name for s in (await blue.vector_stores.list()).data} == {"blue-papers", "town"}
    seen = {m.id for m in (await blue.models.list()).data}
    assert {"rag:blue-papers", "rag:town"} <= seen
    assert "rag:red-papers" not in seen
    bearer = {"authorization": f"Bearer {tenants['keys']['blue']}"}
    status = (await closed.get("/v1/status", **bearer))[1]
    assert {corpus["name"] for corpus in status["corpora"]} == {"blue-papers", "town"}
    assert "red-papers" not in json.dumps(status)
    for model in ("rag", "auto", "moa", "rag:town"):
        body = chat("When does the ferry to Osterholm leave, and how many loaves of rye?", model=model)
        body |= {"max_tokens": 8, "hybrid": {"explain": True}}
        code, told, _ = await closed.post("/v1/chat/completions", body, **bearer)
        assert code == 200, told
        text = json.dumps(told["hybrid"])
        assert "red-papers" not in text
        assert tenants["secret"] not in text
        assert "Osterholm leaves" not in text
        assert "forty" not in text
    log = json.dumps(await closed.engine_log())
    assert "Osterholm leaves" not in log
    assert "forty loaves" not in log
    for model in ("rag:red-papers", "adapter+rag:none:red-papers"):
        code, told, _ = await closed.post("/v1/chat/completions", chat("ferry", model=model), **bearer)
        other = await closed.post("/v1/chat/completions", chat("ferry", model="rag:no-such-one"), **bearer)
        assert (code, told["error"]["code"]) == (404, "model_not_found")
        assert other[1]["error"]["message"].replace("rag:no-such-one", model) == told["error"]["message"]
    code, told, _ = await closed.post(
        "/v1/chat/completions", chat("ferry", model="rag", hybrid={"corpus": "red-papers"}), **bearer
    )
    assert code == 404, told
    with pytest.raises(openai.NotFoundError):
        await found(blue, red_store, "ferry")


async def test_S6_a_document_is_for_its_groups_alone(tenants: dict[str, Any]) -> None:
    town, secret = tenants["stores"]["town"], tenants["secret"]
    query = "how many loaves of rye does the oven hold?"
    assert [h.file_id for h in await found(tenants["red"], town, query)] == [secret, tenants["bread"]]
    assert [h.file_id for h in await found(tenants["blue"], town, query, max_num_results=1)] == [tenants["bread"]]
    assert [f.id for f in (await tenants["blue"].vector_stores.files.list(town)).data] == [tenants["bread"]]
    for read in (tenants["blue"].vector_stores.files.retrieve, tenants["blue"].vector_stores.files.content):
        with pytest.raises(openai.NotFoundError):
            await read(secret, vector_store_id=town)


async def test_S6_a_change_of_groups_holds_from_the_next_request(tenants: dict[str, Any]) -> None:
    red, blue, store = tenants["red"], tenants["blue"], tenants["stores"]["red"]
    share = tenants["owner"].vector_stores.update
    await share(store, extra_body={"hybrid": {"groups": ["red", "blue"]}})
    assert (await found(blue, store, "ferry"))[0].file_id == tenants["ferry"]
    await share(store, extra_body={"hybrid": {"groups": ["red"]}})
    with pytest.raises(openai.NotFoundError):
        await found(blue, store, "ferry")
    assert await found(red, store, "ferry")


async def test_S7_ids_of_another_tenant_are_unknown(tenants: dict[str, Any]) -> None:
    blue, stores = tenants["blue"], tenants["stores"]
    mine = await upload(blue, BREAD)
    red_file = tenants["ferry"]
    calls = [
        lambda: blue.vector_stores.retrieve(stores["red"]),
        lambda: blue.vector_stores.update(stores["red"], name="mine"),
        lambda: blue.vector_stores.delete(stores["red"]),
        lambda: blue.vector_stores.files.list(stores["red"]),
        lambda: blue.vector_stores.files.retrieve(red_file, vector_store_id=stores["red"]),
        lambda: blue.vector_stores.files.create(stores["red"], file_id=mine),
        lambda: blue.vector_stores.files.delete(red_file, vector_store_id=stores["red"]),
        lambda: blue.vector_stores.file_batches.create(stores["red"], file_ids=[mine]),
        lambda: blue.vector_stores.files.create(stores["blue"], file_id=red_file),
        lambda: blue.files.delete(red_file),
        lambda: blue.models.retrieve("rag:red-papers"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            await call()
    assert await found(tenants["red"], stores["red"], "ferry")


async def test_S4_a_key_changes_only_what_it_made_and_shares_only_with_its_groups(tenants: dict[str, Any]) -> None:
    blue, town = tenants["blue"], tenants["stores"]["town"]
    mine = await upload(blue, FERRY)
    for call in (
        lambda: blue.vector_stores.delete(town),
        lambda: blue.vector_stores.files.create(town, file_id=mine),
        lambda: blue.vector_stores.files.delete(tenants["bread"], vector_store_id=town),
        lambda: blue.vector_stores.create(name="leak", extra_body={"hybrid": {"groups": ["red"]}}),
    ):
        with pytest.raises(openai.PermissionDeniedError):
            await call()
    alone = await blue.vector_stores.create(name="blue-alone")
    with pytest.raises(openai.NotFoundError):
        await tenants["red"].vector_stores.retrieve(alone.id)


async def test_S5_a_key_asks_the_arms_it_may_and_no_other(closed: Running, tenants: dict[str, Any]) -> None:
    key = closed.keys().create("narrow", arms=["rag:town", "moa"])["key"]
    client, bearer = closed.client(key), {"authorization": f"Bearer {key}"}
    models = {m.id for m in (await client.models.list()).data}
    assert {"auto", "base", "prompt", "rag:town", "moa"} <= models
    assert not models & {"rag:red-papers", "rag:blue-papers", "self_moa"}
    assert {s.name for s in (await client.vector_stores.list()).data} == {"town"}
    for model in ("rag:blue-papers", "self_moa", "few_shot:any", "mix:a=0.5,b=0.5"):
        code, told, _ = await closed.post("/v1/chat/completions", chat("clock", model=model), **bearer)
        assert (code, told["error"]["code"]) == (404, "model_not_found"), model
    code, told, _ = await closed.post(
        "/v1/route", chat("Why is the clock tower of Brell slow?", model="auto"), **bearer
    )
    assert code == 200
    assert not {arm for arm in told["decision"]["scores"] if arm.startswith("rag:") and arm != "rag:town"}
    asked = chat("clock", model="moa", hybrid={"arms": ["prompt", "rag:blue-papers"]})
    code, told, _ = await closed.post("/v1/chat/completions", asked, **bearer)
    assert (code, told["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("arms", "asked", "may"),
    [
        (["adapter:a"], "adapter:a@3", True),
        (["adapter:a"], "adapter:b", False),
        (["adapter:a"], "mix:a=0.5,b=0.5", False),
        (["adapter"], "mix:a=0.5,b=0.5", True),
        (["adapter:a", "rag"], "adapter+rag:a:town", True),
        (["adapter:a"], "adapter+rag:a:town", False),
        (["rag:town"], "adapter+rag:a:town", False),
        (["rag:town"], "rag", True),
        (["head:a"], "head:b", False),
        ([], "prompt", True),
        (["rag"], "rag:hidden", False),
    ],
)
async def test_S5_what_the_words_of_a_key_allow(arms: list[str], asked: str, may: bool) -> None:
    rights = Rights(caller="key_1", admin=False, arms=frozenset(arms), hidden=frozenset(["hidden"]))
    assert rights.may(Arm.parse(asked)) is may
