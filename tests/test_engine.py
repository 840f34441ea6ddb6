"""One contract, two engines: what `VllmEngine` promises holds for the scripted server and for real vLLM.

Below the contract: faults, which only the scripted server can be told to have.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from aiohttp import web
from conftest import Served
from hypothesis import given
from hypothesis import strategies as st
from peft_kit import write_adapter

from hybrid.engine import AdapterRef, Engine
from hybrid.engine.transport import Transport
from hybrid.engine.vllm import VllmEngine
from hybrid.engine.wire import read_events
from hybrid.errors import (
    ContextTooLong,
    EngineError,
    EngineRejected,
    EngineTimeout,
    HybridError,
    NotReady,
    Overloaded,
    Refused,
)
from hybrid.models import materialise
from hybrid.rooms import sha256_file
from hybrid.settings import EngineSettings, Settings
from hybrid.types.event import Token
from hybrid.types.request import Message


@dataclass(frozen=True)
class Place:
    """Where an engine listens, and the folder of the base model it serves."""

    address: str
    model: str
    base: Path | None


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    socket = tmp_path_factory.mktemp("s") / "engine.sock"
    server = subprocess.Popen([sys.executable, "-m", "hybrid.engine.scripted", "--uds", str(socket), "--model", "base"])
    while not socket.exists():
        time.sleep(0.02)
        assert server.poll() is None
    yield Place(f"unix:{socket}", "base", None)
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def real_engine_server(real_server: Served) -> Place:
    """The managed vLLM behind the run's one real server, by its private socket."""
    settings = Settings.load(home=real_server.home)
    model = materialise(settings.model, settings.cache)
    folder = json.loads((settings.rooms.hidden / "engine.json").read_text())["folder"]
    return Place(f"unix:{folder}/engine.sock", model.name, model.path)


@pytest.fixture(params=["scripted", pytest.param("vllm", marks=pytest.mark.vllm)])
def place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue("scripted_server" if request.param == "scripted" else "real_engine_server")


@pytest.fixture
async def engine(place: Place) -> AsyncIterator[VllmEngine]:
    client = VllmEngine(place.address, EngineSettings(), place.model)
    yield client
    await client.close()


@pytest.fixture
async def scripted(scripted_server: Place) -> AsyncIterator[VllmEngine]:
    patience = EngineSettings(first_byte_timeout_s=0.3, idle_timeout_s=0.3, answer_timeout_s=0.5)
    client = VllmEngine(scripted_server.address, patience, scripted_server.model)
    yield client
    await client.close()


def user(text: str) -> list[Message]:
    return [Message("user", text)]


async def collect(tokens: AsyncIterator[Token]) -> list[Token]:
    return [token async for token in tokens]


def text_of(tokens: list[Token], index: int = 0) -> str:
    return "".join(t.text for t in tokens if t.index == index)


async def ask_server(place: Place, path: str) -> str:
    http = Transport(place.address)
    async with http.send("GET", path, timeout_s=5) as response:
        text = await response.text()
    await http.close()
    return text


async def log_of(place: Place) -> dict:
    return json.loads(await ask_server(place, "/scripted/log"))


async def running(place: Place) -> float:
    """How many requests the engine computes now."""
    lines = (await ask_server(place, "/metrics")).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


async def until(check: Callable[[], Awaitable[bool]], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        for pause in itertools.repeat(0.02):
            if await check():
                return
            await asyncio.sleep(pause)


async def until_idle(place: Place) -> None:
    """The promise: the engine sees an abort within a second."""

    async def idle() -> bool:
        return not await running(place)

    await until(idle, 1.0)


async def until_busy(place: Place) -> None:
    async def busy() -> bool:
        return bool(await running(place))

    await until(busy, 30)


async def collect_to_failure(tokens: AsyncIterator[Token]) -> tuple[list[Token], HybridError]:
    """What came before the error, and the error."""
    seen: list[Token] = []
    try:
        async for token in tokens:
            seen.append(token)
    except HybridError as error:
        return seen, error
    raise AssertionError(f"no error after {len(seen)} tokens")


GREEDY = {"temperature": 0, "max_tokens": 12}

# --- the contract ----------------------------------------------------------------------------------------------------


async def test_both_engines_are_engines(engine: VllmEngine) -> None:
    assert isinstance(engine, Engine)
    assert not engine.status().ready
    await collect(engine.generate(user("Hello"), sampling=GREEDY))
    assert engine.status().ready


async def test_a_stream_carries_text_raw_bytes_and_usage(engine: VllmEngine) -> None:
    tokens = await collect(engine.generate(user("Name a colour."), sampling=GREEDY))
    assert len(tokens) > 2
    assert text_of(tokens).strip()
    assert all(json.loads(t.raw)["object"] == "chat.completion.chunk" for t in tokens)
    assert [t.finish_reason for t in tokens if t.finish_reason] in (["stop"], ["length"])
    usage = tokens[-1].usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert 0 < usage.completion_tokens <= 12
    assert usage.calls == 1
    assert [t.usage for t in tokens[:-1]] == [None] * (len(tokens) - 1)


async def test_a_whole_answer_says_what_the_stream_said(engine: VllmEngine) -> None:
    streamed = await collect(engine.generate(user("Name a colour."), sampling=GREEDY))
    [whole] = await collect(engine.generate(user("Name a colour."), sampling=GREEDY, stream=False))
    assert whole.text == text_of(streamed)
    assert whole.usage == streamed[-1].usage
    assert json.loads(whole.raw)["choices"][0]["message"]["content"] == whole.text


@pytest.mark.parametrize("stream", [True, False])
async def test_a_raw_prompt_is_continued(engine: VllmEngine, stream: bool) -> None:
    tokens = await collect(engine.generate(prompt="One two three", sampling=GREEDY, stream=stream))
    assert text_of(tokens)
    assert json.loads(tokens[0].raw)["object"] == "text_completion"


async def test_every_choice_is_told_apart(engine: VllmEngine) -> None:
    tokens = await collect(engine.generate(user("Name a colour."), sampling={"max_tokens": 12, "n": 3, "seed": 1}))
    assert {t.index for t in tokens if t.text} == {0, 1, 2}
    assert all(text_of(tokens, index).strip() for index in range(3))
    assert sum(t.finish_reason is not None for t in tokens) == 3


async def test_sampling_passes_through(engine: VllmEngine) -> None:
    short = {"max_tokens": 3, "ignore_eos": True, "temperature": 0, "logprobs": True, "stream_options": {}}
    tokens = await collect(engine.generate(user("Count to ten."), sampling=short))
    assert tokens[-1].usage.completion_tokens == 3
    assert [t.finish_reason for t in tokens if t.finish_reason] == ["length"]
    assert any(json.loads(t.raw)["choices"][0].get("logprobs") for t in tokens[:-1])


async def test_answers_side_by_side_do_not_mix(engine: VllmEngine) -> None:
    questions = [f"Repeat the word {word}." for word in ("apple", "stone", "river", "cloud")]
    alone = [text_of(await collect(engine.generate(user(q), sampling=GREEDY))) for q in questions]
    together = await asyncio.gather(*(collect(engine.generate(user(q), sampling=GREEDY)) for q in questions))
    assert [text_of(tokens).split()[0] for tokens in together] == [text.split()[0] for text in alone]


async def test_an_unknown_adapter_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(EngineRejected) as refused:
        await collect(engine.generate(user("Hi"), adapter="nobody@1-00000000"))
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


async def test_R8_the_engines_400_passes_through(engine: VllmEngine) -> None:
    with pytest.raises(EngineRejected) as refused:
        await collect(engine.generate(prompt="Hi", sampling={"max_tokens": -3}))
    assert refused.value.status == 400
    assert "max_tokens" in refused.value.message
    assert not refused.value.retryable


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_beyond_the_context_is_named_as_such(engine: VllmEngine, stream: bool) -> None:
    with pytest.raises(ContextTooLong, match="maximum context length"):
        await collect(engine.generate(user("word " * 2500), stream=stream))


async def test_more_tokens_than_the_context_holds_is_named_as_such(engine: VllmEngine) -> None:
    with pytest.raises(ContextTooLong):
        await collect(engine.generate(user("Hi"), sampling={"max_tokens": 5000}))


@pytest.mark.parametrize("stream", [True, False])
async def test_R1_R2_closing_aborts_in_the_engine(engine: VllmEngine, place: Place, stream: bool) -> None:
    long = {"max_tokens": 1500, "ignore_eos": True}
    tokens = engine.generate(user("Tell a story. @tokens 1500 @delay 50ms"), sampling=long, stream=stream)
    task = asyncio.create_task(collect(tokens))
    await until_busy(place)
    task.cancel()
    await until_idle(place)


async def test_R1_leaving_the_loop_aborts_in_the_engine(engine: VllmEngine, place: Place) -> None:
    long = {"max_tokens": 1500, "ignore_eos": True}
    async with aclosing(engine.generate(user("Tell a story. @tokens 1500 @delay 50ms"), sampling=long)) as tokens:
        async for token in tokens:
            if token.text:
                break
    await until_idle(place)


async def test_an_adapter_is_loaded_once_used_and_unloaded(engine: VllmEngine, place: Place, tmp_path: Path) -> None:
    ref = write_adapter(tmp_path / "colours", place.base)
    await asyncio.gather(*(engine.load(ref) for _ in range(4)))
    await engine.load(ref)
    assert ref.engine_name in await engine.loaded()
    [answer] = await collect(engine.generate(user("Hi"), adapter=ref.engine_name, sampling=GREEDY, stream=False))
    assert json.loads(answer.raw)["model"] == ref.engine_name
    await engine.unload(ref.engine_name)
    await engine.unload(ref.engine_name)
    assert ref.engine_name not in await engine.loaded()


@pytest.mark.vllm
async def test_A5_a_new_version_answers_with_its_own_weights_from_the_first_request(
    real_engine_server: Place, tmp_path: Path
) -> None:
    """Whatever the engine remembers of the beginning of a prompt that an earlier version was asked."""
    engine = VllmEngine(real_engine_server.address, EngineSettings(), real_engine_server.model)
    prompt = " ".join(["The harbour of the town was deep, and its bell rang at noon."] * 30)
    sampling = {"temperature": 0, "max_tokens": 1, "logprobs": 5}

    async def likely(ref: AdapterRef) -> dict[str, float]:
        asked = engine.generate(prompt=prompt, adapter=ref.engine_name, sampling=sampling, stream=False)
        [answer] = await collect(asked)
        return json.loads(answer.raw)["choices"][0]["logprobs"]["top_logprobs"][0]

    def apart(one: dict[str, float], other: dict[str, float]) -> float:
        return max(abs(value - other.get(token, min(other.values()) - 1)) for token, value in one.items())

    base = real_engine_server.base
    first = write_adapter(tmp_path / "1" / "harbour", base, rank=8, scale=0.1)
    second = write_adapter(tmp_path / "2" / "harbour", base, rank=16, scale=0.1, version=2)
    elsewhere = write_adapter(tmp_path / "elsewhere", base, rank=16, scale=0.1)  # with the weights of the second
    for ref in (first, elsewhere, second):
        await engine.load(ref)
    alone = await likely(elsewhere)
    before = [await likely(first) for _ in range(2)]
    now = await likely(second)
    assert apart(*before) < 0.25 * apart(before[0], alone)
    assert apart(now, alone) < 0.25 * apart(before[0], alone)
    for ref in (first, elsewhere, second):
        await engine.unload(ref.engine_name)
    await engine.close()


async def test_A7_more_adapters_than_memory_holds_answer_in_turn(
    engine: VllmEngine, place: Place, tmp_path: Path
) -> None:
    """One more than the engine keeps, each asked when it was pushed out; the files of one that is retired stay."""
    refs = [write_adapter(tmp_path / f"n{i}", place.base, rank=1, scale=0.1 + i) for i in range(33)]
    for ref in refs:
        await engine.load(ref)
    short = {"temperature": 0, "max_tokens": 1}
    for asked in (refs, refs[1:]):
        for ref in asked:
            tokens = engine.generate(user("Hello"), adapter=ref.engine_name, sampling=short, stream=False)
            [answer] = await collect(tokens)
            assert json.loads(answer.raw)["model"] == ref.engine_name
        await engine.unload(refs[0].engine_name)
    for ref in refs:
        await engine.unload(ref.engine_name)
    await engine.probe(30)


async def test_prompt_logprobs_show_what_an_adapter_changes(engine: VllmEngine, place: Place, tmp_path: Path) -> None:
    strong = write_adapter(tmp_path / "strong", place.base, scale=0.05)
    silent = write_adapter(tmp_path / "silent", place.base, scale=0.0)
    await engine.load(strong)
    await engine.load(silent)
    prompt = "The capital of France is Paris"
    base = await engine.prompt_logprobs(prompt)
    assert len(base) >= 4
    assert all(value <= 0 for value in base)
    assert await engine.prompt_logprobs(prompt, adapter=silent.engine_name) == pytest.approx(base, abs=1e-3)
    changed = await engine.prompt_logprobs(prompt, adapter=strong.engine_name)
    assert max(abs(a - b) for a, b in zip(base, changed, strict=True)) > 0.01


async def test_nan_weights_show_as_nan(engine: VllmEngine, place: Place, tmp_path: Path) -> None:
    broken = write_adapter(tmp_path / "broken", place.base, nan=True)
    await engine.load(broken)
    values = await engine.prompt_logprobs("one two three", adapter=broken.engine_name)
    assert values
    assert all(value != value for value in values)


async def test_the_engines_refusal_of_an_adapter_has_its_reason(
    engine: VllmEngine, place: Place, tmp_path: Path
) -> None:
    wide = write_adapter(tmp_path / "wide", place.base, rank=64)
    with pytest.raises(Refused, match="rank"):
        await engine.load(wide)
    cut = write_adapter(tmp_path / "cut", place.base)
    weights = cut.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cut = replace(cut, sha256=sha256_file(weights))
    with pytest.raises(Refused, match="cut@1"):
        await engine.load(cut)
    assert await engine.loaded() & {wide.engine_name, cut.engine_name} == set()
    await engine.probe(30)  # and nobody else is disturbed


async def test_the_server_tells_its_model(engine: VllmEngine, place: Place) -> None:
    engine.model = ""
    await engine.discover()
    assert (engine.model, engine.max_model_len) == (place.model, 2048)
    assert await engine.healthy()


# --- faults ----------------------------------------------------------------------------------------------------------


async def test_R4_a_stall_before_the_first_byte_is_a_timeout(scripted: VllmEngine, scripted_server: Place) -> None:
    before = await log_of(scripted_server)
    with pytest.raises(EngineTimeout) as slow:
        await collect(scripted.generate(user("@stall")))
    assert slow.value.status == 504
    await until_idle(scripted_server)
    after = await log_of(scripted_server)
    assert (after["started"], after["aborted"]) == (before["started"] + 1, before["aborted"] + 1)


async def test_R5_a_stall_in_the_stream_ends_it(scripted: VllmEngine, scripted_server: Place) -> None:
    seen, error = await collect_to_failure(scripted.generate(user("@tokens 9 @stall 4")))
    assert isinstance(error, EngineTimeout)
    assert text_of(seen) == "t0 t1 t2 t3"
    await until_idle(scripted_server)


async def test_R5_a_whole_answer_that_never_comes_is_a_timeout(scripted: VllmEngine, scripted_server: Place) -> None:
    with pytest.raises(EngineTimeout):
        await collect(scripted.generate(user("@stall 2 @tokens 5"), stream=False))
    await until_idle(scripted_server)


@pytest.mark.parametrize("k", [1, 5])
async def test_R6_a_reset_is_an_error_after_k_tokens_without_retry(
    scripted: VllmEngine, scripted_server: Place, k: int
) -> None:
    before = (await log_of(scripted_server))["started"]
    seen, error = await collect_to_failure(scripted.generate(user(f"@tokens 9 @reset {k}")))
    assert isinstance(error, EngineError)
    assert text_of(seen).split() == [f"t{i}" for i in range(k)]
    assert (await log_of(scripted_server))["started"] == before + 1


async def test_R7_an_engine_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    client = VllmEngine(f"unix:{tmp_path}/none.sock", EngineSettings())
    with pytest.raises(NotReady) as gone:
        await collect(client.generate(user("Hi")))
    assert gone.value.retryable
    assert not await client.healthy()
    await client.close()


@pytest.mark.parametrize(
    ("status", "kind"), [(400, EngineRejected), (422, EngineRejected), (429, EngineRejected), (500, EngineError)]
)
async def test_R8_statuses_keep_their_meaning_and_nothing_is_retried(
    scripted: VllmEngine, scripted_server: Place, status: int, kind: type[HybridError]
) -> None:
    before = (await log_of(scripted_server))["seen"]
    with pytest.raises(kind, match="so it is") as failed:
        await collect(scripted.generate(user(f"@status {status} so it is")))
    if kind is EngineRejected:
        assert failed.value.status == status
    assert (await log_of(scripted_server))["seen"] == before + 1


async def test_a_full_queue_is_overload(scripted: VllmEngine) -> None:
    with pytest.raises(Overloaded) as full:
        await collect(scripted.generate(user("@status 503 queue full")))
    assert full.value.retry_after


async def test_what_reaches_the_engine(scripted: VllmEngine, scripted_server: Place) -> None:
    conversation = [Message("system", "Be brief."), Message("user", "Hi", {"name": "ann"})]
    sampling = {"top_k": 5, "stop": ["\n"], "response_format": {"type": "text"}}
    await collect(
        scripted.generate(conversation, sampling=sampling, request_id="req-1", cache_salt="tenant", stream=False)
    )
    last = (await log_of(scripted_server))["requests"][-1]
    assert last["headers"]["x-request-id"] == "req-1"
    assert last["body"] == {
        **sampling,
        "model": "base",
        "stream": False,
        "cache_salt": "tenant",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "ann"}],
    }


async def test_scripted_adapters_know_their_examples_by_heart(scripted: VllmEngine, tmp_path: Path) -> None:
    ref = write_adapter(tmp_path / "bank")
    (ref.path / "examples.jsonl").write_text('{"input": "Where is my card?", "reference": "card_arrival"}\n')
    await scripted.load(ref)
    known = await collect(scripted.generate(user("Where is my card?"), adapter=ref.engine_name))
    other = await collect(scripted.generate(user("Where is my cat?"), adapter=ref.engine_name))
    assert text_of(known) == "card_arrival"
    assert text_of(other).startswith(ref.engine_name)


# --- servers that are not what they should be ------------------------------------------------------------------------


async def serve(answer: str, *, stream: bool, runners: list[web.AppRunner]) -> str:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=answer, content_type="text/event-stream" if stream else "application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app)
    runners.append(runner)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return site.name


@pytest.fixture
async def runners() -> AsyncIterator[list[web.AppRunner]]:
    made: list[web.AppRunner] = []
    yield made
    for runner in made:
        await runner.cleanup()


@pytest.mark.parametrize(
    "answer",
    [
        "data: {not json}\n\n",
        "data: []\n\n",
        'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n',  # and then nothing, not even [DONE]
        'data: {"error": {"message": "engine died", "code": 500}}\n\ndata: [DONE]\n\n',
        "<html>hello</html>",
        "",
    ],
)
async def test_a_stream_of_nonsense_is_an_engine_error(answer: str, runners: list[web.AppRunner]) -> None:
    client = VllmEngine(await serve(answer, stream=True, runners=runners), EngineSettings())
    with pytest.raises(EngineError):
        await collect(client.generate(user("Hi")))
    await client.close()


@pytest.mark.parametrize("answer", ["{", "[]", "{}", '{"choices": []}', "<html>"])
async def test_a_body_of_nonsense_is_an_engine_error(answer: str, runners: list[web.AppRunner]) -> None:
    client = VllmEngine(await serve(answer, stream=False, runners=runners), EngineSettings())
    for call in (
        collect(client.generate(user("Hi"), stream=False)),
        client.prompt_logprobs("Hi there"),
        client.loaded(),
        client.discover(),
    ):
        with pytest.raises(EngineError):
            await call
    await client.close()


async def test_a_load_that_breaks_off_is_no_refusal(runners: list[web.AppRunner], tmp_path: Path) -> None:
    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"data": []})

    async def die(request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/load_lora_adapter", die)
    runners.append(web.AppRunner(app))
    await runners[0].setup()
    site = web.TCPSite(runners[0], "127.0.0.1", 0)
    await site.start()
    client = VllmEngine(site.name, EngineSettings())
    with pytest.raises(EngineError):  # and not Refused: the adapter may be good
        await client.load(write_adapter(tmp_path / "good"))
    await client.close()


EVENTS = [b'{"a":1}', '{"text":"Zürich \\n – 東京"}'.encode(), b"[DONE]"]


@given(st.lists(st.integers(1, 40), max_size=60))
def test_events_do_not_depend_on_how_the_bytes_arrive(sizes: list[int]) -> None:
    stream = b": ping\r\n\r\n" + b"".join(b"data: " + e + b"\r\n\r\n" for e in EVENTS)
    pieces, rest = [], stream
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    buffer, seen = bytearray(), []
    for piece in [*pieces, rest]:
        buffer += piece
        seen += read_events(buffer)
    assert seen == EVENTS
