"""What is answered while the engine or a corpus cannot be used (rows R9, R19)."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from server_kit import Running, chat, make_home, running, until

from hybrid.engine.breaker import FAILURES
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings

PATH = "/v1/chat/completions"
QUESTION = "Why is the clock of the tower slow?"
CLOCK = "The clock of the tower is slow because a gull nests behind its hands."


async def test_R9_a_failing_engine_is_spared_and_served_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid.engine.breaker.COOLDOWN_S", 3600.0)
    async with running(make_home(tmp_path)) as server:
        for _ in range(FAILURES):
            status, body, _ = await server.post(PATH, chat("@status 500 out of order"))
            assert (status, body["error"]["code"]) == (502, "engine_error")
        before = (await server.engine_log())["seen"]
        for stream in (False, True):
            status, body, headers = await server.post(PATH, chat("hi", stream=stream))
            assert (status, body["error"]["code"], headers["retry-after"]) == (503, "engine_failing", "2")
            assert "x-should-retry" not in headers
        assert (await server.engine_log())["seen"] == before
        for path in ("/livez", "/readyz", "/v1/models", "/metrics"):
            assert (await server.get(path))[0] == 200, path
        assert (await server.get("/v1/status"))[1]["engine"]["breaker"] == "open"
        assert await server.metric('hybrid_engine_breaker{state="open"}') == 1
        assert await server.metric('hybrid_engine_breaker{state="closed"}') == 0
        monkeypatch.setattr("hybrid.engine.breaker.COOLDOWN_S", 0.0)
        for _ in range(3):
            assert (await server.post(PATH, chat("hi")))[0] == 200
        assert await server.metric('hybrid_engine_breaker{state="closed"}') == 1


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, embedder: Embedder) -> Path:
    """Corpora of the same document: as it was made, without its index, and with a store that is rubbish, once from its
    first byte on and once behind its first page."""
    home = tmp_path / "home"
    library = Library(Home(home), embedder, RetrievalSettings())
    for name in ("whole", "bare", "rotten", "rubbish"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "corpus.jsonl").write_text(json.dumps({"id": "clock", "title": "Clock", "text": CLOCK}) + "\n")
        library.ingest(name, folder)
    library.close()
    shutil.rmtree(home / "index" / "bare" / "generations")
    for name, good in {"rotten": 4096, "rubbish": 0}.items():
        store = home / "index" / name / "store.db"
        content = store.read_bytes()
        store.write_bytes(content[:good] + b"\xff" * (len(content) - good))
    return home


async def ask(server: Running, model: str, **more: Any) -> tuple[int, dict[str, Any], Any]:
    return await server.post(PATH, chat(QUESTION, model=model, **more))


async def test_R19_without_its_documents_nothing_is_answered_from_them(home: Path) -> None:
    async with running(make_home(home)) as server:
        before = (await server.engine_log())["seen"]
        for stream, model in itertools.product((False, True), ("rag:rotten", "rag:rubbish")):
            status, body, _ = await ask(server, model, stream=stream)
            assert (status, body["error"]["code"]) == (507, "storage_error")
            assert "hybrid corpora restore" in body["error"]["message"]
        assert (await server.engine_log())["seen"] == before, "no answer without its documents"
        for name in ("whole", "bare"):
            status, body, _ = await ask(server, f"rag:{name}")
            assert status == 200
            (note,) = body["choices"][0]["message"]["annotations"]
            assert note["file_citation"]["quote"] == CLOCK
        await asyncio.to_thread(server.gateway.library.delete, "whole")
        before = (await server.engine_log())["seen"]
        assert (await ask(server, "rag:whole"))[0] == 404
        assert (await server.engine_log())["seen"] == before


async def test_R19_a_corpus_that_cannot_be_read_takes_nothing_with_it(home: Path) -> None:
    async with running(make_home(home)) as server:
        for model in ("base", "auto", "rag"):
            status, body, headers = await ask(server, model, hybrid={"explain": True})
            assert status == 200, body
            assert headers["x-hybrid-selected-arm"] not in ("rag:rotten", "rag:rubbish")
        assert "cannot be read" in body["hybrid"]["reason"]
        listed = [model["id"] for model in (await server.get("/v1/models"))[1]["data"]]
        assert "rag:whole" in listed
        assert not {"rag:rotten", "rag:rubbish"} & set(listed)
        assert (await server.get("/metrics"))[0] == 200
        assert [corpus["name"] for corpus in (await server.get("/v1/status"))[1]["corpora"]] == ["bare", "whole"]
        status, body, _ = await server.get("/readyz")
        assert (status, "cannot be read" in body["detail"]) == (200, True)
        for name in ("rotten", "rubbish"):
            await asyncio.to_thread(server.gateway.library.delete, name)

        async def all_well() -> bool:
            return not (await server.get("/readyz"))[1]["detail"]

        await until(all_well)
