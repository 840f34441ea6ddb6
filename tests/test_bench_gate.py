"""`hybrid bench gate` says what the gate of a home is worth, from a measured report and among strangers."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_kit import filling, make_base
from gate_kit import BOOKS, GARDEN_TASK, ISLAND_ASKED, LIBRARY_TASK, ORDERS, PASSAGES, PLANTS, TROUBLES
from typer.testing import CliRunner

from hybrid.adapters.store import AdapterStore
from hybrid.bench.gate import strangers
from hybrid.bench.house import open_house, own
from hybrid.bench.newcomer import without
from hybrid.bench.plain import auroc, baselines
from hybrid.bench.routed import Field
from hybrid.cli import app
from hybrid.errors import BadRequest, DataError
from hybrid.gate.choose import fit
from hybrid.gate.general import general_lines, outside_lines
from hybrid.gate.lexicon import Wording
from hybrid.gate.outcomes import Lessons, Seen, read_outcomes
from hybrid.gate.teach import teach
from hybrid.knowledge import corpus, embed
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.knowledge.search import Library
from hybrid.models import ModelFiles
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings, Settings
from hybrid.state import State
from hybrid.types.arm import Arm
from hybrid.types.decision import Decision

GARDEN = [t.format(p) for t in TROUBLES for p in PLANTS]
BORROW = [t.format(b) for t in ORDERS for b in BOOKS]
#: what each arm scores on the requests of a task, and what an answer costs
SCORES: Mapping[str, Mapping[str, float]] = {
    "garden": {"prompt": 0, "adapter:garden": 1, "adapter:library": 0, "rag:island": 0},
    "library": {"prompt": 0, "adapter:garden": 0, "adapter:library": 1, "rag:island": 0},
    "island": {"prompt": 0, "adapter:garden": 0, "adapter:library": 0, "rag:island": 1},
}
COSTS = {"prompt": 40, "adapter:garden": 45, "adapter:library": 45, "rag:island": 400}


def write_report(folder: Path, split: str, tasks: Mapping[str, tuple[str, Sequence[str]]]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"schema": 1, "split": split}))
    examples, outcomes = [], []
    for task, (instruction, inputs) in tasks.items():
        for i, text in enumerate(inputs):
            examples.append({"task": task, "id": str(i), "instruction": instruction, "input": text, "reference": ""})
            for arm, score in SCORES[task].items():
                tokens = {"prompt_tokens": COSTS[arm] - 5, "completion_tokens": 5}
                outcomes.append({"task": task, "id": str(i), "arm": arm, "score": score, **tokens})
    for name, rows in (("examples", examples), ("outcomes", outcomes)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def publish(store: AdapterStore, base: Any, name: str, shelf: Shelf) -> None:
    def fill(staging: Path) -> dict[str, Any]:
        card = filling(base)(staging)
        shelf.write(staging)
        return card

    version = store.publish(name, fill)
    store.mark(version.id, "candidate")
    store.promote(name, version.version)


@pytest.fixture(scope="module")
def home(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, a corpus, and a gate taught by a dev report."""
    root = tmp_path_factory.mktemp("gate-home")
    rooms, cache = Home(root), tmp_path_factory.getbasetemp() / "gate-cache"
    state = State(rooms.database)
    store, base = AdapterStore(rooms, state), make_base(root / "base")
    for name, task, inputs in (("garden", GARDEN_TASK, GARDEN[:40]), ("library", LIBRARY_TASK, BORROW[:40])):
        pairs = [(text, "x") for text in inputs]
        publish(store, base, name, Shelf.embedded(name, task, pairs, embedder, cache))
    documents = root / "documents"
    documents.mkdir()
    for title, text in PASSAGES:
        (documents / f"{title}.md").write_text(f"# {title}\n\n{text}\n")
    library = Library(rooms, embedder, RetrievalSettings())
    library.ingest("island", documents)
    library.close()
    state.close()
    dev = write_report(
        root / "dev", "dev",
        {"garden": (GARDEN_TASK, GARDEN[:40]), "library": (LIBRARY_TASK, BORROW[:40]), "island": ("", ISLAND_ASKED)},
    )  # fmt: skip
    made = teach(
        rooms, read_outcomes([dev], teach=True), embedder.embed_queries, embedder.query_digest, Settings.load().cache
    )
    assert made.promoted
    return root


@pytest.fixture(scope="module")
def report(home: Path) -> Path:
    asked = {"garden": (GARDEN_TASK, GARDEN[40:]), "library": (LIBRARY_TASK, BORROW[40:]), "island": ("", ISLAND_ASKED)}
    return write_report(home / "test", "test", asked)


def run(home: Path, *args: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_HOME", str(home))
        done = CliRunner().invoke(app, ["bench", "gate", *args, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(home: Path, report: Path) -> dict[str, Any]:
    return run(home, "--on", str(report), "--gate", "gate@1", "--out", str(home / "out" / "gate.json"))


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_the_gate_stands_beside_every_fixed_choice(found: dict[str, Any]) -> None:
    router = found["summary"]["router"]
    assert router["oracle"] == router["best_per_task"] == 1
    assert router["random"] == 0.25
    assert router["best_single"]["score"] == pytest.approx(1 / 3, abs=1e-6)
    assert router["auto"]["score"] > 0.9
    assert router["recovered"] == pytest.approx((router["auto"]["score"] - 1 / 3) / (2 / 3), abs=1e-3)
    assert router["over_best_single"]["ci95"][0] > 0.4
    assert router["best_elsewhere"] == 1
    assert router["best_unrouted"]["score"] == router["best_single"]["score"]
    assert [row["task"] for row in found["rows"]] == ["garden", "library", "island"]
    assert all(sum(row["taken"].values()) == row["n"] for row in found["rows"])


def test_luck_is_told_from_merit_and_fixed_arms_from_those_that_ask_the_gate(tmp_path: Path) -> None:
    dice, rows = np.random.default_rng(0), []
    for number in range(60):
        arms = {f"rag:c{i}": float(dice.random() < 0.5) for i in range(20)} | {
            "prompt": 0.25,
            "moa": 1.0 * (number > 9),
        }
        rows += [{"id": number, "input": f"question {number}", "model": a, "score": s} for a, s in arms.items()]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows if row["model"] != "moa"))
    field = Field(read_outcomes([table], teach=False))
    (task,) = field.tasks
    assert field.best_arm(task)[1] > 0.57  # the luckiest of twenty coins
    assert field.best_elsewhere == pytest.approx(0.5, abs=0.05)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    field = Field(read_outcomes([table], teach=False))
    assert field.best_single[0] == "moa"
    unrouted = field.best_unrouted
    assert unrouted is not None
    assert unrouted[0].startswith("rag:c")
    assert field.best_elsewhere == pytest.approx(50 / 60)


def test_the_knob_and_what_answers_cost(found: dict[str, Any]) -> None:
    curve = found["summary"]["knob"]["curve"]
    assert [point["quality_cost"] for point in curve] == [0, 0.25, 0.5, 0.75, 0.9, 1]
    assert all(40 <= point["tokens"] <= 400 for point in curve)
    tokens = found["summary"]["tokens"]
    assert tokens["always_rag"] == 400
    assert tokens["ratio"] == pytest.approx(tokens["auto"] / 400, abs=1e-3)


def test_requests_find_the_arms_of_their_own_task(found: dict[str, Any]) -> None:
    own_arm = found["summary"]["own_arm"]
    assert own_arm["n"] == 26
    assert own_arm["share"] > 0.9
    assert {name: one["n"] for name, one in own_arm["with_examples"].items()} == {"gate": 20, "knn": 20, "logistic": 20}


def test_requests_without_their_instruction_find_them_too(found: dict[str, Any]) -> None:
    bare = found["summary"]["bare"]
    assert bare["own"]["n"] == 26
    assert bare["own"]["share"] > 0.8
    assert bare["score"] > 0.8


def test_a_new_adapter_gets_its_own_requests_and_no_others(found: dict[str, Any]) -> None:
    newcomers = found["summary"]["newcomers"]
    assert set(newcomers["adapters"]) == {"garden", "library"}
    assert newcomers["all"]["own"]["n"] == 20
    assert newcomers["all"]["own"]["share"] >= 0.9
    assert newcomers["all"]["others"] == {"share": 0.0, "ci95": newcomers["all"]["others"]["ci95"], "n": 32}


def test_tasks_that_nothing_is_made_for_lose_nothing_by_routing(found: dict[str, Any]) -> None:
    before = found["summary"]["newcomers"]["before"]
    assert before["over_prompt"]["n"] == 20
    assert set(before["by_task"]) == {"garden", "library"}
    assert before["over_prompt"]["ci95"][0] <= before["over_prompt"]["diff"] <= before["over_prompt"]["ci95"][1]
    assert before["over_prompt"]["diff"] >= -0.01


def test_strangers_stay_out_and_acquaintances_are_let_in(found: dict[str, Any]) -> None:
    strange = found["summary"]["strangers"]
    assert strange["kept_out"]["n"] == len(strangers())
    assert strange["kept_out"]["share"] > 0.8
    assert sum(one["n"] for one in strange["by_kind"].values()) == len(strangers())
    let_in = round((1 - strange["kept_out"]["share"]) * len(strangers()))
    assert len(strange["let_in"]) == let_in
    assert strange["turned_away"]["share"] < 0.1
    assert 0.9 < strange["auroc"]["gate"] <= 1
    assert 0.5 < strange["auroc"]["nearest_five"] <= 1


def test_every_request_is_embedded_once(found: dict[str, Any]) -> None:
    time = found["summary"]["time"]
    assert time["embedded"] == time["requests"] == 26
    assert time["embedded_by_search"] == 0
    assert found["summary"]["glance"]["told"]["share"] == 0  # a few dozen rows make no arm known well enough
    assert 0 < time["ms_vector_known"]["p50"] <= time["ms"]["p95"]
    assert time["ms_embedded"] == time["ms"]


def test_the_first_request_waits_for_nothing_to_be_made(
    home: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of words, the embedder and the corpora are there before the first request is: else it comes too late and
    is answered by the default arm."""
    monkeypatch.setenv("HYBRID_HOME", str(home))

    async def first() -> tuple[Decision, list[str]]:
        made: list[str] = []
        async with open_house(Settings.load(), ModelFiles(embedder.name, embedder.path, ""), None) as house:
            for owner, name in ((Wording, "of"), (corpus, "load"), (embed, "_load")):
                monkeypatch.setattr(owner, name, lambda *_, name=name: made.append(name))
            return await house.decide(GARDEN[0]), made

    decision, made = asyncio.run(first())
    assert made == []
    assert (decision.arm, decision.fallback) == (Arm("adapter", ("garden",)), None)


def test_goals_and_files(found: dict[str, Any], home: Path) -> None:
    goals = {goal["what"]: goal for goal in found["goals"]}
    assert len(goals) == 12
    assert goals["recovered"]["limit"] == 0.6
    assert json.loads((home / "out" / "gate.json").read_text()) == found
    assert (home / "out" / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_said(home: Path, report: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no arm but"):
        run(tmp_path, "--on", str(report))
    with pytest.raises(BadRequest, match="gate@VERSION"):
        run(home, "--on", str(report), "--gate", "gate@new")


# --- strangers -------------------------------------------------------------------------------------------------------


def test_strangers_are_many_and_not_those_that_teach() -> None:
    texts = [line.text for line in strangers()]
    known = {line.casefold() for line in (*general_lines(), *outside_lines())}
    assert len(texts) == len(set(texts)) >= 240
    assert not [text for text in texts if text.casefold() in known]
    assert {"zh", "ar", "hi", "ru", "es", "de", "fr", "sw"} <= {line.language for line in strangers()}
    assert min(Counter(line.kind for line in strangers()).values()) >= 8


# --- the yardstick ---------------------------------------------------------------------------------------------------


def table(kind: type[Any] = Seen, n: int = 1) -> Any:
    """Two tasks of two examples, `n` times; `rag:a` and `head:b` were not measured everywhere."""
    arms = ("prompt", "few_shot:a", "few_shot:b", "rag:a", "head:b")
    nan = math.nan
    score = np.array([[0, 1, nan, nan, nan], [1, 1, nan, 0, nan], [0, nan, 1, nan, 0], [1, nan, 0, nan, 1]])
    cost = np.where(np.isnan(score), np.nan, [10.0, 50.0, 60.0, 100.0, 1.0])
    return kind(
        ids=tuple(map(str, range(4 * n))),
        queries=tuple(f"{'ab'[i % 4 // 2]} question {i} {'xyz'[i % 3]}" for i in range(4 * n)),
        groups=("a", "a", "b", "b") * n,
        arms=arms,
        score=np.tile(score, (n, 1)),
        cost=np.tile(cost, (n, 1)),
    )


def test_an_arm_that_was_not_measured_counts_with_its_mean_or_that_of_prompt() -> None:
    field = Field(table())
    taken = field.taken([Arm.parse(name) for name in ("rag:a", "prompt", "head:b", "adapter:unknown")])
    assert taken.score.tolist() == [0, 1, 0, 0.5]
    assert taken.cost.tolist() == [100, 10, 1, 10]
    assert taken.guessed.tolist() == [True, False, False, True]


def test_an_arm_named_after_its_task_is_one_arm() -> None:
    field = Field(table())
    assert field.best_single[0] == "few_shot"
    router = field.router(field.taken([Arm.parse(n) for n in ("few_shot:a", "prompt", "few_shot:b", "head:b")]))
    assert router["best_single"] == {"arm": "few_shot", "score": 0.75}
    assert (router["oracle"], router["best_per_task"], router["auto"]["score"]) == (1, 0.75, 1)
    assert router["recovered"] == 1
    assert router["over_best_single"]["diff"] == 0.25


def test_a_report_without_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="prompt"):
        Field(Seen(("1",), ("q",), ("a",), ("few_shot:a",), np.ones((1, 1)), np.ones((1, 1))))


def test_a_task_is_taken_out_of_what_was_taught() -> None:
    lessons = table(Lessons, n=6)
    vectors = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    learned = without(fit("knn", lessons, vectors), "b", lambda arm: arm.args == ("b",))
    assert learned is not None
    assert learned.arms == ("prompt", "few_shot:a", "rag:a")
    assert learned.memory.groups == ("a",)
    assert without(learned, "a", lambda arm: arm.args == ("a",)) is None


def test_whose_arm_it_is() -> None:
    mine = ("adapter:bank", "adapter+rag:bank:laws", "few_shot:bank", "head:bank", "rag:bank", "adapter:bank@2")
    tasks = {"tellers": "bank"}
    assert all(own("bank", Arm.parse(name), tasks) for name in (*mine, "adapter:tellers", "head:tellers"))
    others = ("prompt", "adapter:other", "adapter+rag:other:bank", "rag:laws", "rag:tellers")
    assert not any(own("bank", Arm.parse(name), tasks) for name in others)


def test_plain_classifiers_and_their_measure() -> None:
    axes = np.eye(4, dtype=np.float32)
    said = baselines({"a": axes[[0] * 12], "b": axes[[1] * 12]}, axes[[0, 1, 1]])
    assert said == {"knn": ["a", "b", "b"], "logistic": ["a", "b", "b"]}
    assert baselines({"a": axes}, axes) == {}
    assert (auroc([3, 2], [1, 2]), auroc([], [1])) == (0.875, None)
