"""What outcomes teach the gate: near the oracle where there is something to learn, never worse than the best single
arm where there is not, and honest about what it was shown.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from hybrid.adapters.store import AdapterStore
from hybrid.cli import main
from hybrid.errors import Conflict, DataError, NotFound, Refused
from hybrid.gate.choose import choose, fit
from hybrid.gate.learned import KINDS, Learned
from hybrid.gate.outcomes import Lessons, Seen, joined, read_outcomes
from hybrid.gate.published import (
    learned_versions,
    live_version,
    load_learned,
    promote,
    publish_learned,
    rollback,
)
from hybrid.gate.routed import Routed, cheapest_within, chosen, judge
from hybrid.gate.teach import score_for, teach, worse
from hybrid.rooms import Home
from hybrid.state import State

SUBJECTS = {
    "code": [
        "Write a Python function that sorts {}",
        "Why does my loop over {} never end?",
        "Refactor: def f({}): pass",
    ],
    "sums": ["What is {} plus 17?", "A box holds {} pens; how many are in 4 boxes?", "Solve for x: x + {} = 90"],
    "tales": ["Tell me a story about {}", "Write a poem on {}", "Invent a legend of {}"],
}
WORDS = "trees lists dogs 12 45 rivers cats 77 birds clocks 31 graphs towers 9 soups lamps 60 kites".split()  # noqa: SIM905
PRICE = {"coder": 2e-6, "counter": 3e-5, "teller": 4e-4}
EXPERT = dict(zip(PRICE, SUBJECTS, strict=True))


def rows(n: int, seed: int, price: dict[str, float] = PRICE) -> list[dict]:
    """An outcome table: every model is right nine times in ten on its own subject, and one time in ten elsewhere."""
    dice = np.random.default_rng(seed)
    out = []
    for i in range(n):
        subject = dice.choice(list(SUBJECTS))
        query = dice.choice(SUBJECTS[subject]).format(
            f"{dice.choice(WORDS)} and {dice.choice(WORDS)} no {i + 1000 * seed}"
        )
        for model in price:
            right = dice.random() < (0.9 if EXPERT[model] == subject else 0.1)
            out.append({"id": i, "input": query, "model": model, "score": float(right), "cost": price[model]})
    return out


def write(path: Path, table: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def write_csv(path: Path, table: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    return path


def bag_of_words(texts: Iterable[str]) -> np.ndarray:
    """Unit vectors [n, 48]: every word a fixed direction."""
    out = []
    for text in texts:
        words = text.lower().split()
        out.append(sum(np.random.default_rng(sum(map(ord, w)) + 31 * len(w)).normal(size=48) for w in words))
    vectors = np.array(out, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def benchmark(
    n: int, mean: np.ndarray, signal: float, seed: int, kind: type = Lessons, missing: float = 0.0, exact: bool = True
) -> tuple[Lessons, np.ndarray]:
    """A table like those of router benchmarks: eight subjects, models of these mean scores, and how much (`signal`) a
    model's worth changes with the subject; scores 0 or 1 (`exact`) or in between, costs from 1e-6 to 1e-3 dollars."""
    world, dice = np.random.default_rng(7), np.random.default_rng(seed)
    centre, worth = world.normal(size=(8, 32)), world.normal(0, signal, size=(8, len(mean)))
    subject = dice.integers(8, size=n)
    vectors = centre[subject] + 0.5 * dice.normal(size=(n, 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chance = np.clip(mean + worth[subject], 0.02, 0.98)
    drawn = dice.random((n, len(mean)))
    score = (drawn < chance).astype(float) if exact else np.clip(chance + 0.4 * (drawn - 0.5), 0, 1)
    score[dice.random(score.shape) < missing] = np.nan
    score[np.isnan(score).all(axis=1), 0] = 0.0
    cost = np.where(np.isnan(score), np.nan, np.geomspace(1e-6, 1e-3, len(mean)) * dice.uniform(0.5, 1.5, score.shape))
    names = tuple(f"model-{i}" for i in range(len(mean)))
    queries = tuple(f"question {i} of {seed}" for i in range(n))
    return kind(tuple(map(str, range(n))), queries, ("",) * n, names, score, cost), vectors.astype(np.float32)


def routed(gate: Learned, table: Seen, vectors: np.ndarray, slack: float = 0.0) -> Routed:
    return judge(table, chosen(table, *score_for(gate, table, vectors), slack))


NEAR_TIES = np.linspace(0.55, 0.6, 6)


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_which_arm_is_best_for_what(kind: str) -> None:
    gate = fit(kind, *benchmark(400, NEAR_TIES, 0.3, 1))
    found = routed(gate, *benchmark(1500, NEAR_TIES, 0.3, 2, Seen))
    assert found.auto > found.best_single + 0.1
    assert found.auto > found.random + 0.2


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("gap", [0.0, 0.2])
def test_where_there_is_nothing_to_learn_it_is_the_best_single_arm(gap: float, exact: bool) -> None:
    mean = np.linspace(0.5 - gap, 0.5 + gap, 8)
    for seed in (1, 2, 3):
        gate, _ = choose(*benchmark(300, mean, 0.0, seed, exact=exact), kinds=("knn", "linear"))
        found = routed(gate, *benchmark(3000, mean, 0.0, seed + 10, Seen, exact=exact))
        assert found.auto > found.best_single - 0.03


def test_missing_cells_teach_as_far_as_they_go() -> None:
    gate, facts = choose(*benchmark(600, NEAR_TIES, 0.3, 1, missing=0.5), kinds=("knn", "linear"))
    found = routed(gate, *benchmark(1500, NEAR_TIES, 0.3, 2, Seen, missing=0.2))
    assert found.auto > found.best_single + 0.1
    assert facts["kinds"][gate.kind]["auto"] > facts["kinds"][gate.kind]["random"]


def test_quality_is_given_away_for_cost_as_far_as_the_slack_goes() -> None:
    mean = np.array([0.6, 0.6, 0.62])
    gate, facts = choose(*benchmark(800, mean, 0.0, 1, exact=False), kinds=("knn",))
    held, vectors = benchmark(500, mean, 0.0, 2, Seen, exact=False)
    score, cost = score_for(gate, held, vectors)
    assert (chosen(held, score, cost, 0.1) == 0).mean() > 0.95  # the cheap arm is as good
    slacks, scores, costs = zip(*facts["front"], strict=True)
    assert slacks[0] == 0
    assert costs[-1] < costs[0]
    assert scores[0] >= scores[-1] - 0.02


def test_the_cheapest_arm_within_the_slack() -> None:
    score, cost = np.array([0.9, 0.85, 0.5]), np.array([3.0, 1.0, 0.1])
    assert [cheapest_within(score, cost, s) for s in (0.0, 0.05, 0.4)] == [0, 1, 2]
    assert cheapest_within(score, np.array([np.nan, 1.0, 0.1]), 0.06) == 1  # an unknown cost is the dearest
    assert cheapest_within(score, np.array([1.0, 1.0, 1.0]), 0.1) == 0


def test_scores_mean_what_they_say_and_the_best_arm_is_among_those_that_may_be() -> None:
    gate, facts = choose(*benchmark(1000, NEAR_TIES, 0.3, 1), kinds=("knn",))
    held, vectors = benchmark(1500, NEAR_TIES, 0.3, 2, Seen)
    estimate = gate.predict(held.queries, vectors, explain=False)
    assert ((estimate.score >= 0) & (estimate.score <= 1)).all()
    assert abs(estimate.score.mean() - held.score.mean()) < 0.03
    assert facts["calibration"]["ece_after"] < 0.05
    best = held.score == held.score.max(axis=1, keepdims=True)
    sets = estimate.score >= estimate.score.max(axis=1, keepdims=True) - gate.conformal.gap
    assert (best & sets).any(axis=1).mean() > 0.87
    assert set(gate.may_be_best(estimate.score[0])) == {
        a for a, inside in zip(gate.arms, sets[0], strict=True) if inside
    }


def test_unusual_requests_are_told_by_a_p_value_and_by_their_neighbours() -> None:
    gate, _ = choose(*benchmark(600, NEAR_TIES, 0.3, 1), kinds=("knn",))
    held, usual = benchmark(500, NEAR_TIES, 0.3, 2, Seen)
    dice = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
    strange = dice / np.linalg.norm(dice, axis=1, keepdims=True)
    assert (gate.predict(held.queries, usual).typical < 0.05).mean() < 0.1
    assert (gate.predict(["?"] * 200, strange).typical < 0.05).mean() > 0.9
    [nearest] = gate.predict(["x"], usual[:1]).nearest
    assert len(nearest) == 5
    assert [c for _, c, _ in nearest] == sorted((c for _, c, _ in nearest), reverse=True)
    assert all(text.startswith("question ") and set(scores) == set(gate.arms) for text, _, scores in nearest)


def test_an_arm_is_not_taken_where_nobody_measured_it() -> None:
    table, vectors = benchmark(400, NEAR_TIES[:3], 0.0, 1)
    easy = vectors[:, 0] > 0  # one task is easy, and only there was the third arm tried
    score = np.where(easy[:, None], 0.9, 0.2) * np.ones((400, 3))
    score[~easy, 2] = np.nan
    tasks = tuple("easy" if e else "hard" for e in easy)
    grouped = Lessons(table.ids, table.queries, tasks, ("prompt", "rag:a", "adapter:b"), score, table.cost)
    gate, _ = choose(grouped, vectors, kinds=("knn", "linear"))
    hard = gate.predict(table.queries, vectors, explain=False).score[~easy]
    assert (hard[:, 2] <= hard[:, :2].max(axis=1) + 1e-3).mean() > 0.95


def specialists(each: int, seed: int, asked: int) -> tuple[Lessons, np.ndarray]:
    """Eight tasks, each with an arm of its own that is right six times in ten; the others, right four and a half times
    in ten, were asked the first `asked` of its `each` rows alone."""
    centre, dice = np.random.default_rng(7).normal(size=(8, 32)), np.random.default_rng(seed)
    task = np.repeat(np.arange(8), each)
    vectors = centre[task] + 0.5 * dice.normal(size=(len(task), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = task[:, None] == np.arange(8)
    score = (dice.random(own.shape) < np.where(own, 0.6, 0.45)).astype(float)
    score[~own & (np.arange(len(task)) % each >= asked)[:, None]] = np.nan
    names, queries = (
        tuple(f"adapter:t{i}" for i in range(8)),
        tuple(f"question {i} of {seed}" for i in range(len(task))),
    )
    return Lessons(queries, queries, tuple(f"t{t}" for t in task), names, score, score), vectors.astype(np.float32)


def test_an_arm_that_was_lucky_on_ten_rows_is_not_taken_for_the_best() -> None:
    gate, facts = choose(*specialists(60, 1, 10), kinds=("tasks", "linear"))
    table, vectors = specialists(200, 2, 200)
    taken = gate.predict(table.queries, vectors, explain=False).score.argmax(axis=1)
    assert (taken == np.repeat(np.arange(8), 200)).mean() > 0.85
    assert facts["chosen"] == "tasks"
    assert facts["kinds"]["tasks"]["trust"]["doubt"] > 0
    assert abs(facts["kinds"]["tasks"]["auto"] - float(table.score[np.arange(1600), taken].mean())) < 0.08


def test_the_same_outcomes_give_the_same_file(tmp_path: Path) -> None:
    table, vectors = benchmark(200, NEAR_TIES, 0.3, 1)
    home = Home(tmp_path)
    for _ in range(2):
        gate, facts = choose(table, vectors)
        publish_learned(home, "gate", gate, "e5", facts)
    first, second = (json.loads((tmp_path / f"adapters/gate/{v}/card.json").read_text())["sha256"] for v in (1, 2))
    assert first == second


# --- reading ---------------------------------------------------------------------------------------------------------


def test_csv_and_jsonl_are_the_same_table(tmp_path: Path) -> None:
    table = rows(30, 1)
    one = read_outcomes([write(tmp_path / "t.jsonl", table)], teach=True)
    two = read_outcomes([write_csv(tmp_path / "t.csv", table)], teach=True)
    assert (one.ids, one.queries, one.arms) == (two.ids, two.queries, two.arms)
    assert np.array_equal(one.score, two.score)
    assert np.array_equal(one.cost, two.cost)


def test_repeated_rows_are_averaged_and_empty_cells_are_not_measured(tmp_path: Path) -> None:
    first = [
        {"id": 1, "input": "q", "model": "a", "score": 1, "cost": 2},
        {"id": 1, "input": "q", "model": "a", "score": 0},
        {"id": 1, "input": "q", "model": "b", "score": None, "cost": 1},
        {"id": "2", "input": "r", "model": "b", "score": 0.5, "cost": 1e-6},
    ]
    more = [{"id": "1", "input": "q", "model": "c", "score": True, "cost": None}]
    table = read_outcomes([write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", more)], teach=True)
    assert (table.ids, table.arms) == (("1", "2"), ("a", "b", "c"))
    assert np.array_equal(table.score, [[0.5, np.nan, 1], [np.nan, 0.5, np.nan]], equal_nan=True)
    assert np.array_equal(table.cost, [[2, np.nan, np.nan], [np.nan, 1e-6, np.nan]], equal_nan=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 1, "input": "q", "model": "a"}', "lacks score"),
        ('{"id": 9, "input": "q", "model": "a", "score": 7}', "not in 0 to 1"),
        ('{"id": 9, "input": "q", "model": "a", "score": "good"}', "no number"),
        ('{"id": 9, "input": "q", "model": "a", "score": 1, "cost": -1}', "cost -1"),
        ('{"id": 0, "input": "another", "model": "a", "score": 1}', "stands for another input"),
        ('{"id": null, "input": "q", "model": "a", "score": 1}', "`id`"),
        ("[1, 2]", "a row is an object"),
        ("{", "no JSON"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path / "t.jsonl", rows(2, 1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"t\.jsonl:7: .*{words}"):
        read_outcomes([path], teach=True)


def test_a_wrong_csv_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,input,model,score,cost\n1,q,a,1,0\n1,q,b,2,0\n")
    with pytest.raises(DataError, match=r"t\.csv:3: the score 2"):
        read_outcomes([path], teach=True)
    path.write_text("id,prompt,model,score\n1,q,a,1\n")
    with pytest.raises(DataError, match=r"t\.csv:1: .*input"):
        read_outcomes([path], teach=True)


def test_one_arm_no_scores_and_too_few_queries_are_refused(tmp_path: Path) -> None:
    single = [row for row in rows(20, 1) if row["model"] == "coder"]
    with pytest.raises(DataError, match="one arm only, coder"):
        read_outcomes([write(tmp_path / "one.jsonl", single)], teach=True)
    with pytest.raises(DataError, match="no scores"):
        read_outcomes([write(tmp_path / "none.jsonl", [])], teach=True)
    with pytest.raises(DataError, match="neither a report folder"):
        read_outcomes([tmp_path / "nowhere.jsonl"], teach=True)
    few = read_outcomes([write(tmp_path / "few.jsonl", rows(5, 1))], teach=True)
    with pytest.raises(DataError, match="5 different queries"):
        choose(few, bag_of_words(few.queries))


def make_report(folder: Path, split: str, texts: bool = True) -> Path:
    """A report of two tasks whose own adapters are best, as `hybrid eval` writes it."""
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps({"schema": 1, "split": split}))
    examples, outcomes = [], []
    for task, subject in (("code", "code"), ("sums", "sums")):
        for i in range(30):
            query = SUBJECTS[subject][i % 3].format(f"{WORDS[i % 18]} {i}")
            examples.append(
                {"task": task, "id": f"e{i}", "instruction": f"Do {task}.", "input": query, "reference": ""}
            )
            for arm in ("prompt", "adapter:code", "adapter:sums", f"rag:{task}", "auto"):
                score = {"prompt": 0.3, f"adapter:{task}": 0.9, f"rag:{task}": 0.4, "auto": 0.5}.get(arm, 0.1)
                counts = {"prompt_tokens": 10, "completion_tokens": 5 + 20 * arm.startswith("rag")}
                outcomes.append({"task": task, "id": f"e{i}", "arm": arm, "score": score, "answer": "", **counts})
    write(folder / "outcomes.jsonl", outcomes)
    if texts:
        write(folder / "examples.jsonl", examples)
    return folder


def test_a_report_is_read_as_the_gate_will_see_it(tmp_path: Path) -> None:
    table = read_outcomes([make_report(tmp_path / "dev", "dev")], teach=True)
    assert table.arms == ("prompt", "adapter:code", "adapter:sums", "rag:code", "rag:sums")
    assert table.queries[0].startswith("Do code.\n\nWrite a Python function")
    assert table.groups == ("code",) * 30 + ("sums",) * 30
    assert table.cost[0, 0] == 15
    gate, _ = choose(table, bag_of_words(table.queries), kinds=("knn",))
    found = routed(gate, table, bag_of_words(table.queries))
    assert found.auto == pytest.approx(0.9)
    assert found.best_arm.startswith("adapter:")  # `rag` is one arm, and scores 0.4
    assert found.best_single == pytest.approx(0.5)
    assert found.recovered == pytest.approx(1.0)


def test_a_test_split_never_teaches_and_a_report_without_texts_says_how_to_get_them(tmp_path: Path) -> None:
    report = make_report(tmp_path / "test", "test")
    with pytest.raises(Refused, match="test split, which nothing may learn from"):
        read_outcomes([report], teach=True)
    seen = read_outcomes([report], teach=False)
    with pytest.raises(Refused, match="not to teach"):
        choose(seen, bag_of_words(seen.queries))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="--no-texts"):
        read_outcomes([make_report(tmp_path / "bare", "dev", texts=False)], teach=True)


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate() -> Learned:
    return fit("knn", *benchmark(200, NEAR_TIES, 0.3, 1))


def test_a_taught_gate_comes_back_as_it_was(tmp_path: Path, gate: Learned) -> None:
    home = Home(tmp_path)
    assert load_learned(home, "gate", None, "e5") is None
    assert publish_learned(home, "gate", gate, "e5", {}) == 1
    assert load_learned(home, "gate", None, "e5") is None  # published, not promoted
    promote(home, "gate", 1)
    found = load_learned(home, "gate", None, "e5")
    assert found is not None
    held, vectors = benchmark(50, NEAR_TIES, 0.3, 3, Seen)
    here, there = gate.predict(held.queries, vectors), found[0].predict(held.queries, vectors)
    assert np.allclose(here.score, there.score)
    assert np.allclose(here.cost, there.cost)
    assert here.nearest == there.nearest


@pytest.mark.parametrize("harm", ["file", "embedder", "card"])
def test_a_gate_that_was_changed_or_does_not_fit_is_refused(tmp_path: Path, gate: Learned, harm: str) -> None:
    home = Home(tmp_path)
    publish_learned(home, "gate", gate, "e5", {})
    file = tmp_path / "adapters/gate/1/gate.safetensors"
    if harm == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    if harm == "card":
        card = file.with_name("card.json")
        card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": "0" * 64}))
    with pytest.raises(Refused, match="gate@1"):
        load_learned(home, "gate", 1, "other" if harm == "embedder" else "e5")
    with pytest.raises(NotFound, match="published versions: 1"):
        load_learned(home, "gate", 7, "e5")


def test_a_name_moves_forth_and_back(tmp_path: Path, gate: Learned) -> None:
    home = Home(tmp_path)
    for version in (1, 2):
        publish_learned(home, "gate", gate, "e5", {})
        promote(home, "gate", version)
    assert live_version(home) == 2
    assert rollback(home) == 1
    assert live_version(home) == 1
    with pytest.raises(Conflict, match="no earlier"):
        rollback(home)
    with pytest.raises(NotFound):
        promote(home, "gate", 3)


def test_a_gate_of_another_name_is_no_adapter(tmp_path: Path, gate: Learned) -> None:
    home = Home(tmp_path)
    publish_learned(home, "second", gate, "e5", {})
    assert AdapterStore(home, State(home.database)).versions() == []
    assert learned_versions(home, "second") == [1]
    (tmp_path / "adapters/taken/1").mkdir(parents=True)
    (tmp_path / "adapters/taken/1/card.json").write_text('{"kind": "head"}')
    for name, words in (("taken", "the name of an adapter"), ("rag", "reserved"), ("../x", "cannot name")):
        with pytest.raises(Refused, match=words):
            publish_learned(home, name, gate, "e5", {})


def test_a_new_gate_replaces_the_live_one_unless_it_is_measured_worse(tmp_path: Path) -> None:
    table, vectors = benchmark(400, NEAR_TIES, 0.3, 1)
    good = fit("knn", table, vectors)
    blind = np.random.default_rng(0).permutation(vectors)  # what a broken embedder would teach
    bad, _ = choose(table, blind, kinds=("knn",))
    assert "less than the live gate on 400 shared outcomes" in worse(bad, good, table, vectors)
    assert worse(good, bad, table, vectors) == ""
    assert worse(good, good, table, vectors) == ""
    # a few outcomes may look well by chance, and say too little against a gate that many taught
    few = table.rows(np.arange(16))
    hasty = fit("knn", few, vectors[:16])
    assert "16 shared outcomes are too few" in worse(hasty, good, few, vectors[:16])
    assert worse(good, hasty, table, vectors) == ""
    home = Home(tmp_path)

    def shown(texts: Iterable[str]) -> np.ndarray:
        place = {query: i for i, query in enumerate(table.queries)}
        return vectors[[place[text] for text in texts]]

    first = teach(home, table, shown, "e5", tmp_path / "cache")
    assert (first.version, first.promoted) == (1, True)
    second = teach(home, table, lambda _: pytest.fail("the vectors are kept"), "e5", tmp_path / "cache")
    assert (second.version, second.promoted, live_version(home)) == (2, True, 2)


# --- the command -----------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `hybrid …` in this process and home: (exit code, stdout)."""
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hybrid", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), capsys.readouterr().out

    return run


def test_train_show_and_eval(tmp_path: Path, hybrid: Run) -> None:
    train, test = write(tmp_path / "train.jsonl", rows(90, 1)), write(tmp_path / "test.jsonl", rows(60, 2))
    code, out = hybrid("gate", "train", "--from", train, "--json")
    taught = json.loads(out.splitlines()[-1])
    assert code == 0
    assert taught["name"] == "gate"
    assert taught["version"] == 1
    assert taught["kind"] in KINDS
    assert Path(taught["path"]) == tmp_path / "adapters" / "gate" / "1"
    assert taught["metrics"]["auto"] > taught["metrics"]["best_single"]["score"]

    copy = write_csv(tmp_path / "train.csv", rows(90, 1))
    code, out = hybrid("gate", "train", "--from", copy, "--name", "other", "--json")
    assert (code, json.loads(out)["name"]) == (0, "other")
    cards = [json.loads((tmp_path / f"adapters/{name}/1/card.json").read_text()) for name in ("gate", "other")]
    assert cards[0]["sha256"] == cards[1]["sha256"]  # the same outcomes in another form
    assert (cards[0]["kind"], cards[1]["arms"]) == ("gate", ["coder", "counter", "teller"])
    assert json.loads(hybrid("adapters", "list", "--json")[1]) == {"adapters": []}

    code, out = hybrid("gate", "show", "--json")
    card = json.loads(out)
    assert card["live"] is True
    assert set(card["kinds"]) == set(KINDS)
    assert all(
        {"auto", "random", "best_single", "oracle", "recovered", "cost", "n"} <= set(k) for k in card["kinds"].values()
    )
    assert "taken" in hybrid("gate", "show", "other@1")[1]

    code, out = hybrid("gate", "eval", "--gate", "gate", "--on", test, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) == {"auto", "random", "best_single", "oracle", "recovered", "cost", "n"}
    assert set(found["best_single"]) == {"arm", "score"}
    assert set(found["cost"]) == {"auto", "best_single"}
    assert found["n"] == 60
    assert found["auto"] > found["best_single"]["score"] + 0.2
    assert found["recovered"] > 0.6
    cheap = json.loads(hybrid("gate", "eval", "--gate", "gate@1", "--on", test, "--quality-cost", "0", "--json")[1])
    assert cheap["cost"]["auto"] == pytest.approx(PRICE["coder"])

    assert hybrid("gate", "promote", "other@1")[0] == 0
    assert hybrid("gate", "rollback", "other")[0] == 1
    assert hybrid("gate", "eval", "--gate", "gate@9", "--on", test)[0] == 1
    assert hybrid("gate", "show", "nobody")[0] == 1
    assert hybrid("gate", "promote", "gate")[0] == 2


def test_a_gate_is_not_taught_with_a_test_split_and_is_judged_on_one(tmp_path: Path, hybrid: Run) -> None:
    dev, test = make_report(tmp_path / "dev", "dev"), make_report(tmp_path / "test", "test")
    assert hybrid("gate", "train", "--from", test)[0] == 1
    assert not (tmp_path / "adapters").exists()
    assert hybrid("gate", "train", "--from", dev)[0] == 0
    found = json.loads(hybrid("gate", "eval", "--on", test, "--json")[1])
    assert found["auto"] > found["best_single"]["score"]
    shutil.rmtree(tmp_path / "adapters/gate/1")
    assert hybrid("gate", "eval", "--on", test)[0] == 1


def test_what_was_measured_elsewhere_stays_beside_what_is_new(tmp_path: Path) -> None:
    def source(name: str, asked: range, arm: str) -> Path:
        rows = [
            {"id": f"{n}", "input": f"question {n}", "model": one, "score": float(one == arm)}
            for n in asked
            for one in ("prompt", arm)
        ]
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    new = read_outcomes([source("new.jsonl", range(8), "adapter:a")], teach=True)
    old = read_outcomes([source("old.jsonl", range(4, 20), "rag:b")], teach=True)
    both = joined(new, old)
    assert len(both) == 20
    assert set(both.arms) == {"prompt", "adapter:a", "rag:b"}
    measured = dict(zip(both.queries, np.isfinite(both.score[:, both.arms.index("rag:b")]), strict=True))
    # a query that both hold is told by the newer outcomes alone
    assert [measured[f"question {n}"] for n in (0, 5, 9)] == [False, False, True]
