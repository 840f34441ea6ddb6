"""Advice: the rules on measurements of every kind, and a small task from its folder to the page. Drift: quiet where
nothing moved, named where something did.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs_kit import COLOURS, make_trainable_home
from server_kit import make_home, until
from typer.testing import CliRunner

from hybrid.boot import open_gateway
from hybrid.cli import app
from hybrid.errors import DataError
from hybrid.evaluation.advice import RULES, Ahead, Finding, Measurements, Trained, markdown
from hybrid.evaluation.advisor import advise
from hybrid.evaluation.drift import Asked, Known, drift, words
from hybrid.evaluation.formats import valid
from hybrid.evaluation.metrics import Example
from hybrid.lifecycle.advise import ahead
from hybrid.lifecycle.drift import measure_drift
from hybrid.lifecycle.scratch import steps_within
from hybrid.training.recipes import Recipe
from hybrid.types.outcome import Outcome
from hybrid.types.request import Message, Request

N = 100


def outcomes(arm: str, right: int, *, read: int = 50, written: int = 5, answer: str = "red") -> list[Outcome]:
    """`right` of N examples answered; more right answers are right where fewer are too."""
    return [
        Outcome(
            task="t",
            id=str(i),
            arm=arm,
            score=float(i < right),
            answer=answer,
            latency_ms=10.0 + i,
            prompt_tokens=read,
            completion_tokens=written,
            calls=1,
            passages=("p1",) if i % 2 else (),
        )
        for i in range(N)
    ]


def measured(arms: dict[str, list[Outcome]], **more: Any) -> Measurements:
    examples = tuple(Example(str(i), f"q{i}", "red", {"gold_passages": ["p1"]}) for i in range(N))
    facts: dict[str, Any] = {"task": "t", "metric": "token_f1", "folder": "tasks/t", "rows": 500, "examples": examples}
    return Measurements(**{**facts, "outcomes": arms, **more})


def finding(m: Measurements, question: str) -> Finding:
    return next(f for f in advise(m).findings if question in f.question)


# --- which arm -----------------------------------------------------------------------------------------------------


def test_a_clear_winner_is_served_and_named_sure() -> None:
    advice = advise(measured({"prompt": outcomes("prompt", 20), "adapter:t@1": outcomes("adapter:t@1", 90)}))
    assert (advice.winner, advice.best) == ("adapter:t@1", "adapter:t@1")
    assert "surely better than the runner-up prompt: +0.700" in advice.certainty
    assert "not surely" not in advice.certainty
    assert advice.commands[0] == "hybrid train tasks/t"


def test_within_noise_the_cheapest_is_served() -> None:
    rag = outcomes("rag:t", 72, read=900)
    advice = advise(measured({"prompt": outcomes("prompt", 70), "rag:t": rag}, corpus="t"))
    assert (advice.winner, advice.best) == ("prompt", "rag:t")
    assert "noise" in advice.certainty


def test_at_one_price_the_arm_with_less_to_keep_is_served() -> None:
    arms = {"adapter:t@1": outcomes("adapter:t@1", 71, read=49), "prompt": outcomes("prompt", 70)}
    assert advise(measured(arms)).winner == "prompt"


def test_an_arm_that_fails_cannot_win() -> None:
    broken = [replace(o, error="engine_error: gone") for o in outcomes("rag:t", 100, read=1)]
    assert advise(measured({"rag:t": broken, "prompt": outcomes("prompt", 10)})).winner == "prompt"


def test_many_rivals_are_corrected_for() -> None:
    """One difference at p = 0.03 is none among ten."""
    rivals = {f"adapter:a{i}@1": outcomes(f"adapter:a{i}@1", 94, read=500) for i in range(10)}
    best = {"prompt": outcomes("prompt", 100, read=900)}
    few = advise(measured({**best, "adapter:a0@1": rivals["adapter:a0@1"]}))
    many = advise(measured({**best, **rivals}))
    assert few.winner == "prompt"
    assert many.winner.startswith("adapter:")


def test_nothing_measured_is_no_advice() -> None:
    with pytest.raises(ValueError, match="at least one arm"):
        advise(measured({}))


# --- the questions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "verdict"),
    [
        ({"prompt": 70, "adapter:t@1": 72}, "yes"),
        ({"prompt": 20, "few_shot:t": 88, "adapter:t@1": 90}, "with examples"),
        ({"prompt": 20, "few_shot:t": 40, "adapter:t@1": 90}, "no"),
        ({"adapter:t@1": 90}, "unknown"),
    ],
)
def test_whether_the_base_serves_it_already(arms: dict[str, int], verdict: str) -> None:
    m = measured({arm: outcomes(arm, right) for arm, right in arms.items()})
    assert finding(m, "already").verdict == verdict


@pytest.mark.parametrize(
    ("rag", "verdict", "word"), [(80, "yes", "Fresher"), (21, "no", "Not measurably"), (2, "no", "harm")]
)
def test_whether_documents_matter(rag: int, verdict: str, word: str) -> None:
    m = measured({"prompt": outcomes("prompt", 20), "rag:t": outcomes("rag:t", rag)}, corpus="t")
    found = finding(m, "documents")
    assert found.verdict == verdict
    assert word in found.sentence
    assert found.numbers["gold_found"] == 0.5
    assert "50%" in found.sentence


def test_documents_are_judged_beside_the_same_adapter_too() -> None:
    arms = {"adapter:t@1": 30, "adapter+rag:t@1:t": 90}
    m = measured({arm: outcomes(arm, right) for arm, right in arms.items()}, corpus="t", documents="tasks/t")
    assert finding(m, "documents").numbers["arms"] == ["adapter+rag:t@1:t", "adapter:t@1"]
    assert "hybrid index tasks/t --name t" in advise(m).commands


def test_without_documents_the_question_stays_open() -> None:
    assert finding(measured({"prompt": outcomes("prompt", 20)}), "documents").verdict == "unknown"


@pytest.mark.parametrize(("said", "verdict"), [("The colour is red.", "yes"), ("Green", "no")])
def test_whether_it_is_about_format(said: str, verdict: str) -> None:
    arms = {"prompt": outcomes("prompt", 5, answer=said), "adapter:t@1": outcomes("adapter:t@1", 90)}
    found = finding(measured(arms, labels=("red", "green"), metric="accuracy"), "format")
    assert found.verdict == verdict
    assert found.numbers["valid"]["adapter:t@1"] == 1.0


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("json_f1", '{"a": 1}', 'Here: {"a": 1}'),
        ("sql_exact", "SELECT a FROM b WHERE c = 'd'", "The answer is in b"),
        ("choice", "B.", "none of these"),
        ("numeric", "It is 12.", "twelve"),
    ],
)
def test_a_form_is_recognised(metric: str, good: str, bad: str) -> None:
    assert (valid(good, metric), valid(bad, metric)) == (True, False)
    assert valid(good, "rouge_l") is None


def points(*losses: float) -> tuple[dict[str, float], ...]:
    return tuple({"rows": rows, "dev_loss": loss} for rows, loss in zip((50, 150, 500), losses, strict=True))


@pytest.mark.parametrize(
    ("trained", "verdict", "word"),
    [
        (Trained(version="t@1", points=points(2.0, 1.5, 1.49)), "enough", "flat"),
        (Trained(version="t@1", points=points(2.0, 1.5, 1.6)), "enough", "flat"),
        (Trained(version="t@1", points=points(2.0, 1.8, 1.0)), "more would help", "cannot be told"),
        (
            Trained(
                version="t@1", points=points(2.0, 1.5, 1.2), ahead=(Ahead(rows=1000, dev_loss=1.1, low=1.0, high=1.2),)
            ),
            "more would help",
            "from 1.200 to about 1.100 [1.000, 1.200]",
        ),
        (
            Trained(
                version="t@1", points=points(2.0, 1.5, 1.4), ahead=(Ahead(rows=1000, dev_loss=1.39, low=1.3, high=1.4),)
            ),
            "enough",
            "flat",
        ),
    ],
)
def test_whether_more_data_would_help(trained: Trained, verdict: str, word: str) -> None:
    m = measured({"adapter:t@1": outcomes("adapter:t@1", 50)}, trained={"adapter:t@1": trained})
    found = finding(m, "enough data")
    assert found.verdict == verdict
    assert word in found.sentence
    assert ("hybrid data next tasks/t --pool UNLABELLED.jsonl -n 100" in advise(m).commands) == (verdict != "enough")


def test_what_it_costs_is_of_a_thousand_requests() -> None:
    trained = {"adapter:t@1": Trained(version="t@1", seconds=90, memory_mb=2048, steps=8)}
    m = measured({"adapter:t@1": outcomes("adapter:t@1", 50, read=60, written=7)}, trained=trained)
    found = finding(m, "cost")
    assert found.numbers["serving"] == {"tokens_read": 60000, "tokens_written": 7000, "calls": 1000}
    assert "1.5 minutes and 2.0 GiB" in found.sentence


def test_the_page_says_everything_and_prints_its_rules() -> None:
    arms = {"prompt": outcomes("prompt", 20), "adapter:t@1": outcomes("adapter:t@1", 90)}
    advice = advise(measured(arms, trained={"adapter:t@1": Trained(version="t@1")}))
    page = markdown(advice)
    for text in (*RULES, *advice.commands, *advice.notes, *(f.sentence for f in advice.findings), advice.certainty):
        assert text in page
    assert json.loads(json.dumps(advice.wire()))["winner"] == "adapter:t@1"


# --- the learning curve and the budget -----------------------------------------------------------------------------


def test_the_curve_is_continued_with_what_noise_leaves_open() -> None:
    told = ahead([{"rows": n, "dev_loss": 5 * n**-0.3} for n in (100, 300, 1000)])
    assert [a.rows for a in told] == [2000, 4000]
    for a in told:
        assert a.low <= a.dev_loss <= a.high
        assert a.dev_loss == pytest.approx(5 * a.rows**-0.3, abs=1e-3)
    assert ahead([{"rows": 100, "dev_loss": 1.0}]) == []


def test_the_steps_fit_the_minutes_with_the_curve_s_smaller_runs() -> None:
    recipe = Recipe(epochs=3, batch_size=10)
    assert steps_within(1000, recipe, 1.0, 10_000) == 300  # nothing to cut
    # 10 %: 30 steps, 30 %: 90 steps, all: the rest
    assert steps_within(1000, recipe, 1.0, 220) == 100
    assert steps_within(1000, recipe, 1.0, 1) == 8  # fewer teach nothing


# --- from a folder to the page -------------------------------------------------------------------------------------


def make_task(folder: Path) -> Path:
    folder.mkdir(parents=True)
    facts = {"name": folder.name, "instruction": "Name the colour.", "metric": "accuracy", "labels": list(COLOURS)}
    (folder / "task.json").write_text(json.dumps(facts))
    for split, start, count in (("train", 0, 80), ("dev", 100, 24), ("test", 200, 8)):
        rows = [
            {
                "id": f"{split}{n}",
                "input": f"item {n} is {COLOURS[n % 4]}" + "!" * (n % 5),
                "reference": COLOURS[n % 4],
                "meta": {"gold_passages": [f"p{n % 4}"]},
            }
            for n in range(start, start + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    passages = [{"id": f"p{i}", "title": c, "text": f"An item that is {c} is {c}."} for i, c in enumerate(COLOURS)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    return folder


def test_a_task_folder_becomes_a_page_of_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_trainable_home(tmp_path / "home")
    task = make_task(tmp_path / "colours")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    sets = ["max_steps=6", "eval_every=2", "batch_size=8", "rank=4", "precision=float32"]
    arguments = [word for pair in sets for word in ("--set", pair)]
    command = ["advise", str(task), "--out", str(tmp_path / "out"), "--json", "--limit", "12", *arguments]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    told = json.loads(done.stdout.splitlines()[-1])
    assert "lost" not in caplog.text, "an engine that is closed at the end was not lost"

    arms = {row["arm"]: row for row in told["arms"]}
    assert set(arms) == {
        "prompt", "few_shot:colours", "head:advise-colours", "rag:colours", "adapter:advise-colours@2",
        "adapter+rag:advise-colours@2:colours",
    }  # fmt: skip
    assert all(row["n"] == 12 and row["failed"] == 0 for row in arms.values())
    assert told["winner"] == "head:advise-colours"
    assert len(told["findings"]) == 5
    curve = next(f for f in told["findings"] if "enough data" in f["question"])
    assert [p["rows"] for p in curve["numbers"]["points"]] == [8, 24, 80]
    assert (tmp_path / "out" / "advice.md").read_text().startswith("# colours: serve `head:advise-colours`")

    kept = tmp_path / "home" / "adapters" / "advise-colours"
    assert json.loads((kept / "2" / "card.json").read_text())["promote"] is False
    ledger = tmp_path / "home" / ".hybrid" / "advise" / "advise-colours" / "outcomes.jsonl"
    before = ledger.read_bytes()
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert json.loads(again.stdout.splitlines()[-1])["winner"] == told["winner"]
    assert ledger.read_bytes() == before  # nothing was asked again
    assert sorted(p.name for p in kept.iterdir() if p.is_dir()) == ["1", "2"]  # nor trained


# --- drift ---------------------------------------------------------------------------------------------------------

DIM = 384
RNG = np.random.default_rng(3)


def cloud(centre: int, n: int, spread: float = 0.04) -> np.ndarray:
    """Unit vectors around one axis."""
    rows = np.eye(DIM)[centre] + spread * RNG.standard_normal((n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def asked(arm: str, rows: np.ndarray, score: float | None = None) -> list[Asked]:
    return [Asked(f"dec_{arm}_{i}", arm, row, score) for i, row in enumerate(rows)]


KNOWN = {
    "adapter:bank": Known((cloud(0, 200),)),
    "adapter:law": Known((cloud(1, 200),)),
    "prompt": Known((cloud(2, 50),), learned=False),
}


def usual(n: int) -> list[Asked]:
    return [*asked("adapter:bank", cloud(0, n)), *asked("adapter:law", cloud(1, n)), *asked("prompt", cloud(2, n))]


def test_nothing_is_said_where_nothing_moved() -> None:
    found = drift(usual(60), usual(60), KNOWN)
    assert found.todo == ()
    assert {row.arm: row.share for row in found.arms} == {arm: pytest.approx(1 / 3, abs=1e-3) for arm in KNOWN}
    assert "Nothing has drifted." in words(found, 7)
    assert found.wire()["drifted"] is False


def test_an_adapter_whose_requests_moved_is_named_and_no_other() -> None:
    rows = cloud(0, 60) + 0.8 * np.eye(DIM, dtype=np.float32)[5]
    moved = asked("adapter:bank", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    found = drift([*moved, *asked("adapter:law", cloud(1, 60)), *asked("prompt", cloud(2, 300))], [], KNOWN)
    assert len(found.todo) == 1
    assert found.todo[0].startswith("Retrain adapter:bank")
    bank = next(row for row in found.arms if row.arm == "adapter:bank")
    assert bank.then is not None
    assert bank.now is not None
    assert bank.then - bank.now > 0.05


def test_a_difference_too_small_to_matter_is_none() -> None:
    """So many requests tell the smallest shift; it is no reason to train again."""
    rows = cloud(0, 1000) + 0.08 * np.eye(DIM, dtype=np.float32)[5]
    found = drift(asked("adapter:bank", rows / np.linalg.norm(rows, axis=1, keepdims=True)), [], KNOWN)
    bank = next(row for row in found.arms if row.arm == "adapter:bank")
    assert bank.p is not None
    assert bank.p < 0.01
    assert found.todo == ()


def test_new_subjects_are_grouped_and_the_gate_is_named() -> None:
    new = asked("prompt", np.concatenate([cloud(7, 50), cloud(8, 30)]))
    found = drift([*usual(60), *new], usual(60), KNOWN)
    assert [cluster.n for cluster in found.clusters] == [50, 30]
    assert set(found.clusters[0].ids) <= {f"dec_prompt_{i}" for i in range(50)}
    assert found.todo[-1].startswith("Retrain the gate: 31% of the requests")
    assert "group (50)" in found.todo[-1]


def test_feedback_that_fell_is_told() -> None:
    before = asked("adapter:bank", cloud(0, 30), 0.9)
    found = drift(asked("adapter:bank", cloud(0, 30), 0.4), before, KNOWN)
    assert [line.split(":")[0] for line in found.todo] == ["Look at adapter"]
    assert "from 0.90 to 0.40" in found.todo[0]


def test_of_few_requests_nothing_is_said() -> None:
    found = drift(asked("adapter:bank", cloud(9, 5)), [], KNOWN)
    assert found.todo == ()
    assert "Too few requests to say." in words(found, 7)
    assert drift([], [], {}).todo == ()


async def test_routed_requests_leave_their_vector_and_evaluations_are_left_out(tmp_path: Path) -> None:
    settings = make_home(tmp_path, gate={"deadline_ms": 20_000})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("# Tides\n\nThe moon pulls the sea, and so the tides rise and fall.\n")
    async with open_gateway(settings) as gateway:
        await asyncio.to_thread(gateway.library.ingest, "tides", tmp_path / "notes")
        await until(lambda: gateway.ready()[0] and len(gateway.decider.gate.arms()) > 1)
        for caller in ("local", "evaluation"):
            question = Message("user", f"why do tides rise, {caller}?")
            decision = await gateway.route(Request(id=caller, messages=(question,), caller=caller))
            assert decision.vector is not None
            assert "vector" not in decision.wire()
        gateway.feedback(
            (await gateway.route(Request(id="x", messages=(Message("user", "tides?"),)))).id, 0.5, "", "local"
        )
        gateway.journal.flush()
        kept = gateway.state.traffic(0, time.time() + 1, "evaluation")
    assert [row["score"] for row in kept] == [None, 0.5]
    assert all(len(row["vector"]) == 768 for row in kept)
    found = await asyncio.to_thread(measure_drift, settings, 1.0)
    assert (found.n, found.todo) == (2, ())
    assert {row.arm for row in found.arms} >= {"prompt", "rag:tides"}


def test_drift_is_a_word_of_eval_and_suites_are_still_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["eval", "drift", "--days", "3", "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert (done.exit_code, told["n"], told["drifted"]) == (0, 0, False)
    with pytest.raises(DataError, match="nowhere is no task folder"):
        CliRunner().invoke(app, ["eval", "nowhere", "--out", str(tmp_path / "out")], catch_exceptions=False)
    with pytest.raises(DataError, match="nowhere is no task folder"):
        CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "out"), "nowhere"], catch_exceptions=False)
    assert "--split" in CliRunner().invoke(app, ["eval", "--help"]).stdout
