"""Measuring: task folders with every fault found, runs that survive a kill, statistics that agree with the libraries,
and adapters that are measured and left alone by `auto` when they are worse than no training.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_kit import filling
from scipy.stats import binomtest
from server_kit import make_home, running, until
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from hybrid.adapters.preflight import read_base
from hybrid.cli import app
from hybrid.cli.eval import evaluate
from hybrid.errors import DataError
from hybrid.evaluation import report, statistics
from hybrid.evaluation.measured import Measured
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.runner import sample, token_limit
from hybrid.evaluation.tasks import check_task, learnable, read_split, read_task
from hybrid.evaluation.words import markdown
from hybrid.lifecycle.measure import Measurement, Measuring, measure, usable
from hybrid.prompts import task_message
from hybrid.settings import Settings
from hybrid.types.outcome import Outcome

INSTRUCTION = "Name the colour."
COLOURS = ["red", "green", "blue"]


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def make_task(folder: Path, n: int = 12, slow: str = "", **facts: Any) -> Path:
    """A closed task: what a thing is called tells its colour."""
    folder.mkdir(parents=True)
    task = {"name": folder.name, "instruction": INSTRUCTION, "metric": "accuracy", "labels": COLOURS, **facts}
    (folder / "task.json").write_text(json.dumps(task, indent=1))
    for split in ("train", "dev", "test"):
        rows = [
            {"id": f"{split}-{i}", "input": f"{split} thing {i} {slow}", "reference": COLOURS[i % 3], "meta": {}}
            for i in range(n)
        ]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


# --- task folders --------------------------------------------------------------------------------------------------


def test_a_sound_task_is_in_order(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tasks", "check", str(make_task(tmp_path / "colours")), "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (0, True)
    assert told["rows"] == {"train.jsonl": 12, "dev.jsonl": 12, "test.jsonl": 12}


def test_the_real_tasks_are_in_order(data: Path) -> None:
    for folder in sorted(p.parent for p in data.glob("*/task.json")):
        assert check_task(folder).complaints == (), folder.name


def test_every_fault_is_named_with_its_line(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "colours")
    write_lines(
        folder / "dev.jsonl",
        [
            {"id": "d1", "input": "one", "reference": "red"},
            "{not json",
            "",
            {"id": "d1", "input": "two", "reference": "red"},
            {"id": "d5", "input": "  ", "reference": "red"},
            {"input": "six", "reference": "red"},
            {"id": "d7", "input": "seven"},
            {"id": "d8", "input": "eight", "reference": "mauve"},
            {"id": "d9", "input": "Train  THING 3 ", "reference": "red"},
            {"id": "d10", "input": "ten", "reference": 5},
            {"id": "d11", "input": "eleven", "reference": "red", "meta": {"gold_passages": ["p1", "p9"]}},
            {"id": "train-4", "input": "twelve", "reference": "red"},
            ["a list"],
            {"id": "d14", "input": "fourteen", "reference": "red", "meta": {"references": "red"}},
        ],
    )
    write_lines(
        folder / "corpus.jsonl",
        [
            {"id": "p1", "title": "", "text": "words"},
            {"id": "p1", "text": "again"},
            {"id": "p2", "title": "x", "text": ""},
            {"title": "y", "text": "z"},
        ],
    )
    (folder / "test.jsonl").unlink()
    found = {(c.file, c.line): c.message for c in check_task(folder).complaints}
    for line, word in [
        (2, "not valid JSON"), (4, "dev.jsonl:1"), (5, "`input`"), (6, "`id`"), (7, "`reference`"), (8, "labels"),
        (9, "train.jsonl:4"), (10, "`reference` is a string"), (11, "'p9'"), (12, "train.jsonl:5"), (13, "JSON object"),
        (14, "`meta.references`"),
    ]:  # fmt: skip
        assert word in found["dev.jsonl", line], (line, found)
    assert ("dev.jsonl", 1) not in found
    assert ("dev.jsonl", 3) not in found
    assert "line 1" in found["corpus.jsonl", 2]
    assert "`text`" in found["corpus.jsonl", 3]
    assert "`id`" in found["corpus.jsonl", 4]
    assert ("test.jsonl", 0) in found


@pytest.mark.parametrize(
    ("facts", "row", "word"),
    [
        ({"metric": "bleu"}, {}, "'bleu' is unknown"),
        ({"metric": "numeric", "labels": []}, {"reference": "many"}, "no number"),
        ({"metric": "json_f1", "labels": []}, {"reference": "[1]"}, "no JSON object"),
        ({"metric": "ifeval", "labels": []}, {"meta": {"instruction_id_list": ["no:such"], "kwargs": [{}]}}, "no:such"),
        ({"metric": "ifeval", "labels": []}, {"meta": {}}, "instruction_id_list"),
        ({"labels": ["red", "red", "green", "blue"]}, {}, "twice"),
        ({"instruction": 5}, {}, "`instruction`"),
        ({}, {"meta": {"gold_passages": ["p"]}}, "no corpus.jsonl"),
    ],
)
def test_facts_and_metrics_are_checked(tmp_path: Path, facts: dict, row: dict, word: str) -> None:
    folder = make_task(tmp_path / "colours", **facts)
    write_lines(folder / "dev.jsonl", [{"id": "d", "input": "one", "reference": "red", **row}])
    assert any(word in str(c) and c.line for c in check_task(folder).complaints), check_task(folder).complaints


def test_a_bad_row_stops_a_run_with_its_line(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "colours")
    with (folder / "test.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"test\.jsonl:13"):
        read_split(read_task(folder), "test")


def test_the_command_complains_and_exits_with_1(tmp_path: Path) -> None:
    folder = make_task(tmp_path / "colours", metric="bleu")
    assert CliRunner().invoke(app, ["tasks", "check", str(folder)]).exit_code == 1
    done = CliRunner().invoke(app, ["tasks", "check", str(folder), "--json"])
    assert done.exit_code == 1
    complaints = json.loads(done.stdout)["complaints"]
    assert [(c["file"], c["line"]) for c in complaints] == [("task.json", 4)]
    assert "bleu" in complaints[0]["message"]


def test_a_test_split_is_not_learned_from(tmp_path: Path) -> None:
    task = read_task(make_task(tmp_path / "colours"))
    assert len(learnable(read_split(task, "dev"))) == 12
    with pytest.raises(DataError, match="test split"):
        learnable(read_split(task, "test"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="test split"):
        token_limit([read_split(task, "test")], len)  # type: ignore[list-item]
    probe = tmp_path / "probe.py"
    probe.write_text(
        "from hybrid.evaluation.tasks import TestSplit, DevSplit, learnable\n"
        "def good(split: DevSplit) -> None: learnable(split)\n"
        "def bad(split: TestSplit) -> None: learnable(split)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", "--ignore-missing-imports", probe],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert "probe.py:3" in done.stdout, done.stdout
    assert "arg-type" in done.stdout
    assert "probe.py:2" not in done.stdout


def test_room_for_answers_follows_the_references(tmp_path: Path) -> None:
    task = read_task(make_task(tmp_path / "colours"))
    assert token_limit([read_split(task, "train")], lambda text: 1) == 18
    assert token_limit([read_split(task, "train")], lambda text: 100) == 166
    assert token_limit([read_split(task, "train")], lambda text: 9000) == 512
    assert token_limit([], len) == 512


def test_larger_samples_hold_the_smaller() -> None:
    examples = [Example(str(i), "x") for i in range(50)]
    few, more = sample(examples, 10, 3), sample(examples, 20, 3)
    assert len(few) == 10
    assert {e.id for e in few} < {e.id for e in more}
    assert [e.id for e in more] == sorted((e.id for e in more), key=int)
    assert sample(examples, 10, 4) != few


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (37, 50), (1, 200)])
def test_rates_get_wilsons_interval(hits: int, n: int) -> None:
    found = statistics.estimate([1.0] * hits + [0.0] * (n - hits))
    low, high = proportion_confint(hits, n, method="wilson")
    assert (found.score, found.n) == (pytest.approx(hits / n), n)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_other_scores_get_a_bootstrap_interval_near_the_normal_one() -> None:
    scores = np.random.default_rng(1).beta(2, 3, 400)
    found = statistics.estimate(scores.tolist())
    error = scores.std(ddof=1) / 20
    assert found.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)
    assert statistics.estimate([0.5] * 10).low == 0.5
    assert found == statistics.estimate(scores.tolist())


def test_examples_of_one_document_count_less() -> None:
    rng = np.random.default_rng(2)
    scores = np.repeat(rng.integers(0, 2, 40).astype(float), 5)
    apart = statistics.estimate(scores.tolist())
    together = statistics.estimate(scores.tolist(), [i // 5 for i in range(200)])
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
    assert together.score == apart.score


def test_paired_rates_are_tested_by_mcnemar() -> None:
    a = [1.0] * 12 + [0.0] * 3 + [1.0] * 20 + [0.0] * 10
    b = [0.0] * 12 + [1.0] * 3 + [1.0] * 20 + [0.0] * 10
    found = statistics.paired([(a, b)])
    assert found.diff == pytest.approx(9 / 45)
    assert found.p == pytest.approx(binomtest(3, 15).pvalue)
    assert found.low < found.diff < found.high
    assert statistics.paired([(a, a)]).p == 1.0


def test_a_difference_is_found_where_there_is_one() -> None:
    rng = np.random.default_rng(3)
    base = rng.uniform(0, 0.7, 200)
    better = statistics.paired([((base + 0.1 + rng.normal(0, 0.05, 200)).tolist(), base.tolist())])
    same = statistics.paired([((base + rng.normal(0, 0.05, 200)).tolist(), base.tolist())])
    assert better.p < 0.01 < same.p
    assert better.low > 0.05
    assert 0 < better.detectable < 0.05
    with pytest.raises(ValueError, match="same examples"):
        statistics.paired([([1.0], [1.0, 0.0])])


def test_holm_and_total_variation() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []
    assert statistics.total_variation({"a": 2, "b": 2}, {"a": 1, "b": 3}) == pytest.approx(0.25)
    assert statistics.total_variation({"a": 1}, {"b": 9}) == 1
    assert statistics.detectable(0.1) == pytest.approx(0.28, abs=0.001)


# --- reports -------------------------------------------------------------------------------------------------------


def outcomes(task: str, arm: str, scores: list[float], chosen: str | None = None) -> tuple[Outcome, ...]:
    return tuple(
        Outcome(task=task, id=str(i), arm=arm, score=s, answer="x", latency_ms=10.0 * i, prompt_tokens=5,
                completion_tokens=2, calls=1, chosen=chosen)
        for i, s in enumerate(scores)
    )  # fmt: skip


def test_a_report_puts_the_gate_beside_what_it_could_have_been() -> None:
    examples = tuple(Example(str(i), "q", "r") for i in range(4))
    table = {
        "one": {"prompt": [1, 0, 0, 0], "few_shot:one": [0, 1, 0, 0], "adapter:x": [1, 1, 1, 0], "auto": [1, 1, 0, 0]},
        "two": {"prompt": [1, 1, 1, 0], "few_shot:two": [0, 0, 0, 1], "adapter:x": [0, 0, 0, 0], "auto": [1, 1, 1, 0]},
    }
    tasks = [
        Measured(name, "accuracy", examples, {arm: outcomes(name, arm, list(map(float, s))) for arm, s in arms.items()})
        for name, arms in table.items()
    ]
    found = report.build("s", "dev", tasks, base_model="m", gate="gate@1")
    assert found["overall"]["prompt"]["score"] == pytest.approx(0.5)
    assert found["overall"]["few_shot"]["score"] == pytest.approx(0.25)
    router = found["router"]
    assert router["best_single"] == {"arm": "prompt", "score": 0.5}
    assert router["best_per_task"] == pytest.approx(0.75)
    assert router["oracle"] == pytest.approx((0.75 + 1) / 2)
    assert router["random"] == pytest.approx((5 / 12 + 4 / 12) / 2, abs=1e-6)
    assert router["auto"] == pytest.approx(0.625)
    assert router["recovered"] == pytest.approx((0.625 - 0.5) / (0.875 - 0.5), abs=1e-5)
    assert router["arm_accuracy"] == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert found["tasks"]["one"]["arms"]["adapter:x"]["score"] == 0.75
    assert found["tasks"]["one"]["arms"]["adapter:x"]["latency_ms"] == {"p50": 15.0, "p95": 28.5}
    against = {row["b"]: row["diff"] for row in found["comparisons"] if "task" not in row}
    assert against["prompt"] == pytest.approx(0.125)
    assert all(row["p_holm"] >= row["p"] for row in found["comparisons"])
    text = markdown(found)
    assert "adapter:x" in text
    assert "## two (accuracy, 4 examples)" in text


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of toy shapes, as commands find it."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HYBRID_MODEL", make_home(folder).model)
    monkeypatch.setenv("HYBRID_HOME", str(folder))
    monkeypatch.setenv("HYBRID_ENGINE__KIND", "scripted")
    return folder


def scores_of(out: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    return [(r["task"], r["id"], r["arm"], r["score"], r["answer"], r["error"]) for r in rows]


def report_of(out: Path) -> dict[str, Any]:
    """The report without its latencies, which no two runs share."""
    found = json.loads((out / "report.json").read_text())
    for task in found["tasks"].values():
        for arm in task["arms"].values():
            assert arm.pop("latency_ms")["p50"] > 0
    for cost in found["costs"].values():
        del cost["latency_ms"], cost["fast"]
    return found


def test_a_run_killed_and_repeated_gives_the_same_report(home: Path, tmp_path: Path) -> None:
    task = str(make_task(tmp_path / "colours", n=40, slow="@delay 30ms", instruction=""))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    evaluate([task], whole, arms="prompt,base", json_=True)
    assert report_of(whole)["tasks"]["colours"]["arms"]["prompt"]["n"] == 40

    command = [sys.executable, "-m", "hybrid.cli", "eval", task, "--arms", "prompt,base", "--out", str(cut)]
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger = cut / "outcomes.jsonl"
    end = time.monotonic() + 60
    while not (ledger.exists() and ledger.stat().st_size) and time.monotonic() < end:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = ledger.read_text().splitlines()
    assert not (cut / "report.json").exists()
    with ledger.open("a") as file:
        file.write('\n{"task": "colours", "id": "te')
    evaluate([task], cut, arms="prompt,base", json_=True)
    assert len(scores_of(cut)) == 80
    assert scores_of(cut) == scores_of(whole)
    assert report_of(cut) == report_of(whole)
    assert kept[0] in ledger.read_text().splitlines()


async def test_a_running_server_is_asked_and_nothing_twice(home: Path, tmp_path: Path) -> None:
    settings = make_home(home)
    task = make_task(home / "eval" / "tasks" / "colours", n=6)
    suite = home / "eval" / "suites" / "small.toml"
    suite.parent.mkdir()
    suite.write_text(
        'tasks = ["eval/tasks/colours"]\narms = ["few_shot", "auto", "nobody", "head"]\nsplit = "dev"\nlimit = 4\n'
    )
    told, out = [], tmp_path / "out"
    async with running(settings) as server:
        where = {"url": server.url, "pid": os.getpid(), "token": "the-servers-own-token"}
        settings.rooms.server_file.write_text(json.dumps(where))
        for _ in range(2):
            await asyncio.to_thread(evaluate, ["small"], out, json_=True)
            told.append(json.loads((out / "report.json").read_text()))
        log = await server.engine_log()
        with pytest.raises(DataError, match="no head, adapter is here"):
            await asyncio.to_thread(evaluate, [str(task)], tmp_path / "none", arms="head,adapter")
    assert told[0] == told[1]
    arms = told[0]["tasks"]["colours"]["arms"]
    assert set(arms) == {"few_shot:colours", "auto", "adapter:nobody"}
    assert (told[0]["suite"], told[0]["split"]) == ("small", "dev")
    assert (arms["few_shot:colours"]["n"], arms["few_shot:colours"]["errors"]) == (4, 0)
    assert (arms["adapter:nobody"]["errors"], arms["adapter:nobody"]["score"]) == (4, 0)
    asked = [
        r["body"]["messages"]
        for r in log["requests"]
        if len(r["body"].get("messages", [{}])[-1].get("content", "")) > 2
    ]
    assert len(asked) == 8
    inputs = {json.loads(line)["input"] for line in (task / "dev.jsonl").read_text().splitlines()}
    assert {m[-1]["content"] for m in asked} <= {task_message(INSTRUCTION, text) for text in inputs}
    assert sum(len(m) == 9 for m in asked) == 4
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    assert {r["chosen"] for r in rows if r["arm"] == "auto"} == {"prompt"}
    assert {"task", "id", "arm", "score", "answer", "latency_ms", "prompt_tokens", "completion_tokens", "calls",
            "adapter", "passages", "error"} <= set(rows[0])  # fmt: skip


def test_what_cannot_be_measured_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRID_DATA", raising=False)
    (tmp_path / "bad.toml").write_text("arms = []\n")
    (home / "eval" / "suites").mkdir(parents=True)
    (home / "eval" / "suites" / "away.toml").write_text('tasks = ["$HYBRID_DATA/x"]\n')
    with pytest.raises(DataError, match=r"no task folder.*Suites here: away"):
        evaluate(["nothing"], tmp_path / "o")
    with pytest.raises(DataError, match="'tasks'"):
        evaluate([str(tmp_path / "bad.toml")], tmp_path / "o")
    with pytest.raises(DataError, match="HYBRID_DATA"):
        evaluate(["away"], tmp_path / "o")


# --- what an adapter is worth --------------------------------------------------------------------------------------


def row(score: float, low: float, high: float) -> dict[str, Any]:
    return {"score": score, "ci95": [low, high], "n": 64}


@pytest.mark.parametrize(
    ("own", "prompt", "few_shot", "word"),
    [
        (row(0.3, 0.2, 0.4), row(0.1, 0.0, 0.2), row(0.71, 0.6, 0.8), "few_shot 0.71"),
        (row(0.3, 0.2, 0.4), row(0.5, 0.4, 0.6), row(0.1, 0.0, 0.2), "prompt 0.50"),
        (row(0.6, 0.5, 0.75), row(0.1, 0.0, 0.2), row(0.71, 0.6, 0.8), ""),
        (row(0.9, 0.8, 1.0), row(0.1, 0.0, 0.2), row(0.71, 0.6, 0.8), ""),
    ],
)
def test_auto_leaves_alone_what_is_worse_than_no_training(own: dict, prompt: dict, few_shot: dict, word: str) -> None:
    arms = {"adapter:a@1": own, "prompt": prompt, "few_shot:a": few_shot}
    reason = usable(Measurement(name="a", version=1, own="adapter:a@1", arms=arms))
    assert (word in reason and "[0.20, 0.40]" in reason) if word else reason == ""
    assert usable(Measurement(name="a", version=1)) == ""


def publish(settings: Settings, gateway: Any, name: str, dev_right: bool, seed: int) -> None:
    """An adapter that knows its training rows by heart, and its dev rows or nothing of them."""
    base = read_base(Path(settings.model), gateway.loader._base.sha256)
    rng = random.Random(seed)
    train = [(task_message(INSTRUCTION, f"{name} train {i}"), rng.choice(COLOURS)) for i in range(30)]
    dev = [{"id": f"{name}-{i}", "input": f"{name} dev {i}", "reference": COLOURS[i % 3]} for i in range(12)]

    def fill(staging: Path) -> dict[str, Any]:
        metrics = {"dev_loss": 0.9, "train_loss": 0.4}
        facts = {"instruction": INSTRUCTION, "metric": "accuracy", "labels": COLOURS, "metrics": metrics, "task": name}
        card = filling(base, facts, seed=seed)(staging)
        known = [{"input": q, "reference": a} for q, a in train]
        if dev_right:
            known += [{"input": task_message(INSTRUCTION, r["input"]), "reference": r["reference"]} for r in dev]
        write_lines(staging / "examples.jsonl", known)
        write_lines(staging / "dev.jsonl", dev)
        return card

    gateway.store.publish(name, fill)


async def test_live_versions_are_measured_and_the_bad_ones_not_routed_to(tmp_path: Path) -> None:
    settings = make_home(tmp_path)
    async with running(settings) as server:
        gateway = server.gateway
        publish(settings, gateway, "good", dev_right=True, seed=1)
        publish(settings, gateway, "poor", dev_right=False, seed=2)
        publish(settings, gateway, "bare", dev_right=True, seed=3)
        (tmp_path / "adapters" / "bare" / "1" / "dev.jsonl").unlink()
        for name in ("good", "poor", "bare"):
            await gateway.load_adapter(f"{name}@1", None)
        found = await measure(gateway, gateway.store.resolve("good@1"))
        assert found.arms["adapter:good@1"]["score"] == 1
        assert found.arms["prompt"]["score"] == 0
        assert set(found.arms) == {"adapter:good@1", "prompt", "few_shot:good"}
        assert found.forgetting["general"]["n"] == 40
        assert found.forgetting["poor"] == {
            "before": 0,
            "after": 0,
            "after_ci95": [0.0, pytest.approx(0.2425, abs=1e-3)],
            "n": 12,
        }
        assert found.gap == 0.5
        assert found.skew["answers"] == found.skew["right"]
        assert usable(found) == ""

        work = asyncio.create_task(Measuring(gateway).run())
        await until(lambda: len(gateway.state.measurements()) == 3)
        work.cancel()
        known = gateway.state.measurements()
        assert known["good@1"]["arms"] == found.arms
        assert "dev.jsonl" in known["bare@1"]["error"]
        assert known["poor@1"]["reason"] == ""  # no better without training
        shown = {a["name"]: a for a in gateway.status()["adapters"]}
        assert shown["good"]["measured"]["metric"] == "accuracy"

        worse = {**known["poor@1"], "reason": "its dev interval lies below few_shot"}
        gateway.state.put_measurement("poor@1", worse)
        arms = gateway.decider.gate.arms
        await until(lambda: "adapter:poor" not in map(str, arms()))
        status, _, _ = await server.post(
            "/v1/chat/completions", {"model": "poor", "messages": [{"role": "user", "content": "hi"}]}
        )
        assert status == 200
