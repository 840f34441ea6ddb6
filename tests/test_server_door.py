"""The door: who comes in, how much, and what happens when they go away."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from server_kit import TOKEN, Running, chat, make_home, running, until

from hybrid.server.access import OPEN

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Open: no key exists."""
    async with running(make_home(tmp_path_factory.mktemp("open"))) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def closed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Closed: keys exist."""
    async with running(make_home(tmp_path_factory.mktemp("closed"))) as server:
        server.keys().create("somebody")
        yield server


def routes(server: Running) -> list[tuple[str, str]]:
    """Every (method, path) of the app, from its router."""
    found = []
    for route in server.app.routes:
        methods = getattr(route, "methods", None) or {"GET"}
        path = route.path.replace("{name:path}", "base").replace("{decision_id}", "dec_1")
        found += [(method, path) for method in sorted(methods - {"HEAD"})]
    return found


# --- a client that goes away ----------------------------------------------------------------------------------------

LONG = "@tokens 2000 @delay 20ms"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**chat(LONG), "stream": True}),
        ("/v1/chat/completions", {**chat(LONG, model="prompt"), "stream": True}),
        ("/v1/completions", {"model": "base", "prompt": LONG, "max_tokens": 1900, "stream": True}),
    ],
    ids=["base", "prompt", "raw"],
)
async def test_R1_a_client_that_drops_a_stream_stops_the_engine(server: Running, path: str, body: dict) -> None:
    before = await server.engine_log()
    gone = await server.metric(f'hybrid_requests_total{{code="499",route="{path}"}}')
    async with server.http.post(server.url + path, json=body) as answer:
        await answer.content.readline()
        assert server.inflight == 1
        answer.close()  # the connection, not only the reading
    await _stopped(server, before["aborted"] + 1)
    assert await server.metric(f'hybrid_requests_total{{code="499",route="{path}"}}') == gone + 1
    assert await server.metric("hybrid_inflight") == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(LONG)),
        ("/v1/chat/completions", {**chat("@tokens 9 @stall"), "stream": True}),  # waits for its first token
        ("/v1/completions", {"model": "base", "prompt": LONG, "max_tokens": 1900}),
    ],
    ids=["chat", "before the first byte", "raw"],
)
async def test_R2_a_client_that_stops_waiting_stops_the_engine(server: Running, path: str, body: dict) -> None:
    before = await server.engine_log()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5), server.http.post(server.url + path, json=body):
            raise AssertionError("answered")
    await _stopped(server, before["aborted"] + 1)


async def _stopped(server: Running, aborted: int) -> None:
    async def engine_saw_it() -> bool:
        log = await server.engine_log()
        return log["aborted"] == aborted and log["active"] == 0

    await until(engine_saw_it, timeout_s=5)
    await until(lambda: server.inflight == 0, timeout_s=5)


async def test_R3_a_slow_reader_holds_nobody_up(server: Running) -> None:
    async with server.http.post(
        server.url + "/v1/chat/completions", json={**chat("@tokens 2000"), "stream": True}
    ) as slow:
        await slow.content.readline()
        for _ in range(5):
            status, _, _ = await server.post("/v1/chat/completions", chat("quick"))
            assert status == 200
        rest = await slow.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")


# --- keys ------------------------------------------------------------------------------------------------------------


async def test_S1_every_route_needs_a_key_once_one_exists(closed: Running) -> None:
    paths = routes(closed)
    assert len(paths) > 12
    for method, path in [
        *paths,
        ("GET", "/"),
        ("GET", "/no/such/route"),
        ("POST", "/v1/new"),
        ("GET", "/gradio_api/info"),
    ]:
        async with closed.http.request(method, closed.url + path, json={} if method == "POST" else None) as answer:
            if path in OPEN:
                assert answer.status == 200, path
                continue
            body = await answer.json()
            assert (answer.status, body["error"]["code"]) == (401, "invalid_api_key"), path
            assert answer.headers["www-authenticate"].startswith("Bearer" if path.startswith("/v1/") else "Basic")
            assert answer.headers["x-should-retry"] == "false"
            assert answer.headers["x-request-id"]
    assert set(OPEN) == {"/livez", "/readyz"}


async def test_S2_wrong_keys_stay_outside_and_right_ones_come_in(
    closed: Running, caplog: pytest.LogCaptureFixture
) -> None:
    made = closed.keys().create("alice")
    right = f"Bearer {made['key']}"
    for wrong in (
        "Bearer",
        "Bearer ",
        "Bearer x",
        right + "x",
        right[:-1],
        made["key"],
        f"Basic {made['key']}",
        "Basic %%%",
    ):
        status, body, _ = await closed.get("/v1/models", authorization=wrong)
        assert status == 401, wrong
        assert made["key"] not in json.dumps(body)
    assert (await closed.get("/v1/models", authorization=right))[0] == 200
    basic = aiohttp.encode_basic_auth("anyone", made["key"])  # what a browser sends for the UI
    assert (await closed.get("/v1/models", authorization=basic))[0] == 200
    assert (await closed.get("/v1/models", authorization=f"Bearer {TOKEN}"))[0] == 200
    _, status, _ = await closed.get("/v1/status", authorization=right)
    assert made["key"] not in json.dumps(status)
    assert made["key"] not in caplog.text
    closed.keys().revoke(made["id"])
    assert (await closed.get("/v1/models", authorization=right))[0] == 401


async def test_a_use_key_cannot_change_what_is_served(closed: Running) -> None:
    use, admin = (closed.keys().create(n, scopes)["key"] for n, scopes in (("u", ["use"]), ("a", ["use", "admin"])))
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert (await closed.post(path, {"lora_name": "x"}, authorization=f"Bearer {use}"))[0] == 403
        assert (await closed.post(path, {"lora_name": "x"}, authorization=f"Bearer {admin}"))[0] == 404
    async with closed.http.delete(closed.url + "/v1/models/x", headers={"authorization": f"Bearer {use}"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (403, "permission_denied")


async def test_S3_hostile_names_are_answered_and_nothing_breaks(server: Running, closed: Running) -> None:
    for name in (
        "'; DROP TABLE keys; --",
        "a\r\nx-evil: 1",
        "../../etc/passwd",
        "x" * 1_000_000,
        "\0",
        "%s%n",
        "adapter:" * 100,
    ):
        status, body, headers = await server.post("/v1/chat/completions", chat("hi", model=name))
        assert (status, body["error"]["code"]) == (404, "model_not_found"), name[:20]
        assert "x-evil" not in headers
        assert len(body["error"]["message"]) < 1000
    for key in ("' OR 1=1 --", "x" * 20_000, "\u00ff" * 50):
        assert (await closed.get("/v1/models", authorization=f"Bearer {key}"))[0] == 401
    assert (await closed.get("/v1/models", authorization="Bearer " + "x" * 40_000))[0] == 431
    assert (await closed.get("/v1/models", authorization=f"Bearer {TOKEN}"))[0] == 200


async def test_S8_two_tenants_never_share_a_prefix_cache(closed: Running) -> None:
    ann, bob = (closed.keys().create(name)["key"] for name in ("ann", "bob"))
    salts = []
    for key in (ann, bob, ann):
        body = chat("same words", cache_salt="mine", vllm_xargs={"a": 1}, kv_transfer_params={"b": 2})
        status, _, _ = await closed.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
        assert status == 200
        sent = (await closed.engine_log())["requests"][-1]["body"]
        assert not {"vllm_xargs", "kv_transfer_params"} & set(sent)
        salts.append(sent["cache_salt"])
    assert salts[0] == salts[2] != salts[1]
    assert "mine" not in salts


async def test_S9_nothing_a_client_says_moves_the_request(server: Running) -> None:
    body = chat(
        "stay", api_base="http://evil.example", base_url="http://evil.example", lora_path="/etc", Host="evil.example",
        extra_headers={"Host": "evil.example"}, extra_body={"model": "x"},
    )  # fmt: skip
    hostile = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "X-Forwarded-For": "1.2.3.4"}
    status, _, _ = await server.post("/v1/chat/completions", body, **hostile)
    assert status == 200
    seen = (await server.engine_log())["requests"][-1]
    assert "evil.example" not in json.dumps(seen)
    assert "1.2.3.4" not in json.dumps(seen)


# --- how much --------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    return b'{"model": "base", "messages": ' + b"[" * depth + b"]" * depth + b"}"


HELLO = [{"role": "user", "content": "hi"}]
TOO_MUCH: dict[str, tuple[int, object]] = {
    "n": (400, chat("hi", n=10**9)),
    "best_of": (400, chat("hi", best_of=10**9)),
    "logprobs": (400, chat("hi", logprobs=10**6)),
    "max_tokens": (400, chat("hi", max_tokens=10**6)),
    "ten megabytes": (413, chat("word " * 2_000_000)),
    "a long prompt": (400, chat("word " * 100_000)),
    "10,000 messages": (400, {"model": "base", "messages": HELLO * 10_000}),
    "10,000 deep": (400, nested(10_000)),
    "5,000 stop strings": (400, chat("hi", stop=[f"s{i}" for i in range(5000)])),
    "evil regex": (400, chat("hi", structured_outputs={"regex": "(a+)+$"})),
    "evil grammar": (400, chat("hi", structured_outputs={"grammar": "root ::= x\n" * 10_000})),
    "not an object": (400, [1, 2]),
    "NaN": (400, b'{"model": "base", "temperature": NaN}'),
    "wrong types": (400, chat("hi", temperature="hot")),
    "a knob unknown": (400, chat("hi", hybrid={"shape": "round"})),
    "not JSON": (400, b"{'model': 'base'}"),
    "nothing": (400, b""),
}


@pytest.mark.parametrize("case", TOO_MUCH)
async def test_S15_too_much_is_refused_and_the_engine_never_sees_it(server: Running, case: str) -> None:
    expected, body = TOO_MUCH[case]
    before = await server.engine_log()
    for path in ("/v1/chat/completions", "/v1/route"):
        status, answer, headers = await server.post(path, body)
        assert status == expected
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert headers["x-should-retry"] == "false"
    after = await server.engine_log()
    assert len(after["requests"]) == len(before["requests"])
    if case in ("max_tokens", "a long prompt"):
        assert answer["error"]["code"] == "context_length_exceeded"


async def test_S15_a_thousand_headers(server: Running) -> None:
    status, body, _ = await server.get("/v1/models", **{f"x-{i}": "1" for i in range(1000)})
    assert (status, body["error"]["code"]) == (431, "headers_too_large")


async def test_S15_a_body_without_length_is_counted_and_cut(server: Running) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    headers = {"content-type": "application/json"}
    async with server.http.post(server.url + "/v1/chat/completions", data=pieces(), headers=headers) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (413, "request_too_large")
    assert (await server.post("/v1/chat/completions", chat("still here")))[0] == 200


async def test_S15_other_kinds_of_bodies(server: Running) -> None:
    parts = (
        b"".join(b'--b\r\ncontent-disposition: form-data; name="%d"\r\n\r\nx\r\n' % i for i in range(10_000)) + b"--b--"
    )
    before = await server.engine_log()
    assert (await server.post("/v1/chat/completions", parts, content_type="multipart/form-data; boundary=b"))[0] == 400
    assert (await server.post("/v1/chat/completions", chat("hi"), content_type="text/plain"))[0] == 400
    assert (await server.post("/v1/chat/completions", b"\x1f\x8b" + b"0" * 100, content_encoding="gzip"))[0] == 400
    assert len((await server.engine_log())["requests"]) == len(before["requests"])


async def test_a_full_house_turns_the_next_one_away(tmp_path: Path) -> None:
    async with running(make_home(tmp_path, server={"max_inflight": 2})) as server:
        waiting = [
            asyncio.create_task(server.post("/v1/chat/completions", chat("@tokens 3 @stall 1"))) for _ in range(2)
        ]
        await until(lambda: server.inflight == 2)
        status, body, headers = await server.post("/v1/chat/completions", chat("hi"))
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "overloaded", "1")
        assert "x-should-retry" not in headers
        assert await server.metric('hybrid_rejected_total{reason="overloaded"}') == 1
        assert (await server.get("/livez"))[0] == 200
        for task in waiting:
            task.cancel()
        await until(lambda: server.inflight == 0)
        assert (await server.post("/v1/chat/completions", chat("hi")))[0] == 200


# --- what is counted -------------------------------------------------------------------------------------------------


async def test_A11_unknown_models_are_404_and_leave_nothing_behind(server: Running) -> None:
    before = await server.engine_log()
    await server.post("/v1/chat/completions", chat("hi", model="first"))
    series = await _series(server)
    answers = await asyncio.gather(
        *(server.post("/v1/chat/completions", chat("hi", model=f"m{i}")) for i in range(200))
    )
    assert {(status, body["error"]["code"]) for status, body, _ in answers} == {(404, "model_not_found")}
    for i in range(50):
        assert (await server.get(f"/v1/models/m{i}"))[0] == 404
        assert (await server.get(f"/v1/no/such/{i}"))[0] == 404
        assert (await server.get(f"/v1/decisions/{i}"))[0] == 404
    assert await _series(server) - series <= {
        ("hybrid_requests_total", f'code="404",route="{route}"')
        for route in ("/v1/models/{name:path}", "/v1/decisions/{decision_id}", "none")
    }
    assert len((await server.engine_log())["requests"]) == len(before["requests"])


async def _series(server: Running) -> set[tuple[str, str]]:
    _, text, _ = await server.get("/metrics")
    rows = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    return {(row.partition("{")[0], row.partition("{")[2].rstrip("}")) for row in rows if "_created" not in row}


async def test_R25_names_and_labels_are_stable(server: Running) -> None:
    for method, path in routes(server):
        async with server.http.request(method, server.url + path, json={} if method == "POST" else None) as answer:
            assert answer.status < 500, path
    series = await _series(server)
    names = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in series}
    assert names >= {"hybrid_requests_total", "hybrid_gate_fallback_total", "hybrid_engine_restarts_total"}
    assert names <= {
        *("hybrid_requests_total", "hybrid_rejected_total", "hybrid_inflight", "hybrid_overhead_seconds"),
        *(
            "hybrid_gate_seconds",
            "hybrid_gate_fallback_total",
            "hybrid_retrieval_seconds",
            "hybrid_upstream_ttft_seconds",
        ),
        *("hybrid_engine_restarts_total", "hybrid_engine_ready", "hybrid_adapter_state", "hybrid_index_generation"),
        *("hybrid_job_state", "hybrid_engine_breaker", "hybrid_engine_retries_refused_total"),
    }
    templates = {route.path for route in server.app.routes if isinstance(route, APIRoute)}
    labels = {label for name, label in series if name == "hybrid_requests_total"}
    assert {label.split('route="')[1].rstrip('"') for label in labels} <= templates | {"none", "ui"}


async def test_livez_readyz_docs_and_openapi(server: Running) -> None:
    assert (await server.get("/livez"))[:2] == (200, {"status": "alive"})
    assert (await server.get("/readyz"))[1]["status"] == "ready"
    assert (await server.get("/docs"))[0] == 200
    _, described, _ = await server.get("/openapi.json")
    assert "requestBody" in described["paths"]["/v1/chat/completions"]["post"]
    _, status, _ = await server.get("/v1/status")
    assert set(status) >= {"engine", "adapters", "corpora", "gate", "jobs", "versions"}
    assert status["engine"]["pids"]


async def test_while_the_engine_starts_answers_say_so(tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server:
        await server.gateway.engine.close()
        status, body, headers = await server.get("/readyz")
        assert status == 503
        assert {"status", "phase", "detail"} <= set(body)
        assert (await server.get("/livez"))[0] == 200
        for stream in (False, True):
            status, body, headers = await server.post("/v1/chat/completions", chat("hi", stream=stream))
            assert (status, body["error"]["code"]) == (503, "not_ready")
            assert int(headers["retry-after"]) >= 1


async def test_request_ids_are_kept_when_they_are_sane(server: Running) -> None:
    assert (await server.get("/livez", **{"x-request-id": "abc-1"}))[2]["x-request-id"] == "abc-1"
    for odd in ("a b", "x" * 200, "a;b"):
        assert (await server.get("/livez", **{"x-request-id": odd}))[2]["x-request-id"].startswith("req_")


async def test_garbage_on_the_socket_hurts_nobody(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    def throw(raw: bytes) -> None:
        with socket.create_connection((host, int(port)), timeout=5) as line:
            line.sendall(raw)
            line.settimeout(2)
            line.recv(1000)

    for raw in (
        b"\x16\x03\x01garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/route HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        await asyncio.to_thread(throw, raw)
    assert (await server.get("/livez"))[0] == 200


async def test_S17_a_page_of_another_site_cannot_post(server: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/files"):
        status, answer, _ = await server.post(path, b"{}", sec_fetch_site="cross-site")
        assert (status, answer["error"]["code"]) == (403, "permission_denied")
    async with server.http.get(server.url + "/v1/models", headers={"Sec-Fetch-Site": "cross-site"}) as response:
        assert response.status == 200
