"""Suites: they make what they need, go on after a kill, ask nothing twice, and tell on scores that were learned by
heart. Task folders are made of other people's data.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_model
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.cli.eval import evaluate
from hybrid.errors import BadRequest, DataError, HybridError
from hybrid.evaluation.asking import Offer, shown_settings
from hybrid.evaluation.leaks import mark_leaks
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.suite import Suite, questions, read_suite, subjects
from hybrid.evaluation.tasks import Task, check_task, read_split, read_task
from hybrid.lifecycle.suite_adapters import orders
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.types.outcome import Outcome

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ["red", "green", "blue"]
HEAD = """
[[adapters]]
task = "eval/tasks/colours"
method = "head"
"""
SUITE = """
tasks = ["eval/tasks/colours"]
arms = ["prompt", "adapter", "auto"]
corpora = true

[[adapters]]
task = "eval/tasks/colours"
max_steps = 2
rows = 24
rank = 4
batch_size = 4
precision = "float32"
"""


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_home(home: Path) -> None:
    """A home with one task that brings a corpus, and a suite that trains for it."""
    task = home / "eval" / "tasks" / "colours"
    task.mkdir(parents=True)
    facts = {"name": "colours", "instruction": "", "metric": "accuracy", "labels": COLOURS}
    (task / "task.json").write_text(json.dumps(facts))
    for split, n in (("train", 40), ("dev", 6), ("test", 20)):
        rows = [
            {"id": f"{split}-{i}", "input": f"{split} thing {i} is {COLOURS[i % 3]} @delay 40ms",
             "reference": COLOURS[i % 3], "meta": {}}
            for i in range(n)
        ]  # fmt: skip
        write_lines(task / f"{split}.jsonl", rows)
    write_lines(task / "corpus.jsonl", [{"id": f"p{i}", "title": "", "text": f"Thing {i} has one."} for i in range(4)])
    (home / "eval" / "suites").mkdir()
    (home / "eval" / "suites" / "small.toml").write_text(SUITE)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of toy shapes, as commands find it."""
    folder = tmp_path / "home"
    make_home(folder)
    for name, value in {
        "HOME": str(folder), "MODEL": str(make_tiny_model(tmp_path / "tiny").path), "ENGINE__KIND": "scripted",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"HYBRID_{name}", value)
    monkeypatch.setenv("NO_COLOR", "1")
    return folder


def started(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hybrid.cli", "eval", "small", "--out", str(out), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def killed_once(path: Path, victim: subprocess.Popen[bytes]) -> None:
    """Kills the run as soon as a file holds something."""
    end = time.monotonic() + 100
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        assert victim.poll() is None, (victim.stderr.read() if victim.stderr else b"")[-2000:]
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()


def facts_of(out: Path) -> tuple[Any, list[Any]]:
    """The report and the outcomes without what no two runs share: how long each answer took."""
    text = (out / "report.json").read_text()
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    scored = {
        task: {arm: [row["score"], row["n"], row["errors"], row["ci95"]] for arm, row in found["arms"].items()}
        for task, found in json.loads(text)["tasks"].items()
    }
    return scored, [(r["task"], r["id"], r["arm"], r["score"], r["answer"], r["adapter"], r["error"]) for r in rows]


def published(home: Path) -> list[str]:
    return sorted(card.parent.name for card in home.glob("adapters/colours/*/card.json"))


def test_a_suite_makes_what_it_needs_once_and_goes_on_after_kills(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    killed_once(cut / "outcomes.jsonl", started(cut))
    made = published(home)
    assert made == ["1"]
    kept = (cut / "outcomes.jsonl").read_text().splitlines()
    assert 0 < len(kept) < 60
    assert not (cut / "report.json").exists()

    evaluate(["small"], cut, json_=True)
    assert published(home) == made
    scored, rows = facts_of(cut)
    assert Counter(row[2] for row in rows) == {"prompt": 20, "adapter:colours": 20, "auto": 20}
    assert json.loads(kept[0]) in [json.loads(line) for line in (cut / "outcomes.jsonl").read_text().splitlines()]

    evaluate(["small"], whole, json_=True)
    assert facts_of(whole) == (scored, rows)

    monkeypatch.setenv("HYBRID_ENGINE__KIND", "none that could be started")
    before = (cut / "outcomes.jsonl").read_bytes()
    evaluate(["small"], cut, json_=True)
    assert facts_of(cut) == (scored, rows)
    assert (cut / "outcomes.jsonl").read_bytes() == before
    with pytest.raises(HybridError, match="none that could be started"):
        evaluate(["small"], tmp_path / "new", json_=True)


def test_a_plan_trains_and_asks_nothing(home: Path, tmp_path: Path) -> None:
    suite = home / "eval" / "suites" / "both.toml"
    suite.write_text(SUITE.replace("auto", "head") + HEAD)
    done = CliRunner().invoke(app, ["eval", "both", "--out", str(tmp_path / "out"), "--plan", "--json"])
    told = json.loads(done.stdout.splitlines()[-1])
    assert {part["kind"]: part["open"] for part in told["parts"]} == {"prompt": 20, "adapter": 20, "head": 20}
    assert set(told["adapters"]) == {"colours (head)", "colours (lora)"}
    assert set(told["corpora"]) == {"colours"}
    assert told["minutes"] > sum(told["adapters"].values()) > 0
    assert not (tmp_path / "out").exists()
    assert published(home) == []
    text = CliRunner().invoke(app, ["eval", "both", "--out", str(tmp_path / "out"), "--plan"]).stdout
    assert "train colours (lora)" in text
    assert "ask adapter: 20 of 20" in text


def test_arms_that_need_no_training_get_none(home: Path, tmp_path: Path) -> None:
    words = ["eval", "small", "--out", str(tmp_path / "out"), "--arms", "prompt,few_shot", "--plan", "--json"]
    told = json.loads(CliRunner().invoke(app, words).stdout.splitlines()[-1])
    assert told["adapters"] == {}
    assert {part["kind"] for part in told["parts"]} == {"prompt", "few_shot"}


def test_an_adapter_that_cannot_be_trained_stops_the_suite_with_the_trainers_words(home: Path, tmp_path: Path) -> None:
    bad = home / "eval" / "tasks" / "bad"
    bad.mkdir()
    (bad / "task.json").write_text(json.dumps({"name": "bad", "metric": "accuracy"}))
    rows = [{"id": str(i), "input": f"thing {i}", "reference": f"answer {i}"} for i in range(20)]
    for split, part in (("train", rows[:12]), ("dev", rows[12:16]), ("test", rows[16:])):
        write_lines(bad / f"{split}.jsonl", part)
    suite = tmp_path / "open.toml"
    suite.write_text('tasks = ["eval/tasks/bad"]\n[[adapters]]\ntask = "eval/tasks/bad"\nmethod = "head"\n')
    with pytest.raises(HybridError, match=r"bad could not be trained for the suite: .*suite-bad\.log"):
        evaluate([str(suite)], tmp_path / "out", json_=True)


@pytest.mark.parametrize(
    ("keys", "word"), [("epoch = 2", "Did you mean epochs"), ("rank = 0", "rank"), ('name = "auto"', "reserved")]
)
def test_a_recipe_is_looked_at_before_anything_is_trained(home: Path, keys: str, word: str) -> None:
    suite = home / "eval" / "suites" / "odd.toml"
    suite.write_text(f'tasks = ["eval/tasks/colours"]\n[[adapters]]\ntask = "eval/tasks/colours"\n{keys}\n')
    settings = Settings.load()
    with pytest.raises(HybridError, match=word):
        orders(read_suite(["odd"], settings), settings)


def test_the_suites_of_this_repository_can_be_read(data: Path) -> None:
    settings = Settings.load(home=ROOT, data=data)
    for path in sorted((ROOT / "eval" / "suites").glob("*.toml")):
        suite = read_suite([path.stem], settings)
        assert suite.name == path.stem
        assert len(orders(suite, settings)) == len(suite.adapters)
    real = read_suite(["real"], settings)
    assert len(real.tasks) == len(list(data.glob("*/task.json")))
    assert (real.limit, real.foreign_limit, real.arms) == (50, 20, ())


# --- leaks ---------------------------------------------------------------------------------------------------------


def outcome(id: str, arm: str, **more: Any) -> Outcome:
    facts = {"task": "t", "score": 1.0, "answer": "x", "latency_ms": 1, "prompt_tokens": 1, "completion_tokens": 1}
    return Outcome(id=id, arm=arm, calls=1, **{**facts, **more})


def test_what_is_dear_or_foreign_is_asked_less(tmp_path: Path) -> None:
    for name in ("near", "far"):
        rows = [{"id": f"{name}{i}", "input": f"what is {i}?", "reference": str(i)} for i in range(9)]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "task.json").write_text(json.dumps({"name": name, "instruction": "", "metric": "numeric"}))
        for split in ("train", "dev", "test"):
            kept = [{**row, "id": f"{row['id']}{split}"} for row in rows]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    suite = Suite(
        tasks=tuple(str(tmp_path / name) for name in ("near", "far")), limit=6, foreign_limit=3, limits={"moa": 2}
    )
    adapters = [{"name": "near", "version": 1, "kind": "lora", "alias": True, "state": "live"}]
    adapters[0]["card"] = {"task": "near"}
    status = {"adapters": adapters, "corpora": [{"name": "near"}], "gate": {}, "engine": {}}
    offer = Offer(("near", "rag:near", "moa"), status, shown_settings(Settings.load(home=tmp_path)), "base")
    found = subjects(suite, Settings.load(home=tmp_path), len)
    asked = Counter((job.task.name, job.arm) for job in questions(suite, found, offer))
    assert asked["near", "prompt"] == asked["far", "prompt"] == 6
    assert (asked["near", "adapter:near"], asked["far", "adapter:near"]) == (6, 3)
    assert (asked["near", "rag:near"], asked["far", "rag:near"]) == (6, 3)
    assert asked["near", "moa"] == asked["far", "moa"] == 2


def test_answers_to_questions_that_were_learned_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "a" / "2"
    folder.mkdir(parents=True)
    write_lines(folder / "examples.jsonl", [{"input": "Say it.\n\nTest  ONE", "reference": "x"}])
    write_lines(tmp_path / "train.jsonl", [{"id": "x", "input": "test two", "reference": "x"}])
    task = Task("t", "accuracy", "Say it.", folder=tmp_path)
    examples = [Example("1", "test one"), Example("2", "test two"), Example("3", "test three")]
    asked = [
        *(outcome(i, "adapter:a", adapter="a@2") for i in "123"),
        *(outcome(i, "adapter:b", adapter="b@1") for i in "123"),
        *(outcome(i, "auto", adapter="a@2", chosen="adapter:a") for i in "13"),
        *(outcome(i, "few_shot:t") for i in "123"),
        *(outcome(i, "prompt") for i in "123"),
    ]
    report: dict[str, Any] = {"tasks": {"t": {"arms": {o.arm: {} for o in asked}}}, "notes": {}}
    mark_leaks(report, {"t": (task, examples)}, asked, Home(tmp_path))
    arms = report["tasks"]["t"]["arms"]
    assert {arm: row.get("leaked", 0) for arm, row in arms.items()} == {
        "adapter:a": 1, "adapter:b": 0, "auto": 1, "few_shot:t": 1, "prompt": 0,
    }  # fmt: skip
    assert "learned" in report["notes"]["leaked"]


# --- importing -----------------------------------------------------------------------------------------------------


def make_tables(folder: Path) -> dict[str, Path]:
    """The same 100 rows, a fifth of them of the rarer label, in every format; one empty, one repeated."""
    import pandas

    rows = [{"text": f"ticket {i}", "team": "rare" if i % 5 == 0 else "usual"} for i in range(100)]
    rows += [{"text": "", "team": "usual"}, {"text": "Ticket  7", "team": "usual"}]
    frame = pandas.DataFrame(rows)
    paths = {end: folder / f"tickets.{end}" for end in ("csv", "tsv", "json", "jsonl", "parquet")}
    frame.to_csv(paths["csv"], index=False)
    frame.to_csv(paths["tsv"], index=False, sep="\t")
    paths["json"].write_text(json.dumps(rows))
    write_lines(paths["jsonl"], rows)
    frame.to_parquet(paths["parquet"])
    return paths


def imported(source: str, out: Path, *more: str) -> Any:
    words = ["tasks", "import", source, "--out", str(out), "--metric", "accuracy", "--json", *more]
    done = CliRunner().invoke(app, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return json.loads(done.stdout)


def test_a_table_becomes_a_task_the_same_in_every_format(tmp_path: Path) -> None:
    columns = ["--input", "text", "--reference", "team", "--labels", "team", "--instruction", "Which team?"]
    made = {}
    for end, path in make_tables(tmp_path).items():
        told = imported(str(path), tmp_path / f"from-{end}", *columns, "--name", "tickets")
        assert told["rows"] == {"train": 80, "dev": 10, "test": 10}
        assert told["left_out"] == {"empty": 1, "repeated": 1}
        made[end] = {name: (tmp_path / f"from-{end}" / name).read_text() for name in
                     ("train.jsonl", "dev.jsonl", "test.jsonl")}  # fmt: skip
        assert check_task(tmp_path / f"from-{end}").complaints == ()
    assert all(files == made["csv"] for files in made.values())
    task = read_task(tmp_path / "from-csv")
    assert (task.name, task.labels, task.instruction) == ("tickets", ("rare", "usual"), "Which team?")
    for part in ("dev", "test"):
        assert Counter(e.reference for e in read_split(task, part).examples) == {"usual": 8, "rare": 2}


def test_splits_class_names_and_nested_answers_are_kept(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    kind = Features({"q": Value("string"), "a": {"text": [Value("string")]}, "topic": ClassLabel(names=["x", "y"])})
    parts = {
        name: Dataset.from_list(
            [{"q": f"{name} {i}", "a": {"text": ["one", "uno"]}, "topic": i % 2} for i in range(n)], features=kind
        )
        for name, n in (("train", 30), ("validation", 6))
    }
    DatasetDict(parts)["train"].to_parquet(tmp_path / "train.parquet")
    parts["validation"].to_parquet(tmp_path / "validation.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in parts) + "---\n"
    (tmp_path / "README.md").write_text(card)
    told = imported(str(tmp_path), tmp_path / "task", "--input", "q", "--reference", "a.text", "--labels", "topic")
    assert told["rows"] == {"train": 27, "dev": 6, "test": 3}
    task = read_task(tmp_path / "task")
    first = read_split(task, "dev").examples[0]
    assert (first.input, first.reference, first.meta["references"]) == ("validation 0", "one", ["one", "uno"])
    assert task.labels == ()
    told = imported(str(tmp_path), tmp_path / "named", "--input", "q", "--reference", "topic", "--labels", "topic",
                    "--split", "train")  # fmt: skip
    assert told["rows"] == {"train": 24, "dev": 3, "test": 3}
    assert read_task(tmp_path / "named").labels == ("x", "y")


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b\n" + "".join(f"q{i},r{i}\n" for i in range(9)))
    columns = ["--input", "a", "--reference", "b"]
    with pytest.raises(BadRequest, match=r"--reference 'c': .* It has a, b"):
        imported(str(table), tmp_path / "x", "--input", "a", "--reference", "c")
    with pytest.raises(DataError, match="no split 'dev'"):
        imported(str(table), tmp_path / "x", *columns, "--split", "dev")
    with pytest.raises(DataError, match="is no file"):
        imported("nobody/knows-this", tmp_path / "x", *columns)
    with pytest.raises(DataError, match=r"\.parquet"):
        imported(str(ROOT / "LICENSE"), tmp_path / "x", *columns)
    with pytest.raises(BadRequest, match="unknown; use one of"):
        imported(str(table), tmp_path / "x", *columns, "--metric", "bleu")
    with pytest.raises(DataError, match=r"no sound task: train\.jsonl:1"):
        imported(str(table), tmp_path / "x", *columns, "--metric", "json_f1")
    assert not (tmp_path / "x").exists()
    assert not [p for p in os.listdir(tmp_path) if re.match(r"\.staging", p)]
