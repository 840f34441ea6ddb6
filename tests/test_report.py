"""Reports: numbers with known answers, one page that opens anywhere, no text of the data where none is wanted, and a
judge whose opinion stays apart.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import uvicorn
from scipy.stats import ttest_rel
from server_kit import make_home, running
from sklearn.metrics import ndcg_score
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.evaluation import folder, report, statistics
from hybrid.evaluation.costs import pareto
from hybrid.evaluation.judge import Judge, cases_of, judged
from hybrid.evaluation.measured import Measured
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.retrieval import ndcg, retrieval
from hybrid.evaluation.runner import Ledger
from hybrid.evaluation.words import markdown, summary
from hybrid.knowledge.support import support
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

SECRET = "zanzibarine"  # stands in every text of the data, and nowhere else


def outcome(task: str, arm: str, i: int, score: float, **more: Any) -> Outcome:
    facts = {"answer": f"{SECRET} said {arm}", "latency_ms": 10.0 + i, "prompt_tokens": 20, "completion_tokens": 5}
    return Outcome(**{"task": task, "id": f"e{i}", "arm": arm, "score": float(score), "calls": 1, **facts, **more})


def measured(name: str, table: dict[str, Sequence[float]], metas: Sequence[JSON] = (), **more: Any) -> Measured:
    n = max(map(len, table.values()))
    examples = tuple(
        Example(f"e{i}", f"{SECRET} asked {i}?", f"{SECRET} right", metas[i] if metas else {}) for i in range(n)
    )
    rows = {arm: tuple(outcome(name, arm, i, s, **more) for i, s in enumerate(scores)) for arm, scores in table.items()}
    return Measured(name, "accuracy", examples, rows, f"{SECRET} rule")


def built(*tasks: Measured, **more: Any) -> JSON:
    return report.build("s", "test", tasks, base_model="m", gate="gate@1", **more)


# --- statistics ----------------------------------------------------------------------------------------------------


def test_regret_and_what_was_recovered() -> None:
    router = built(
        measured("t", {"prompt": [1, 1, 0, 0, 0], "moa": [0, 0, 1, 0, 0], "auto": [1, 1, 0, 0, 0]}),
        measured("u", {"prompt": [0, 0, 0, 0, 0], "moa": [1, 1, 1, 0, 0], "auto": [1, 1, 1, 0, 0]}),
    )["router"]
    assert router["best_single"] == {"arm": "moa", "score": 0.4}
    assert (router["oracle"], router["best_per_task"], router["random"]) == pytest.approx((0.6, 0.5, 0.3))
    assert router["auto"] == pytest.approx(0.5)
    assert router["regret"] == pytest.approx(0.1)
    assert router["recovered"] == pytest.approx(0.5)
    assert router["arm_accuracy"] == pytest.approx((4 / 5 + 1) / 2)


def test_the_winner_is_named_with_its_certainty() -> None:
    clear = built(measured("t", {"prompt": [0] * 40, "moa": [1] * 36 + [0] * 4, "auto": [0] * 30 + [1] * 10}))
    assert clear["winner"]["arm"] == "moa"
    assert clear["winner"]["level_with"] == []
    assert "moa wins: 0.900" in summary(clear)[0]
    level = built(measured("t", {"prompt": [0, 1] * 10, "moa": [1, 0] * 10 + [1], "auto": [0, 1] * 10}))
    assert set(level["winner"]["level_with"]) == {"prompt", "auto"}
    assert "no significant difference from" in summary(level)[0]
    verdicts = {row["b"]: row["verdict"] for row in level["comparisons"]}
    assert verdicts == dict.fromkeys(("prompt", "moa"), "no significant difference")
    assert "no significant difference" in markdown(level)
    assert "fewer than" in " ".join(summary(clear))


def test_comparisons_are_corrected_by_holm_over_the_whole_list() -> None:
    rng = np.random.default_rng(0)
    tasks = [
        measured(
            name, {arm: (rng.random(30) < p).astype(float) for arm, p in [("prompt", 0.4), ("moa", 0.6), ("auto", 0.7)]}
        )
        for name in ("t", "u")
    ]
    rows = built(*tasks)["comparisons"]
    assert len(rows) == 6
    assert [row["p_holm"] for row in rows] == pytest.approx(statistics.holm([row["p"] for row in rows]), abs=2e-6)


def test_a_difference_that_is_plain_survives_many_comparisons() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.7, 0.1, 60), rng.normal(0.4, 0.1, 60)
    assert statistics.paired([(a.tolist(), b.tolist())]).p * 300 < 0.05
    near = statistics.paired([(a.tolist(), (a - rng.normal(0.012, 0.05, 60)).tolist())])
    assert 0.001 < near.p < 0.5


def test_the_bootstrap_agrees_with_the_t_test() -> None:
    rng = np.random.default_rng(2)
    a = rng.normal(0.5, 0.2, 80)
    b = a - rng.normal(0.04, 0.2, 80)
    assert statistics.paired([(a.tolist(), b.tolist())]).p == pytest.approx(ttest_rel(a, b).pvalue, abs=0.02)


def test_pairs_that_share_a_document_count_less() -> None:
    rng = np.random.default_rng(3)
    gaps = np.repeat(rng.normal(0.1, 0.3, 20), 6)
    shared = [i // 6 for i in range(120)]
    pairs = [((0.5 + gaps).tolist(), [0.5] * 120)]
    apart, together = statistics.paired(pairs), statistics.paired(pairs, [shared])
    assert together.diff == apart.diff
    assert together.p > apart.p
    assert together.detectable > 2 * apart.detectable
    assert together.high - together.low > 2 * (apart.high - apart.low)


@pytest.mark.parametrize("meta", [{"group": "g"}, {"document": "d"}, {"gold_passages": ["doc#7"]}])
def test_examples_are_grouped_by_what_they_share(meta: JSON) -> None:
    scores = [1, 0] * 10
    free = built(measured("t", {"prompt": scores}))["tasks"]["t"]
    tied = built(measured("t", {"prompt": scores}, [meta] * 10 + [{}] * 10))["tasks"]["t"]
    assert (free["documents"], tied["documents"]) == (20, 11)
    assert tied["arms"]["prompt"]["ci95"] != free["arms"]["prompt"]["ci95"]


def test_no_failure_is_not_no_risk() -> None:
    row = built(measured("t", {"prompt": [1] * 30}))["tasks"]["t"]["arms"]["prompt"]
    assert row["errors_below"] == pytest.approx(0.1)
    failing = measured("t", {"prompt": [0] * 30}, error="engine_error: gone")
    assert "errors_below" not in built(failing)["tasks"]["t"]["arms"]["prompt"]


# --- cost, calibration, retrieval, groundedness --------------------------------------------------------------------


def test_the_front_holds_what_nothing_dominates() -> None:
    points = {"a": (1, 0.2), "b": (2, 0.5), "c": (3, 0.5), "d": (4, 0.9), "e": (4, 0.4), "f": (1, 0.2)}
    assert pareto(points) == ["a", "f", "b", "d"]


def test_costs_and_training_are_told() -> None:
    row = {"name": "x", "version": 2, "metrics": {"seconds": 90.0, "peak_memory_mb": 900, "train_rows": 64},
           "card": {"method": "lora", "growth": {"points": [{"rows": 8, "dev_loss": 1.0}]}},
           "measured": {"forgetting": {"general": {"before": 0.5, "after": 0.4, "n": 9}}, "gap": 0.1}}  # fmt: skip
    found = built(
        measured("t", {"adapter:x": [1, 0], "prompt": [0, 0]}), adapters={"x": row, "y": {**row, "name": "y"}}
    )
    assert found["costs"]["adapter:x"]["tokens"] == {"prompt": 20, "completion": 5}
    assert [arm for arm, cost in found["costs"].items() if cost["pareto"]] == ["adapter:x"]
    assert list(found["training"]) == ["x@2"]
    assert (found["training"]["x@2"]["minutes"], found["training"]["x@2"]["peak_memory_mb"]) == (1.5, 900)
    assert found["records"]["x@2"]["forgetting"]["general"]["after"] == 0.4


def test_calibration_of_the_gate() -> None:
    right = [1] * 6 + [0] * 4
    task = measured("t", {"prompt": [1] * 10})
    gate = tuple(
        outcome("t", "auto", i, s, confidence=0.95 if i < 5 else 0.35, chosen="prompt") for i, s in enumerate(right)
    )
    found = built(Measured("t", "accuracy", task.examples, {**task.outcomes, "auto": gate}))["calibration"]
    assert [(b["low"], b["n"], b["right"]) for b in found["bins"]] == [(0.3, 5, 0.2), (0.9, 5, 1.0)]
    assert found["ece"] == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)
    assert (found["n"], found["right"]) == (10, 0.6)


def test_retrieval_is_measured_apart() -> None:
    gold = [{"gold_passages": [g]} for g in ("a", "b", "c", "d")]
    task = measured("t", {"rag": [0, 0, 0, 0], "prompt": [0] * 4}, gold)
    shown = [("a", "x", "y"), ("x", "b#2", "y"), ("x", "y", "z"), ("y", "z", "d")]
    rows = tuple(outcome("t", "rag", i, 0, passages=p) for i, p in enumerate(shown))
    found = retrieval(Measured("t", "accuracy", task.examples, {**task.outcomes, "rag": rows}))
    assert list(found) == ["rag"]
    assert (found["rag"]["recall@1"], found["rag"]["recall@3"]) == (0.25, 0.75)
    assert found["rag"]["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4, abs=1e-6)
    assert found["rag"]["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(4)) / 4, abs=1e-6)


def test_ndcg_counts_gold_passages_that_were_not_shown() -> None:
    assert ndcg(["a", "b"], ["a", "b"]) == 1
    assert ndcg(["a", "b"], ["a"]) == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert ndcg(["a"], ["a", "a#1"]) == 1
    long = [f"p{i}" for i in range(12)]
    truth, order = [[0.0] * 4 + [1.0] + [0.0] * 7], [list(range(12, 0, -1))]
    assert ndcg(["p4"], long) == pytest.approx(ndcg_score(truth, order, k=10))
    assert ndcg(["p11"], long) == 0


def test_support_by_the_passages() -> None:
    shown = ["The Wild Card\nSydney Carter wrote it in 1,971 in London."]
    assert support("Sydney Carter", "Who wrote it?", shown).shares == {"claims": 1.0, "words": 1.0, "names": 1.0}
    found = support("It was Sydney Carter of Paris, in 1971 and 1999.", "Who wrote it?", shown).shares
    assert found == {"claims": 0.0, "words": 0.6667, "numbers": 0.5, "names": 0.5}
    assert support("Who wrote it?", "Who wrote it?", shown).shares == {}
    assert support("anything", "q", []).shares == {}


# --- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page holds: tags that were left open, and everything that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br", "img", "input"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def out(tmp_path: Path, written: Path) -> Path:
    """A copy of the report folder, to be changed."""
    return shutil.copytree(written, tmp_path / "report")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report folder with something in every section, and an earlier run's leavings."""
    gold = [{"gold_passages": [f"p{i}"]} for i in range(12)]
    scores = [i % 2 for i in range(12)]
    task = measured("nq", {"prompt": [0] * 12, "rag:nq": scores, "adapter:x": [1] * 6 + [0] * 6}, gold)
    more = {"passages": ("p1", "p2"), "grounded": {"words": 0.5}}
    rag = tuple(outcome("nq", "rag:nq", i, s, **more) for i, s in enumerate(scores))
    gate = tuple(outcome("nq", "auto", i, s, confidence=0.7, chosen="rag:nq") for i, s in enumerate(scores))
    failed = (outcome("nq", "moa", 0, 0, answer="", error=f"engine_error: {SECRET} broke"),)
    task = Measured(
        "nq", "token_f1", task.examples, {**task.outcomes, "rag:nq": rag, "auto": gate, "moa": failed}, SECRET
    )
    growth = {"points": [{"rows": 8, "dev_loss": 1.0}, {"rows": 80, "dev_loss": 0.5}], "predicted": []}
    card = {"name": "x", "version": 1, "metrics": {"seconds": 60}, "card": {"method": "lora", "growth": growth},
            "measured": {"forgetting": {"general": {"before": 0.5, "after": 0.4, "n": 9}}}}  # fmt: skip
    home = tmp_path_factory.mktemp("report")
    rows = [{**asdict(o), "key": f"{o.arm}{o.id}"} for found in task.outcomes.values() for o in found]
    for name in ("outcomes.jsonl", ".earlier.jsonl"):
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.write(home, built(task, adapters={"x": card}), [task])
    return home


def test_the_page_stands_alone(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert text.count("<svg") == 4
    assert "url(http" not in text
    assert "@import" not in text
    for said in ("Leaderboard", "Quality and cost", "calibration error", "regret", "retrieval", "Forgetting", "Worst"):
        assert said in text
    assert SECRET in text
    assert "Judged by a model" not in text


def test_a_report_without_texts_holds_none(out: Path) -> None:
    before, told = folder.read(out), folder.outcomes(out)
    done = CliRunner().invoke(app, ["report", str(out), "--no-texts", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == before
    for path in out.iterdir():
        assert SECRET not in path.read_text(), path.name
    assert not (out / "examples.jsonl").exists()
    rows = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    assert {row["error"] for row in rows} == {None, "engine_error"}
    assert sum(row["score"] for row in rows) == 6 + 6 + 6
    bare = [replace(one, answer="", error=one.error and "engine_error") for one in told]
    assert folder.outcomes(out) == bare
    page = Page((out / "report.html").read_text())
    assert (page.open, page.fetched) == ([], [])
    again = CliRunner().invoke(app, ["report", str(out), "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m"])
    assert isinstance(again.exception, Exception)
    assert "without texts" in str(again.exception)


def test_an_evaluation_without_texts_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_MODEL", make_home(tmp_path).model)
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    monkeypatch.setenv("HYBRID_ENGINE__KIND", "scripted")
    task, out = tmp_path / "colours", tmp_path / "out"
    task.mkdir()
    (task / "task.json").write_text(json.dumps({"name": "colours", "metric": "accuracy", "instruction": SECRET}))
    for split in ("dev", "test"):
        row = {"id": f"{split}-1", "input": f"{SECRET} {split}", "reference": SECRET}
        (task / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    args = ["eval", str(task), "--out", str(out), "--arms", "prompt", "--no-texts", "--json"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert {p.name for p in out.iterdir()} >= {"report.json", "report.md", "report.html", "outcomes.jsonl"}
    assert not [p.name for p in out.iterdir() if SECRET in p.read_text()]
    assert "without texts" in (out / "report.html").read_text()


def test_what_is_written_short_is_read_back_whole(tmp_path: Path) -> None:
    said = [
        outcome("nq", "prompt", 0, 1 / 3),
        outcome("nq", "rag:nq", 1, 0, passages=("p1",), grounded={"words": 0.0}, chosen="rag:nq"),
        outcome("nq", "auto", 2, 1, confidence=0.0, chosen="prompt", adapter="x@1", error="engine_error: away"),
    ]
    ledger = Ledger(tmp_path)
    for one in said:
        ledger.add(one.id, one)
    ledger.close()
    file = tmp_path / "outcomes.jsonl"
    assert folder.outcomes(tmp_path) == said
    assert "grounded" not in file.read_text().splitlines()[0]
    as_added = file.read_bytes()
    ledger = Ledger(tmp_path)
    assert [ledger.get(one.id) for one in said] == said
    ledger.close([one.id for one in said])
    assert file.read_bytes() == as_added


def test_data_cannot_write_into_the_page(tmp_path: Path) -> None:
    example = (Example("e0", "<script>alert(1)</script>", "r"),)
    said = outcome("t", "prompt", 0, 0, answer="<img src=http://127.0.0.1/x>")
    task = Measured("t", "accuracy", example, {"prompt": (said,)})
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(asdict(said)) + "\n")
    folder.write(tmp_path, built(task), [task])
    page = Page((tmp_path / "report.html").read_text())
    assert not page.tags & {"script", "img"}
    assert page.fetched == []


def test_an_older_report_is_still_rendered(out: Path) -> None:
    kept = {"schema", "suite", "split", "base_model", "gate", "tasks", "overall", "router", "comparisons", "notes"}
    old = {key: value for key, value in folder.read(out).items() if key in kept}
    (out / "report.json").write_text(json.dumps(old))
    folder.render(out)
    assert "Leaderboard" in (out / "report.html").read_text()


# --- the judge -----------------------------------------------------------------------------------------------------


def graded(messages: list[JSON]) -> str:
    """What a judge would reply that likes the answers of `rag`, and is lost at the first example."""
    text = messages[-1]["content"]
    if "asked 0?" in text:
        return "I would rather not say."
    if "Answer B" not in text:
        return json.dumps({"reason": "", "score": 10 if "said rag" in text else 1})
    first, second = (part.split("\nAnswer")[0] for part in text.split("Answer A")[1].split("Answer B"))
    better = "A" if "said rag" in first else "B" if "said rag" in second else "A"
    return json.dumps({"reason": "", "better": better})


@contextmanager
def judging() -> Iterator[tuple[str, list[JSON]]]:
    """An endpoint that judges by `graded`, its URL, and what it was asked."""
    seen: list[JSON] = []

    async def chat(request: Request) -> JSONResponse:
        body = await request.json()
        seen.append(body)
        message = {"role": "assistant", "content": graded(body["messages"])}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "c", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice]})

    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])]),
                                           port=0, log_level="error"))  # fmt: skip
    thread = Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", seen
    server.should_exit = True
    thread.join()


def test_grades_stand_apart_and_errors_are_counted(out: Path) -> None:
    scores = folder.read(out)["tasks"]["nq"]["arms"]
    with judging() as (url, seen):
        args = ["report", str(out), "--judge", url, "--judge-model", "j", "--limit", "4", "--json"]
        done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    told = found["judge"]["tasks"]["nq"]
    assert (told["rag:nq"]["score"], told["prompt"]["score"], told["rag:nq"]["n"], told["rag:nq"]["errors"]) == (
        1,
        0,
        3,
        1,
    )
    assert (found["judge"]["asked"], found["judge"]["errors"]) == (16, 4)
    assert found["tasks"]["nq"]["arms"] == scores
    assert {body["response_format"]["type"] for body in seen} == {"json_schema"}
    assert "Judged by a model" in (out / "report.html").read_text()
    assert "a model's opinion" in (out / "report.md").read_text()


def test_pairs_are_asked_in_both_orders(out: Path) -> None:
    with judging() as (url, seen):

        async def ask() -> JSON:
            async with Judge(url, "j") as judge:
                cases = cases_of(folder.outcomes(out), folder.examples(out), "pairs", "prompt", 3)
                return await judged(judge, cases, "pairs", "prompt")

        found = asyncio.run(ask())
    assert len(seen) == 2 * 3 * 3
    assert "prompt" not in found["tasks"]["nq"]
    assert found["tasks"]["nq"]["rag:nq"]["score"] == 1
    assert found["tasks"]["nq"]["adapter:x"]["score"] == 0.5  # a judge that always says A has no opinion


async def test_the_engine_may_judge_and_what_is_no_verdict_is_an_error(out: Path, tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server, Judge(f"{server.url}/v1", "base") as judge:
        found = await judged(judge, cases_of(folder.outcomes(out), folder.examples(out), "rubric", limit=2), "rubric")
    assert found["asked"] == found["errors"] == 8
    assert found["tasks"] == {"nq": {}}
