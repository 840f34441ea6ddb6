"""The benchmarks, through the command, against a server of this home over the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import uvicorn
from adapters_kit import make_adapter
from aiohttp import web
from aiohttp.test_utils import TestServer
from conftest import Served, hybrid, start_server, stop_server
from server_kit import make_home, until
from tiny_model import make_tiny_model
from training_kit import write_colours
from typer.main import get_command

from hybrid import reach
from hybrid.adapters.preflight import read_base
from hybrid.adapters.store import AdapterStore
from hybrid.bench import BENCHMARKS, hotload
from hybrid.bench import eval as bench_eval
from hybrid.bench import train as bench_train
from hybrid.bench.contest import WARM_UP, Plan, Row, drawn, tokens_of
from hybrid.bench.result import ratio
from hybrid.bench.routing import Owned, wilson
from hybrid.cli.bench import app
from hybrid.engine.scripted import Server as ScriptedServer
from hybrid.errors import BadRequest, DataError, SetupError
from hybrid.rooms import Home
from hybrid.state import State
from hybrid.training.recipes import Recipe


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_ENGINE__KIND", "scripted")
        yield patch


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, environment: pytest.MonkeyPatch) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("bench-home")
    make_home(home)
    environment.setenv("HYBRID_MODEL", str(home / "base"))
    served = start_server(home, "--no-ui", "--no-quickstart", timeout_s=120)
    yield served
    assert stop_server(served) == 0


@pytest.fixture(scope="module")
def store(served: Served) -> AdapterStore:
    """The server's store, with one adapter that it has taken in."""
    store = AdapterStore(Home(served.home), State(Home(served.home).database))
    base = read_base(served.home / "base", "b" * 64)
    store.adopt("bank", make_adapter(served.home / "peft", base))
    hybrid(served.home, "ask", "Hello", "--model", "bank@1")  # settles the version, and waits for it
    store.refresh()
    return store


def bench(home: Path, *args: str) -> dict:
    done = hybrid(home, "bench", *args, "--json")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_embed_tells_speed_and_recall_beside_the_reference(tmp_path: Path) -> None:
    source, crops = tmp_path / "farm", ("barley", "cabbage", "clover", "hops", "flax", "rye")
    source.mkdir()
    rows = ({"id": f"p{i}", "title": crop, "text": f"Field {i} grows {crop}."} for i, crop in enumerate(crops))
    (source / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"input": f"Where does {crop} grow?", "meta": {"gold_passages": [f"p{i}"]}} for i, crop in enumerate(crops)
    ]
    (source / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = bench(tmp_path, "embed", str(source), "--rounds", "2", "--questions", "4")
    ours, theirs = found["rows"]
    assert ours["recall@5"] == theirs["recall@5"] == 1
    assert all(row["passages_per_s"] > 0 and row["question_ms"] > 0 for row in (ours, theirs))
    told = found["summary"]
    assert (told["passages"], told["questions"]) == (6, 4)
    assert told["shared_top_5"] > 0.7
    assert 0 <= told["cosine_distance"] < 1e-3
    assert [goal["met"] for goal in found["goals"] if goal["what"].startswith(("largest", "recall"))] == [True, True]


def test_embed_asks_passages_where_there_are_no_questions(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("wind", "rain", "snow"):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"A day of {name} is a day at home.")
    found = bench(tmp_path, "embed", str(tmp_path / "docs"), "--rounds", "1")
    assert found["summary"]["questions"] == 3
    assert not any("recall" in key for row in found["rows"] for key in row)


def make_task(folder: Path, inputs: list[str]) -> Path:
    folder.mkdir()
    (folder / "task.json").write_text(
        json.dumps({"name": folder.name, "instruction": "Say hello.", "metric": "accuracy"})
    )
    rows = ({"id": str(i), "input": text, "reference": "x"} for i, text in enumerate(inputs))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_benchmark_is_a_command_and_is_listed(tmp_path: Path) -> None:
    listed = {row["name"]: row["description"] for row in bench(tmp_path, "list")["benchmarks"]}
    assert listed == {name: benchmark.description for name, benchmark in BENCHMARKS.items()}
    assert set(get_command(app).commands) == {*BENCHMARKS, "list"}  # type: ignore[attr-defined]


def test_routing_counts_what_the_gate_chose(served: Served, store: AdapterStore, tmp_path: Path) -> None:
    greetings = [f"Good morning number {i}, how are you?" for i in range(8)]
    mine, other = make_task(tmp_path / "mine", greetings), make_task(tmp_path / "other", greetings[:3])
    found = bench(
        served.home, "routing", "--task", f"{mine}=prompt,base", "--task", f"{other}=bank", "--limit", "5", "--bare"
    )
    first, second = found["rows"]
    assert (first["task"], first["n"], first["share"], first["confused"]) == ("mine", 5, 1.0, {})
    assert (second["task"], second["n"], second["right"], sum(second["confused"].values())) == ("other", 3, 0, 3)
    assert found["summary"]["right"] == 5
    assert found["summary"]["ci95"] == wilson(5, 8)
    assert 0 < first["route_ms"]["p50"] <= first["route_ms"]["p95"]
    share, _ = found["goals"]
    assert (share["value"], share["limit"], share["met"]) == (0.625, 0.97, False)


def test_routing_says_what_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="DIR=ARM"):
        Owned.parse("folder")
    assert Owned.parse("folder=bank, rag:facts") == Owned(Path("folder"), frozenset(["adapter:bank", "rag:facts"]))


def test_wilson_is_the_score_interval() -> None:
    assert wilson(195, 200) == [0.9428, 0.9893]
    assert wilson(0, 10)[0] == 0.0


async def test_hotload_publishes_while_streams_run_and_cleans_up(served: Served, store: AdapterStore) -> None:
    found = await asyncio.to_thread(bench, served.home, "hotload", "--streams", "3", "--repeat", "2")
    names = [row["adapter"] for row in found["rows"]]
    assert len(set(names)) == 2
    assert all(name.startswith("bench-") for name in names)
    summary = found["summary"]
    assert (summary["copied"], summary["failed"], summary["stalled"]) == ("bank@1", 0, 0), summary
    assert summary["finished"] >= 3
    assert found["goals"][0]["met"]
    store.refresh()
    assert store.names() == ["bank"]

    def forgotten() -> bool:
        return {row["name"] for row in served.get("/v1/status")["adapters"]} == {"bank"}

    await until(forgotten)
    assert not list((served.home / "adapters").glob("bench-*"))


async def test_hotload_tells_streams_that_break_from_those_that_stall(
    served: Served, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotload, "STALL_S", 0.3)
    asked = itertools.count()

    async def chat(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            await asyncio.sleep(1)
            return web.json_response({"choices": []})
        number = next(asked)
        if number == 0:
            return web.json_response({"error": {"message": "full", "code": "overloaded"}}, status=503)
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(b"data: {}\n\n")
        if number == 1:
            await asyncio.sleep(5)
        await answer.write(b'data: {"error": {"message": "broke off"}}\n\n' if number == 2 else b"data: [DONE]\n\n")
        await asyncio.sleep(0.05)
        return answer

    fake = web.Application()
    fake.router.add_post("/v1/chat/completions", chat)
    async with TestServer(fake) as server:
        broken = reach.Server(str(server.make_url("")), served.process.pid, "")
        result = await hotload.measure(broken, store, adapter="bank", streams=3, repeat=1, progress=lambda *_: None)
    summary = result.summary
    assert (summary["failed"], summary["stalled"]) == (2, 1), summary
    assert summary["finished"] > 3
    assert any("broke off" in reason for reason in summary["reasons"])
    assert not result.goals[0].met
    assert not list((served.home / "adapters").glob("bench-*"))


def test_startup_starts_stops_and_tells_when(served: Served, tmp_path: Path) -> None:
    done = hybrid(tmp_path, "bench", "startup", "--repeat", "1", "--no-ui", "--json")
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert 0 < row["livez_s"] <= row["readyz_s"] <= row["first_token_s"]
    assert 0 < row["engine_begun_s"] < row["readyz_s"], "the engine starts before the server is ready"
    assert found["summary"]["engine"] == "scripted"
    assert not list(tmp_path.iterdir()), "a benchmark writes nothing but its result"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task that the tiny model learns at once; the commands train that model."""
    monkeypatch.setenv("HYBRID_MODEL", str(make_tiny_model(tmp_path / "tiny").path))
    task = make_task(tmp_path / "mine", [])
    for split, start, count in (("train", 0, 40), ("dev", 100, 6)):
        rows = (
            {"id": f"{split}{n}", "input": f"item {n}" + "!" * (n % 7), "reference": "red"}
            for n in range(start, start + count)
        )
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "test.jsonl").unlink()
    return task


def test_a_training_survives_being_killed(tmp_path: Path, mine: Path) -> None:
    sets = ("--set", "batch_size=4", "--set", "rank=4", "--set", "epochs=4", "--set", "early_stop=false")
    found = bench(tmp_path, "survive", str(mine), "--kills", "2", *sets)
    assert [row["kill"] for row in found["rows"]] == [1, 2]
    assert found["rows"][1]["killed_at_step"] > found["rows"][0]["killed_at_step"]
    assert found["summary"]["killed"]["steps"] == found["summary"]["in_peace"]["steps"] == 40
    assert all(goal["met"] for goal in found["goals"]), found


def test_train_compares_trainers_on_the_same_rows(tmp_path: Path, mine: Path) -> None:
    sets = ("--set", "batch_size=4", "--set", "rank=4", "--set", "learning_rate=0.02")
    found = bench(
        tmp_path, "train", str(mine), "--tokens", "2000", "--rounds", "3", "--out", str(tmp_path / "out"), *sets
    )
    written = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {key: written[key] for key in found} == found
    assert (tmp_path / "out" / "train.png").read_bytes().startswith(b"\x89PNG")
    slices = written["slices"]
    assert [row["trainer"] for row in found["rows"]] == list(slices) == ["hybrid", "trl", "plain"]
    totals = {sum(one["tokens"] for one in ones) for ones in slices.values()}
    assert len(totals) == 1, "all learn equally many tokens"
    assert totals.pop() >= 2000
    assert [one["tokens"] for one in slices["hybrid"]] == [one["tokens"] for one in slices["plain"]]
    for row in found["rows"]:
        assert row["dev_loss"] < found["summary"]["dev_loss_before"] - 0.5, "each has learned"
        assert row["peak_mb"] > 100
    near = {one["trainer"]: one["dev_loss"] for one in found["rows"]}
    assert near["hybrid"] == pytest.approx(near["plain"], abs=0.05), "the same batches from the same weights"
    assert {name: len(times["ci95"]) for name, times in found["summary"]["times"].items()} == {"trl": 2, "plain": 2}
    assert [goal["limit"] for goal in found["goals"]] == [6.0, bench_train.EQUAL, 1.0, 1.5, bench_train.EQUAL, 1.0]


@contextlib.asynccontextmanager
async def scripted_server() -> AsyncIterator[tuple[str, ScriptedServer]]:
    """A scripted engine at a URL, and what reached it."""
    scripted = ScriptedServer("base", 2048, 32)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(scripted.app(), log_config=None))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve([listener]))
        await until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", scripted
        server.should_exit = True
        await task


async def test_eval_asks_both_sides_the_same_and_nothing_twice(tmp_path: Path) -> None:
    task = make_task(tmp_path / "colours", [])
    write_colours(task, train=(0, 20), dev=(100, 4), test=(200, 2))
    async with scripted_server() as (url, scripted):
        settings = make_home(tmp_path / "home", engine={"kind": url})
        result = await bench_eval.measure(
            settings, [task], arms=bench_eval.ARMS, limit=2, rounds=2, out=tmp_path / "out", progress=lambda *_: None
        )
        asked = [row["body"] for row in scripted.log.requests if "cache_salt" in row["body"]]
    sides: dict[str, list[str]] = {}
    for body in asked:
        sides.setdefault(body["cache_salt"], []).append(json.dumps({**body, "cache_salt": ""}, sort_keys=True))
    ours, engine = sides.values()
    assert sorted(ours) == sorted(engine), "the same prompts, the same sampling"
    assert len(set(ours)) == len(ours) == 2 * 3 * 2, "and every one once"
    assert sum("item 100 is red" in body for body in ours) == 2, "one an arm"
    assert max(len(body["messages"]) for body in asked) == 1 + 2 * settings.gate.few_shot_k

    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert {key: written[key] for key in result.wire()} == json.loads(json.dumps(result.wire()))
    assert [len(turns) for arm in written["turns"].values() for turns in arm.values()] == [2] * 4
    assert [row["arm"] for row in result.rows] == list(bench_eval.ARMS)
    for row in result.rows:
        low, high = row["ci95"]
        assert 0 < low <= row["times"] <= high
    assert result.goals[-1].met, "equal prompts"


def test_eval_is_a_command(served: Served, tmp_path: Path) -> None:
    found = bench(tmp_path, "eval", "--arms", "prompt", "--limit", "2", "--rounds", "1")
    assert found["summary"]["tasks"] == ["tickets", "orders_sql"]
    assert [goal["limit"] for goal in found["goals"]] == [bench_eval.GOAL, 0]
    assert not list(tmp_path.iterdir()), "a benchmark writes nothing but its result"


async def test_eval_says_which_rows_are_too_few(tmp_path: Path) -> None:
    task = make_task(tmp_path / "colours", [])
    write_colours(task, train=(0, 20), dev=(100, 4), test=(200, 2))
    settings = make_home(tmp_path / "home")
    with pytest.raises(DataError, match="has 6 rows in dev and test"):
        await bench_eval.measure(
            settings, [task], arms=["prompt"], limit=3, rounds=2, out=None, progress=lambda *_: None
        )
    with pytest.raises(BadRequest, match="Not measured here: rag"):
        await bench_eval.measure(settings, [], arms=["rag"], limit=1, rounds=1, out=None, progress=lambda *_: None)


def test_rows_are_drawn_for_equal_rounds() -> None:
    rows = [Row((n,) * 9, (1,), (), "") for n in range(7)]
    found = drawn(rows, Recipe(batch_size=4), tokens=200, rounds=3)
    steps = len(found) // 4 - WARM_UP
    assert len(found) % 4 == 0
    assert steps % 3 == 0
    assert tokens_of(found[WARM_UP * 4 :]) >= 200
    assert sorted(found[:7], key=lambda row: row.prompt) == rows, "an epoch is whole before the next begins"


def test_a_ratio_is_of_rounds_that_belong_together() -> None:
    noisy = ratio([100, 10, 50, 20], [50, 5, 25, 10])
    assert noisy == {"median": 2.0, "ci95": [2.0, 2.0]}
    low, high = ratio([100, 100, 100, 100], [50, 40, 25, 20])["ci95"]
    assert 2.0 <= low < high <= 5.0


async def test_a_trainer_that_dies_is_told_in_its_own_words(tmp_path: Path) -> None:
    plan = Plan("nobody", "", "tiny", "", {}, tokens=1, rounds=1, folder=str(tmp_path))
    async with bench_train.child(plan) as contestant:
        with pytest.raises(SetupError, match=r"(?s)'nobody' ended.*KeyError"):
            await contestant.hear()


def test_rivals_are_known_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match="no rival 'keras'"):
        bench_train.check(["keras"])
    monkeypatch.setattr(bench_train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="pip install trl"):
        bench_train.check(["plain", "trl"])


def test_a_table_for_people(served: Served, store: AdapterStore, tmp_path: Path) -> None:
    task = make_task(tmp_path / "mine", ["Good morning"])
    said = hybrid(served.home, "bench", "routing", "--task", f"{task}=prompt").stdout
    header, row = said.splitlines()[:2]
    assert header.split()[:4] == ["task", "n", "right", "share"]
    assert row.split()[:2] == ["mine", "1"]
    assert "goal ≥ 0.97" in said
