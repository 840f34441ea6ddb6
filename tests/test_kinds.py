"""What is published and is no LoRA: checked, shown, never loaded; and the life of names (rows A5, A6, A13, D9)."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_kit import filling, make_base
from conftest import hybrid
from safetensors.numpy import save_file
from server_kit import TOKEN, chat, make_home, running, until
from sqlalchemy import select

from hybrid.adapters.heads import Head
from hybrid.adapters.preflight import BaseFacts
from hybrid.adapters.store import AdapterStore
from hybrid.errors import Conflict, ModelNotFound, Refused
from hybrid.rooms import Home
from hybrid.state import State, audit


@pytest.fixture
def base(tmp_path: Path) -> BaseFacts:
    return make_base(tmp_path / "facts")


@pytest.fixture
def store(tmp_path: Path):
    state = State(tmp_path / "home" / ".hybrid" / "state.db")
    yield AdapterStore(Home(tmp_path / "home"), state)
    state.close()


def other(kind: str = "head", weights: str = "head.safetensors", **card: Any) -> Callable[[Path], dict[str, Any]]:
    """Fills a folder that is no LoRA."""

    def fill(staging: Path) -> dict[str, Any]:
        ones = np.ones(3, np.float32)
        Head(("no", "yes"), np.ones((2, 3), np.float32), ones[:2], ones, ones, 1.0).save(staging)
        return {"kind": kind, "weights": weights, **card}

    return fill


def test_only_a_lora_takes_the_name_or_is_wanted_of_the_engine(store, base):
    store.publish("bank", filling(base))
    store.mark("bank@1", "candidate")
    store.promote("bank", 1)
    head = store.publish("bank", other())
    store.mark(head.id, "candidate")
    assert [v.kind for v in store.versions("bank")] == ["lora", "head"]
    assert [ref.id for ref in store.desired()] == ["bank@1"]
    with pytest.raises(Conflict, match=r"bank@2 is a head; ask for head:bank"):
        store.promote("bank", 2)
    assert store.alias("bank") == 1
    assert store.head("bank").id == "bank@2" == store.head("bank@2").id


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("head", "bank@1 is a head; ask for head:bank."),
        ("weights", "HYBRID_MODEL="),
        ("peft", "of a kind that the engine cannot load"),
        ("prompt", "an instruction"),
    ],
)
def test_another_kind_is_no_model_and_says_how_it_is_served(store, kind, says):
    store.publish("bank", other(kind))
    for spec in ("bank", "bank@1"):
        with pytest.raises(ModelNotFound) as caught:
            store.model(spec)
        assert says in caught.value.message
    assert store.resolve("bank@1").kind == kind


def test_a_card_may_say_how_it_is_served(store):
    version = store.publish("bank", other("weights", serve_with="run it with the other engine"))
    with pytest.raises(ModelNotFound, match=r"bank@1 is a whole model; run it with the other engine\."):
        store.model(version.id)


def test_a_name_with_both_keeps_both(store, base):
    """Retiring the last LoRA frees its name although a head goes on; retiring the head leaves the name alone."""
    store.publish("bank", filling(base))
    store.mark("bank@1", "candidate")
    store.promote("bank", 1)
    for number in (2, 3):
        store.publish("bank", other())
        store.mark(f"bank@{number}", "candidate")
    store.retire("bank", 3)
    assert store.head("bank").id == "bank@2"
    assert store.model("bank").id == "bank@1"
    store.retire("bank", 1)
    assert store.alias("bank") is None
    assert store.head("bank").id == "bank@2"


def test_rollback_never_lands_on_another_kind(store, base):
    for number, fill in enumerate((filling(base), other(), filling(base, seed=2)), 1):
        store.publish("bank", fill)
        store.mark(f"bank@{number}", "candidate")
    store.promote("bank", 1)
    store.promote("bank", 3)
    assert store.rollback("bank") == 1


def test_heads_that_do_not_answer_say_why(store):
    with pytest.raises(ModelNotFound, match="There is no head 'bank'"):
        store.head("bank")
    store.publish("bank", other())
    with pytest.raises(ModelNotFound, match=r"bank@1 does not answer: it is staged\."):
        store.head("bank")
    store.publish("bank", other(features="base", serve_with="it was measured offline"))
    store.mark("bank@2", "candidate")
    with pytest.raises(ModelNotFound, match=r"bank@2 does not answer: it was measured offline"):
        store.head("bank")
    store.mark("bank@1", "candidate")
    assert store.head("bank").id == "bank@1"  # the newest that answers


@pytest.mark.parametrize("weights", ["../x.safetensors", "a/b.safetensors", "", "..", 7, "missing.safetensors"])
def test_a_card_names_a_file_of_its_own_folder(store, weights):
    def fill(staging: Path) -> dict[str, Any]:
        (staging / "head.safetensors").write_bytes(b"")
        return {"kind": "head", "weights": weights}

    with pytest.raises(Refused):
        store.publish("bank", fill)
    assert store.versions() == []


def test_a_lora_still_needs_its_own_file(store):
    with pytest.raises(Refused, match=r"adapter_model\.safetensors is missing"):
        store.publish("bank", other("lora"))


def bad_header(staging: Path) -> dict[str, Any]:
    (staging / "head.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    return {"kind": "head", "weights": "head.safetensors"}


def nan(staging: Path) -> dict[str, Any]:
    save_file({"weight": np.full((2, 3), np.nan, np.float32)}, staging / "head.safetensors")
    return {"kind": "head", "weights": "head.safetensors"}


def text(staging: Path) -> dict[str, Any]:
    (staging / "head.txt").write_text("weights")
    return {"kind": "head", "weights": "head.txt"}


async def test_other_kinds_never_reach_the_engine_and_are_listed_for_what_they_are(tmp_path):
    settings = make_home(tmp_path)
    async with running(settings) as server:
        store = server.gateway.store
        facts = server.gateway.loader._base
        store.publish("bank", filling(facts))
        for kind in ("head", "weights", "peft", "prompt"):
            store.publish(f"a-{kind}", other(kind))
        store.publish("foreign", other("weights", base_sha256="c" * 64))
        store.publish("odd", other("virus"))
        for name, fill in (("cut", bad_header), ("nan", nan), ("text", text)):
            store.publish(name, fill)
        await until(lambda: {v.name: v.state for v in store.versions()}["bank"] == "live")
        await until(lambda: all(v.state in ("candidate", "live", "rejected") for v in store.versions()))
        assert (await server.engine_log())["loads"] == 1  # bank alone
        _, status, _ = await server.get("/v1/status")
        rows = {row["name"]: row for row in status["adapters"]}
        assert {name: row["state"] for name, row in rows.items()} == {
            "bank": "live", "a-head": "candidate", "a-weights": "candidate", "a-peft": "candidate",
            "a-prompt": "candidate", "foreign": "rejected", "odd": "rejected", "cut": "rejected", "nan": "rejected",
            "text": "rejected",
        }  # fmt: skip
        assert rows["a-head"]["kind"] == "head"
        assert rows["a-head"]["reason"] == "ask for head:a-head"
        assert "another base" in rows["foreign"]["reason"]
        _, models, _ = await server.get("/v1/models")
        ids = {model["id"] for model in models["data"]}
        assert {"bank", "bank@1", "head:a-head"} <= ids
        assert not {i for i in ids if i.startswith("a-") or i in ("foreign", "odd", "cut", "nan", "text")}
        for name in ("a-head", "a-head@1", "adapter:a-weights@1", "base:a-peft", "adapter+rag:a-head@1"):
            code, body, _ = await server.post("/v1/chat/completions", chat("hello", model=name))
            assert (code, body["error"]["code"]) == (404, "model_not_found"), name
        assert (
            "ask for head:a-head"
            in (await server.post("/v1/chat/completions", chat("x", model="a-head")))[1]["error"]["message"]
        )


def test_the_command_line_shows_kinds(tmp_path):
    state = State(Home(tmp_path).database)
    store = AdapterStore(Home(tmp_path), state)
    store.publish("bank", other())
    state.close()
    assert "bank@1  head  staged" in hybrid(tmp_path, "adapters", "list").stdout


# --- the life of names -----------------------------------------------------------------------------------------------


async def pieces_of(stream: Any) -> list[str]:
    return [
        chunk.choices[0].delta.content async for chunk in stream if chunk.choices and chunk.choices[0].delta.content
    ]


async def test_A5_A6_a_new_version_answers_at_once_and_the_old_ones_streams_end_on_it(tmp_path):
    async with running(make_home(tmp_path)) as server, server.client() as client:
        store, facts = server.gateway.store, server.gateway.loader._base
        store.publish("bank", filling(facts))
        await until(lambda: store.alias("bank") == 1)
        said = [{"role": "user", "content": "@delay 60ms\nhello"}]
        long = {"stream": True, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
        old = [await client.chat.completions.create(model="bank", messages=said, **long) for _ in range(5)]
        store.publish("bank", filling(facts, seed=2))
        await until(lambda: store.alias("bank") == 2)
        short = [{"role": "user", "content": "hello"}]
        answer = await client.chat.completions.with_raw_response.create(model="bank", messages=short)
        assert "bank@2" in answer.parse().choices[0].message.content
        assert answer.headers["x-hybrid-selected-version"] == "2"
        code, _, _ = await server.post(
            "/v1/unload_lora_adapter", {"lora_name": "bank@1"}, authorization=f"Bearer {TOKEN}"
        )
        assert code == 200
        code, said_, _ = await server.post("/v1/chat/completions", chat("hello", model="bank@1"))
        assert (code, said_["error"]["code"]) == (404, "model_not_found")
        assert server.inflight == 5  # the old streams go on
        answers = await asyncio.gather(*(pieces_of(stream) for stream in old))
        assert all("bank@1" in "".join(pieces) and "bank@2" not in "".join(pieces) for pieces in answers)
        assert {len(pieces) for pieces in answers} == {100}
        name = store.resolve("bank@1").ref.engine_name
        await until(lambda: _unloaded(server, name))
        assert (store.resolve("bank@1").ref.path / "adapter_model.safetensors").exists()


async def _unloaded(server: Any, name: str) -> bool:
    return name not in await server.gateway.engine.loaded()


async def test_A13_a_slow_load_is_one_load_holds_nobody_up_and_is_not_waited_for_without_end(tmp_path):
    slow = {"args": ("--load-delay", "4"), "first_byte_timeout_s": 2}
    async with running(make_home(tmp_path, engine=slow)) as server:
        server.gateway.store.publish("bank", filling(server.gateway.loader._base))

        async def ask(model: str) -> tuple[int, Any, str]:
            status, body, headers = await server.post("/v1/chat/completions", chat("hello", model=model))
            return status, body.get("error", {}).get("message", ""), headers.get("retry-after", "")

        waiting = [asyncio.create_task(ask("bank@1")) for _ in range(3)]
        while not waiting[0].done():
            assert (await ask("base"))[0] == 200
        for status, message, retry_after in await asyncio.gather(*waiting):
            assert (status, "still being loaded" in message) == (503, True)
            assert int(retry_after) >= 1

        async def is_served() -> bool:
            return (await ask("bank@1"))[0] == 200

        await until(is_served)
        assert (await server.engine_log())["loads"] == 1


KILLED = """
import json, os, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from hybrid.adapters.store import AdapterStore
from hybrid.rooms import Home
from hybrid.settings import EngineSettings
from hybrid.state import State, audit
from hybrid.types.request import Message

home, last = Home(Path(sys.argv[1])), int(sys.argv[2])

def promote(at):
    state = State(home.database)
    store = AdapterStore(home, state)
    done = 0
    def count(*_):
        nonlocal done
        done += 1
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)
    for moment in ("before_cursor_execute", "after_cursor_execute", "commit"):
        event.listen(Engine, moment, count)
    store.promote("bank", 3 - (store.alias("bank") or 2))

for at in range(1, last):
    if not (child := os.fork()):
        promote(at)
        os._exit(0)
    print(json.dumps([at, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]), flush=True)
"""


def test_D9_a_kill_during_promote_leaves_the_alias_old_or_new(tmp_path, store, base):
    """Killed before and after every statement and before the commit: alias, states and audit always agree."""
    for seed in (1, 2):
        store.publish("bank", filling(base, seed=seed))
        store.mark(f"bank@{seed}", "candidate")
    store.promote("bank", 1)
    script = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "home"), "40"], stdout=subprocess.PIPE, text=True
    )
    ends = [json.loads(line)[1] for line in script.stdout]
    assert script.wait() == 0
    store.refresh()
    state = State(tmp_path / "home" / ".hybrid" / "state.db")
    with state.transaction() as connection:
        moves = list(connection.scalars(select(audit.c.detail).where(audit.c.what == "promote")))
    state.close()
    assert ends.count(-9) >= 8
    assert ends[-1] == 0  # beyond the last statement nothing is killed
    assert store.revision("bank") == len(moves)
    assert store.alias("bank") == moves[-1]["version"]
    assert [m["previous"] for m in moves[1:]] == [m["version"] for m in moves[:-1]]
    assert [v.version for v in store.versions("bank") if v.state == "live"] == [store.alias("bank")]


ABANDONED = """
import os, signal, sys
from pathlib import Path
from hybrid.rooms import publish

with publish(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_publication_left_is_swept_and_one_under_way_is_not(tmp_path, store, base):
    room = tmp_path / "home" / "adapters" / "bank"
    subprocess.run([sys.executable, "-c", ABANDONED, str(room / "9")], check=False)
    (left,) = room.glob(".staging-*")
    reopened = State(tmp_path / "home" / ".hybrid" / "state.db")
    long_ago = time.time() - 7200

    def fill(staging: Path) -> dict[str, Any]:
        card = filling(base)(staging)
        for folder in (left, staging):
            os.utime(folder, (long_ago, long_ago))
        AdapterStore(Home(tmp_path / "home"), reopened)
        assert not left.exists()
        assert staging.exists()
        return card

    AdapterStore(Home(tmp_path / "home"), reopened)
    assert left.exists()  # too young to tell
    assert store.publish("bank", fill).id == "bank@1"
    reopened.close()
