"""Evaluations in the background of a server, the reports over HTTP, and the tab Evaluate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Served, start_server, stop_server
from gradio_client import Client as Page
from server_kit import TOKEN, make_home, running, until
from yarl import URL

from hybrid.errors import Forbidden, HybridError, NotFound, Unauthorized
from hybrid.evaluation.gallery import list_examples, read_example
from hybrid.lifecycle.evaluator import Pace
from hybrid.ui.client import Client
from hybrid.ui.sides import evaluation_facts, examples_table, ordered, plan_facts, side_by_side, verdict

EVIL = "<img src=x onerror=alert(1)>"
COLOURS = ("red", "green", "blue")
ARMS = ["prompt", "base"]


def make_task(folder: Path, n: int = 6, slow: str = "") -> Path:
    """A closed task whose answers the scripted engine takes its time for."""
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": folder.name, "metric": "token_f1", "instruction": ""}))
    for split in ("dev", "test"):
        asked = [(f"{split}-{i}", f"{split} thing {i} {slow}", COLOURS[i % 3]) for i in range(n)]
        rows = [dict(zip(("id", "input", "reference"), row, strict=True)) for row in asked]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_served(home: Path) -> Served:
    settings = make_home(home)
    (home / "hybrid.toml").write_text(f'model = "{settings.model}"\n')
    return start_server(home, "--engine", "scripted", "--no-quickstart")


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("face")
    make_task(home / "eval" / "tasks" / "colours")
    make_task(home / "eval" / "tasks" / "slow", n=200, slow="@delay 50ms")
    make_task(home.parent / "elsewhere")
    (home / "eval" / "suites").mkdir()
    (home / "eval" / "suites" / "small.toml").write_text(
        f'tasks = ["eval/tasks/colours"]\narms = {json.dumps(ARMS)}\nlimit = 4\n'
    )
    served = make_served(home)
    yield served
    assert stop_server(served) == 0


async def ended(client: Client, row_id: str) -> dict[str, Any]:
    """An evaluation once it has come to its end."""

    async def over() -> bool:
        return (await client.evaluation("", row_id))["status"] not in ("queued", "running")

    await until(over, 120)
    return await client.evaluation("", row_id)


async def asks(client: Client, row_id: str) -> dict[str, Any]:
    """An evaluation once it has answers."""

    async def under_way() -> bool:
        row = await client.evaluation("", row_id)
        return row["progress"].get("phase") == "asking" and row["progress"]["step"] > 0

    await until(under_way, 120)
    return await client.evaluation("", row_id)


# --- over HTTP -------------------------------------------------------------------------------------------------------


async def test_a_suite_is_run_watched_and_read(face: Served) -> None:
    client = Client(face.url)
    known = await client.suites("")
    assert [row["name"] for row in known["suites"]] == ["small"]
    assert {row["path"] for row in known["tasks"]} >= {"eval/tasks/colours", "eval/tasks/slow"}
    planned = await client.plan("", {"suite": "small"})
    assert planned["questions"] == planned["open"] == 8

    row = await client.evaluate("", {"suite": "small"})
    assert (row["split"], row["report"]) == ("dev", "small-dev")
    done = await ended(client, row["id"])
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert (done["progress"]["step"], done["progress"]["steps"]) == (8, 8)

    listed = (await client.reports(""))[0]
    assert (listed["name"], listed["split"], listed["tasks"]) == ("small-dev", "dev", {"colours": 4})
    report = await client.report("", "small-dev")
    assert set(report["overall"]) == set(ARMS)
    examples = await client.examples("", "small-dev", "colours")
    assert len(examples) == 4
    one = await client.example("", "small-dev", "colours", examples[0]["id"])
    assert {answer["arm"] for answer in one["answers"]} == set(ARMS)
    assert one["reference"] in COLOURS
    async with aiohttp.ClientSession(face.url) as http, http.get("/v1/reports/small-dev/report.html") as answer:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "Leaderboard" in await answer.text()


async def test_an_evaluation_is_cancelled_and_goes_on_when_asked_again(face: Served) -> None:
    client = Client(face.url)
    order = {"tasks": ["eval/tasks/slow"], "arms": ["prompt"], "name": "slow"}
    row = await client.evaluate("", order)
    with pytest.raises(HybridError, match="already"):
        await client.evaluate("", order)
    await asks(client, row["id"])
    await client.end_evaluation("", row["id"])
    assert (await ended(client, row["id"]))["status"] == "cancelled"
    kept = (face.home / "eval" / "reports" / "slow" / "outcomes.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 200
    assert (await client.plan("", order))["open"] == 200 - len(kept)
    assert (await client.end_evaluation("", row["id"]))["status"] == "cancelled"


@pytest.mark.parametrize(
    "order",
    [
        {"tasks": ["../elsewhere"]},
        {"tasks": ["eval/tasks/../../../elsewhere"]},
        {"tasks": ["/etc"]},
        {"tasks": ["eval/tasks/colours"], "name": "../../x"},
        {"tasks": ["eval/tasks/colours\0"]},
        {"tasks": ["eval/tasks/colours"], "limit": 0},
        {"tasks": ["eval/tasks/colours"], "arms": ["a,b"]},
        {"tasks": ["eval/tasks/colours"], "split": "train"},
        {"suite": "../suites/small"},
        {"suite": "small", "tasks": ["eval/tasks/colours"]},
        {},
    ],
)  # fmt: skip
async def test_what_lies_elsewhere_or_is_nonsense_is_refused(face: Served, order: dict[str, Any]) -> None:
    with pytest.raises(HybridError) as refused:
        await Client(face.url).evaluate("", order)
    assert "broke" not in refused.value.message


@pytest.mark.parametrize("name", ["..", ".", "%2e%2e", "..%2f..%2fhybrid.toml", "none", "a%00b"])
async def test_a_report_is_a_folder_of_this_home(face: Served, name: str) -> None:
    async with aiohttp.ClientSession() as http:
        for path in ("", "/report.html", "/examples?task=colours"):
            async with http.get(URL(f"{face.url}/v1/reports/{name}{path}", encoded=True)) as answer:
                assert answer.status in (400, 404)


async def test_a_key_that_only_asks_evaluates_nothing_and_reads_no_report(tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server:
        client, key = Client(server.url), server.keys().create("alice")["key"]
        with pytest.raises(Unauthorized):
            await client.reports("")
        for refused in (client.reports(key), client.suites(key), client.evaluate(key, {"suite": "small"})):
            with pytest.raises(Forbidden):
                await refused
        assert await client.reports(TOKEN) == await client.evaluations(TOKEN) == []


# --- through the page ------------------------------------------------------------------------------------------------


async def test_the_tab_plans_runs_and_shows_every_answer(face: Served) -> None:
    page = await asyncio.to_thread(Page, face.url, verbose=False)

    async def do(verb: str, /, **values: Any) -> Any:
        return await asyncio.to_thread(page.predict, **values, key="", api_name=verb)

    order = {"what": "eval/tasks/colours", "arms": ARMS, "split": "test", "limit": "3", "name": "by-hand"}
    assert "6 of 6 answers" in await do("/plan", **order)
    assert "Choose a suite" in await do("/evaluate", **{**order, "what": None})
    assert "whole number" in await do("/evaluate", **{**order, "limit": "many"})
    assert "Started by-hand" in await do("/evaluate", **order)
    client = Client(face.url)
    assert (await ended(client, (await client.evaluations(""))[0]["id"]))["status"] == "succeeded"

    told, board, *_ = await do("/report", name="by-hand")
    assert "held out" in told
    assert 'href="/v1/reports/by-hand/report.html"' in told
    assert "Leaderboard" in board
    assert "<svg" in board
    rows, sides = await do("/examples", name="by-hand", task="colours", order="arms disagree most")
    assert rows.count("data-pick") == 3
    assert sides.count("hy-side ") == 2
    assert "test thing" in sides
    assert "no report" in (await do("/report", name="never"))[0]


def test_S17_reports_evaluations_and_answers_show_text_alone() -> None:
    answer = {
        "arm": EVIL, "score": 0.5, "answer": EVIL, "error": None, "chosen": EVIL, "latency_ms": 1.0,
        "tokens": {"prompt": 1, "completion": 1}, "passages": [EVIL],
    }  # fmt: skip
    example = {"task": EVIL, "id": EVIL, "input": EVIL, "reference": EVIL, "texts": True, "answers": [answer]}
    row = {"id": EVIL, "input": EVIL, "scores": {EVIL: 0.5}, "mean": 0.5, "disagreement": 0.0}
    order = {"report": EVIL, "status": EVIL, "split": EVIL, "progress": {"phase": EVIL}, "error": {"message": EVIL}}
    report = {"split": EVIL, "tasks": {}, "base_model": EVIL, "gate": EVIL, "winner": {}, "router": {}}
    part = {"kind": EVIL, "open": 1, "questions": 1, "minutes": 1.0}
    plan = {"corpora": {EVIL: 1.0}, "adapters": {EVIL: 1.0}, "parts": [part], "open": 1, "questions": 1, "minutes": 1.0}
    failed = {**example, "answers": [{**answer, "error": EVIL}]}
    painted = side_by_side(example) + side_by_side(failed) + examples_table([row]) + evaluation_facts(order)
    assert "<img" not in painted + verdict(EVIL, report) + plan_facts(plan)


def test_where_arms_disagree_most_comes_first() -> None:
    rows = [
        {"id": str(i), "mean": mean, "disagreement": d} for i, (mean, d) in enumerate([(0, 0), (0.5, 0.25), (1, 0)])
    ]
    assert [row["id"] for row in ordered(rows, "arms disagree most")] == ["1", "0", "2"]
    assert [row["id"] for row in ordered(rows, "lowest scores first")] == ["0", "1", "2"]


def test_a_report_without_texts_still_shows_who_was_right(tmp_path: Path) -> None:
    facts = {"adapter": None, "answer": "", "latency_ms": 1.0, "prompt_tokens": 1, "completion_tokens": 1, "calls": 1}
    scores = {"a": (1.0, 1.0), "b": (1.0, 0.0)}
    rows = [
        {"task": "t", "id": name, "arm": arm, "score": score, **facts}
        for name, pair in scores.items()
        for arm, score in zip(ARMS, pair, strict=True)
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list_examples(tmp_path, "t")
    assert [(row["id"], row["disagreement"]) for row in found] == [("a", 0.0), ("b", 0.25)]
    assert "1 of 2" in examples_table(found)
    shown = side_by_side(read_example(tmp_path, "t", "b"))
    assert "without texts" in shown
    assert shown.index("✓ right") < shown.index("✗ wrong")
    with pytest.raises(NotFound):
        read_example(tmp_path, "t", "c")
    with pytest.raises(NotFound):
        list_examples(tmp_path, "u")


# --- after a crash ---------------------------------------------------------------------------------------------------


async def test_a_server_that_was_killed_goes_on_with_its_evaluation(tmp_path: Path) -> None:
    make_task(tmp_path / "eval" / "tasks" / "slow", n=40, slow="@delay 30ms")
    first = make_served(tmp_path)
    row = await Client(first.url).evaluate("", {"tasks": ["eval/tasks/slow"], "arms": ["prompt"]})
    await asks(Client(first.url), row["id"])
    first.process.kill()
    first.process.wait()
    ledger = tmp_path / "eval" / "reports" / "slow-dev" / "outcomes.jsonl"
    second = make_served(tmp_path)
    done = await ended(Client(second.url), row["id"])
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert len(ledger.read_text().splitlines()) == 40
    assert await asyncio.to_thread(stop_server, second) == 0


def test_the_time_left_follows_the_phase() -> None:
    pace = Pace()
    pace.hear(b"no json\n", 0.0)
    assert pace.progress == {}
    pace.hear(b'{"phase": "asking", "step": 100, "steps": 200}', 10.0)
    assert pace.progress == {"phase": "asking", "step": 100, "steps": 200}
    pace.hear(b'{"phase": "asking", "step": 110, "steps": 200}', 15.0)
    assert pace.progress["eta_s"] == 45.0
    pace.hear(b'{"phase": "training x", "step": 1, "steps": 2}', 20.0)
    assert "eta_s" not in pace.progress
