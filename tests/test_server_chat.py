"""Answers over HTTP, through the official client: whole and streamed, explained, cited, and broken off."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import openai
import pytest
import pytest_asyncio
from adapters_kit import make_adapter
from server_kit import Running, chat, make_home, running, until

from hybrid.adapters.preflight import read_base
from hybrid.gate.model import Scores
from hybrid.gate.turns import Turns

pytestmark = pytest.mark.asyncio(loop_scope="module")

HEADERS = {
    "x-request-id",
    "x-hybrid-decision-id",
    "x-hybrid-selected-arm",
    "x-hybrid-selected-adapter",
    "x-hybrid-selected-version",
    "x-hybrid-confidence",
    "x-hybrid-fallback",
    "x-hybrid-route-ms",
    "x-hybrid-overhead-ms",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    home = tmp_path_factory.mktemp("home")
    async with running(make_home(home)) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def corpus(server: Running, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of two documents, ingested beside the running server."""
    folder: Path = tmp_path_factory.mktemp("documents")
    rows = [
        {"id": "whales", "title": "Whales", "text": "The blue whale is the largest animal that ever lived."},
        {"id": "tea", "title": "Tea", "text": "Green tea is brewed at eighty degrees."},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    await asyncio.to_thread(server.gateway.library.ingest, "facts", folder)
    await until(lambda: "facts" in server.gateway.library.names())
    return "facts"


async def events(server: Running, body: dict, **headers: str) -> list[str]:
    """The data of each server-sent event, as raw text."""
    async with server.http.post(
        server.url + "/v1/chat/completions", json={**body, "stream": True}, headers=headers
    ) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.content_type == "text/event-stream"
        text = await answer.text()
    return [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]


async def test_a_whole_answer(server: Running) -> None:
    raw = await server.client().chat.completions.with_raw_response.create(
        model="base", messages=[{"role": "user", "content": "hello there"}], max_tokens=20
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "The base model read: hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)
    assert set(raw.headers) >= HEADERS
    assert raw.headers["x-hybrid-selected-arm"] == "base"
    assert raw.headers["x-hybrid-fallback"] == ""


async def test_a_streamed_answer(server: Running) -> None:
    raw = await server.client().chat.completions.with_raw_response.create(
        model="base", messages=[{"role": "user", "content": "@tokens 5"}], stream=True
    )
    assert set(raw.headers) >= HEADERS
    chunks = [chunk async for chunk in raw.parse()]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "t0 t1 t2 t3 t4"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(c.usage is None for c in chunks)


async def test_R21_the_usage_chunk_comes_to_those_who_ask(server: Running) -> None:
    stream = await server.client().chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "@tokens 5"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 5)
    assert all(c.usage is None for c in chunks[:-1])


async def test_R21_extras_reach_the_engine_and_routing_fields_do_not(server: Running) -> None:
    await server.client().chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "extras", "name": "ann"}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        response_format={"type": "json_object"},
        n=2,
        seed=3,
        logprobs=True,
        stop=["never"],
        extra_body={"top_k": 4, "ignore_eos": False, "future_field": {"a": 1}, "hybrid": {"session": "s"}},
    )
    sent = (await server.engine_log())["requests"][-1]["body"]
    assert sent["top_k"] == 4
    assert sent["future_field"] == {"a": 1}
    assert sent["tools"][0]["function"]["name"] == "f"
    assert (sent["n"], sent["seed"], sent["logprobs"], sent["stop"]) == (2, 3, True, ["never"])
    assert sent["messages"] == [{"role": "user", "content": "extras", "name": "ann"}]
    assert "hybrid" not in sent


async def test_R21_raw_completions_stream_and_not(server: Running) -> None:
    client = server.client()
    whole = await client.completions.create(model="base", prompt="@tokens 3", n=2)
    assert [c.text for c in whole.choices] == ["t0 t1 t2", "t0 t1 t2"]
    stream = await client.completions.create(model="base", prompt="@tokens 3", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "t0 t1 t2"


async def test_the_engines_bytes_are_forwarded_as_they_came(server: Running) -> None:
    data = await events(server, chat("@tokens 2"))
    assert data[-1] == "[DONE]"
    assert ", " in data[0]  # the scripted engine's own spacing: nobody parsed and wrote it again
    assert len(data) == 4


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_an_explained_stream_says_why_in_its_last_chunk(server: Running, options: dict | None) -> None:
    body = chat("@tokens 3", hybrid={"explain": True})
    data = await events(server, body if options is None else {**body, "stream_options": options})
    chunks = [json.loads(d) for d in data[:-1]]
    assert data[-1] == "[DONE]"
    assert ["hybrid" in c for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["hybrid"]["arm"] == "base"
    assert ("usage" in chunks[-1]) == (options is not None)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == "t0 t1 t2"


async def test_the_debug_header_explains_too(server: Running) -> None:
    _, body, headers = await server.post("/v1/chat/completions", chat("hi", model="auto"), x_hybrid_debug="true")
    assert body["hybrid"]["arm"] == headers["x-hybrid-selected-arm"]
    assert body["hybrid"]["id"] == headers["x-hybrid-decision-id"]
    assert {"scores", "reason", "passages", "drafts"} <= set(body["hybrid"])


async def test_passages_are_cited_whole_and_streamed(server: Running, corpus: str) -> None:
    body = chat("How large is the blue whale?", model=f"rag:{corpus}", hybrid={"top_k": 1, "explain": True})
    _, whole, headers = await server.post("/v1/chat/completions", body)
    cited = whole["choices"][0]["message"]["annotations"]
    assert cited[0]["type"] == "file_citation"
    assert cited[0]["file_citation"]["filename"] == "whales"
    assert "largest animal" in cited[0]["file_citation"]["quote"]
    assert whole["hybrid"]["passages"][0]["filename"] == "whales"
    assert headers["x-hybrid-selected-arm"] == f"rag:{corpus}"

    data = await events(server, chat("How large is the blue whale?", model=f"rag:{corpus}", hybrid={"top_k": 1}))
    chunks = [json.loads(d) for d in data[:-1]]
    carrying = [i for i, c in enumerate(chunks) if c["choices"][0]["delta"].get("annotations")]
    assert carrying == [1]
    assert chunks[1]["choices"][0]["delta"]["annotations"] == cited
    assert chunks[1]["id"] == chunks[0]["id"]
    assert chunks[-1]["choices"][0]["finish_reason"]


async def test_R1_a_client_that_drops_a_cited_stream_stops_the_engine(server: Running, corpus: str) -> None:
    before = (await server.engine_log())["aborted"]
    body = {**chat("@tokens 2000 @delay 20ms", model=f"rag:{corpus}"), "stream": True}
    async with server.http.post(server.url + "/v1/chat/completions", json=body) as answer:
        await answer.content.readline()
        answer.close()

    async def engine_saw_it() -> bool:
        log = await server.engine_log()
        return log["aborted"] == before + 1 and log["active"] == 0

    await until(engine_saw_it, timeout_s=5)
    await until(lambda: server.inflight == 0, timeout_s=5)


async def test_R8_the_engines_refusal_passes_through_and_is_not_repeated(server: Running) -> None:
    before = len((await server.engine_log())["requests"])
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await (
                server.client()
                .with_options(max_retries=3)
                .chat.completions.create(
                    model="base", messages=[{"role": "user", "content": "@status 400 no such thing"}], stream=stream
                )
            )
        assert "no such thing" in caught.value.message
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert len((await server.engine_log())["requests"]) == before + 2


@pytest.mark.parametrize("fault", ["@tokens 20 @reset 3", "@tokens 20 @reset 1"])
async def test_after_the_first_byte_an_error_is_an_event_and_the_stream_ends_without_done(
    server: Running, fault: str
) -> None:
    data = await events(server, chat(fault))
    assert "[DONE]" not in data
    assert json.loads(data[-1])["error"]["code"] == "engine_error"
    assert "choices" in json.loads(data[-2])
    with pytest.raises(openai.APIError):
        async for _ in await server.client().chat.completions.create(**chat(fault), stream=True):
            pass


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_byte_an_error_is_plain_json(server: Running, stream: bool) -> None:
    status, body, headers = await server.post("/v1/chat/completions", chat("@tokens 5 @reset", stream=stream))
    assert status == 502
    assert body["error"]["code"] == "engine_error"
    assert headers["content-type"] == "application/json"


async def test_R18_a_gate_that_fails_costs_no_answer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_query: str) -> None:
        time.sleep(0.5)

    def nan(*_: object) -> None:
        raise FloatingPointError("NaN")

    decider = server.gateway.decider
    for fault, reason in ((slow, "deadline"), (nan, "error")):
        monkeypatch.setattr(decider, "_score", fault)
        series = f'hybrid_gate_fallback_total{{reason="{reason}"}}'
        before = await server.metric(series)
        raw = await server.client().chat.completions.with_raw_response.create(
            model="auto", messages=[{"role": "user", "content": "hello"}]
        )
        assert raw.parse().choices[0].message.content
        assert raw.headers["x-hybrid-selected-arm"] == server.settings.gate.default_arm
        assert raw.headers["x-hybrid-fallback"] == reason
        assert await server.metric(series) == before + 1


async def test_R18_a_burst_is_routed_as_one_request_is(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decider = server.gateway.decider
    score = decider._score

    def unhurried(request: object) -> object:
        time.sleep(0.15)
        return score(request)  # type: ignore[arg-type]

    monkeypatch.setattr(decider, "_turns", Turns(1.0))
    monkeypatch.setattr(decider, "_score", unhurried)
    asked = await asyncio.gather(*(server.post("/v1/route", chat(f"hello {n}", model="auto")) for n in range(20)))
    assert {status for status, _, _ in asked} == {200}
    assert "deadline" not in {body["decision"]["fallback"] for _, body, _ in asked}


async def test_R18_a_gate_that_hangs_holds_nobody_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    decider, end = server.gateway.decider, threading.Event()
    monkeypatch.setattr(decider, "_turns", Turns(0.3))
    with monkeypatch.context() as stuck:
        stuck.setattr(decider, "_score", lambda _request: end.wait())
        try:
            asked = await asyncio.gather(*(server.post("/v1/route", chat("hi", model="auto")) for _ in range(8)))
        finally:
            end.set()
    assert [body["decision"]["fallback"] for _, body, _ in asked] == ["deadline"] * 8
    _, body, _ = await server.post("/v1/route", chat("hello again", model="auto"))
    assert body["decision"]["fallback"] != "deadline"


async def test_R18_a_score_that_is_no_number_costs_no_answer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Scores(dict.fromkeys(server.gateway.decider.gate.arms(), math.nan))
    monkeypatch.setattr(server.gateway.decider, "_score", lambda _request: broken)
    status, _, headers = await server.post("/v1/chat/completions", chat("hello", model="auto"))
    assert status == 200
    assert headers["x-hybrid-selected-arm"] == "prompt"
    assert headers["x-hybrid-fallback"] == "error"


async def test_a_decision_can_be_had_alone_looked_up_and_judged(server: Running) -> None:
    before = (await server.engine_log())["started"]
    status, body, headers = await server.post("/v1/route", chat("hello", model="auto"))
    assert status == 200
    assert {"id", "arm", "scores", "confidence", "reason", "fallback"} <= set(body["decision"])
    assert headers["x-hybrid-decision-id"] == body["decision"]["id"]
    assert (await server.engine_log())["started"] == before
    status, record, _ = await server.get(f"/v1/decisions/{body['decision']['id']}")
    assert (status, record) == (200, body["decision"])

    for score, expected in ((1, 200), (0.5, 200), (2, 400), (-0.1, 400), ("good", 400), (True, 400), (None, 400)):
        status, _, _ = await server.post("/v1/feedback", {"decision_id": record["id"], "score": score, "comment": "ok"})
        assert status == expected, score
    for unknown in ("dec_none", "' OR 1=1", "x" * 5000):
        status, answer, _ = await server.post("/v1/feedback", {"decision_id": unknown, "score": 1})
        assert (status, answer["error"]["code"]) == (404, "not_found")


async def test_models_are_listed_and_found(server: Running, corpus: str) -> None:
    client = server.client()
    listed = [m.id async for m in await client.models.list()]
    assert {"auto", "base", "prompt", f"rag:{corpus}"} <= set(listed)
    for name in listed:
        assert (await client.models.retrieve(name)).id == name
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.models.delete("base")
    with pytest.raises(openai.NotFoundError):
        await client.models.delete("no-such-adapter")


async def test_embeddings_as_floats_and_as_the_client_asks_for_them(server: Running) -> None:
    client = server.client()
    both = await client.embeddings.create(model="embedder", input=["a whale", "a pot of tea"])  # base64 by default
    floats = await client.embeddings.create(model="embedder", input="a whale", encoding_format="float")
    vectors = np.array([item.embedding for item in both.data])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)
    assert np.allclose(vectors[0], floats.data[0].embedding, atol=1e-5)
    _, raw, _ = await server.post("/v1/embeddings", {"model": "embedder", "input": "x", "encoding_format": "base64"})
    assert len(base64.b64decode(raw["data"][0]["embedding"])) == 4 * vectors.shape[1]
    for wrong in ([], "", [1, 2], [""], None, {"a": 1}, ["x"] * 3000):
        assert (await server.post("/v1/embeddings", {"model": "embedder", "input": wrong}))[0] == 400
    assert (await server.post("/v1/embeddings", {"model": "other", "input": "x"}))[0] == 404


async def test_an_adapter_that_is_none_is_refused(server: Running, tmp_path: Path) -> None:
    loads = (await server.engine_log())["loads"]
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("../x", "a/b", "ok"):
        status, body, _ = await server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(tmp_path)})
        assert (status, body["error"]["code"]) == (422, "artifact_refused")
    assert (await server.post("/v1/load_lora_adapter", {"lora_name": "absent"}))[0] == 404
    assert (await server.post("/v1/load_lora_adapter", {"lora_name": 5}))[0] == 400
    assert (await server.post("/v1/unload_lora_adapter", {"lora_name": "absent"}))[0] == 404
    assert (await server.engine_log())["loads"] == loads


async def test_an_adapter_loaded_over_http_answers_under_its_name(server: Running, tmp_path: Path) -> None:
    base = read_base(Path(server.settings.model), "")
    folder = make_adapter(tmp_path / "ours", base)
    (folder / "examples.jsonl").write_text(json.dumps({"input": "2 + 2", "reference": "four"}) + "\n")
    status, loaded, _ = await server.post("/v1/load_lora_adapter", {"lora_name": "sums", "lora_path": str(folder)})
    assert (status, loaded["adapter"], loaded["version"]) == (200, "sums", 1), loaded
    for name in ("sums", "sums@1", "base:sums", "adapter:sums"):
        status, body, headers = await server.post("/v1/chat/completions", chat("2 + 2", model=name))
        assert status == 200
        assert body["choices"][0]["message"]["content"].endswith(("four", "2 + 2"))
        assert (headers["x-hybrid-selected-adapter"], headers["x-hybrid-selected-version"]) == ("sums", "1")
    client = server.client()
    model = await client.models.retrieve("sums")
    assert "/" not in (model.model_extra or {})["root"]
    assert await server.metric('hybrid_adapter_state{adapter="sums@1",state="live"}') == 1
    assert (await client.models.delete("sums")).deleted
    status, body, _ = await server.post("/v1/chat/completions", chat("2 + 2", model="sums"))
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert (await server.post("/v1/unload_lora_adapter", {"lora_name": "sums"}))[0] == 404
