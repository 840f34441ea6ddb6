"""`hybrid data`: what it says of rows, and that chosen, labelled and grown rows are worth what it says."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from server_kit import make_home, running
from test_data import ASKED, row, task, turns, write
from tiny_model import make_tiny_model
from typer.testing import CliRunner

from hybrid.cli import app
from hybrid.errors import BadRequest, Conflict, DataError, EngineError, EngineRejected, HybridError
from hybrid.training.balance import Distribution, balance, skew
from hybrid.training.choose import choose, simulate
from hybrid.training.data import read_dataset
from hybrid.training.lengths import Lengths
from hybrid.training.probe import Probe

PNG = b"\x89PNG"
FOODS = "bread soup rice beans eggs fish leeks oats plums cheese lentils peppers squash kale tofu".split()  # noqa: SIM905  easier to read
CITIES = "Oslo Lima Cairo Delhi Perth Quito Turin Osaka Dakar Leeds Minsk Sofia Accra Hanoi Bergen".split()  # noqa: SIM905  easier to read
BANDS = "Abba Queen Blur Pulp Suede Toto Heart Kiss Rush Styx Asia Genesis Boston Journey Devo".split()  # noqa: SIM905  easier to read


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the tiny model, and the working directory of the commands."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HYBRID_HOME", str(folder))
    return folder


def run(*args: object, code: int = 0) -> dict:
    """What a command says as JSON; an error of ours is raised as it is."""
    done = CliRunner().invoke(app, ["data", *map(str, args), "--json"])
    if isinstance(done.exception, HybridError):
        raise done.exception
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def topics(foods: list[str], cities: list[str], bands: list[str]) -> list[dict]:
    said = [(f"What can I cook tonight with {food}?", "cooking") for food in foods]
    said += [(f"Will it rain in {city} tomorrow?", "weather") for city in cities]
    said += [(f"Please play the new song by {band}.", "music") for band in bands]
    return [{"id": f"r{n}", "input": text, "reference": label, "meta": {}} for n, (text, label) in enumerate(said)]


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A closed task of three topics that a head learns from ten rows each."""
    train, dev = ([words[cut] for words in (FOODS, CITIES, BANDS)] for cut in (slice(10), slice(10, 13)))
    labels = ["cooking", "weather", "music"]
    return task(tmp_path / "topics", train=topics(*train), dev=topics(*dev), test=[], labels=labels, metric="accuracy")


# --- check ---------------------------------------------------------------------------------------------------------


def test_check_reports_counts_lengths_balance_and_every_complaint(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_MODEL", str(make_tiny_model(tmp_path / "tiny").path))
    rows = [{**row(n, "yes" if n % 4 else "no"), "meta": {"group": n % 5}} for n in range(80)]
    rows += [row(1), {"input": ASKED, "reference": "yes"}, {"input": ASKED + "?", "reference": "yes"}]
    rows[7] = {"input": "x " * 1000, "reference": "no"}
    folder = task(tmp_path / "t", train=[*rows, {"input": "q"}], dev=[row("d")], test=[row(2)])
    told = run("check", folder, "--out", tmp_path / "report")
    assert told["ok"]
    assert told["rows"] == {"train": 80, "dev": 1, "test": 1}
    assert told["counts"] == {"rows": 86, "bad": 1, "duplicates": 1, "near_duplicates": 1, "leaked": 1}
    assert told["complaints"] == [f"train.jsonl, line 84, field '(row)': has the keys input; use one of: {SHAPES}."]
    assert told["removed"] == [
        "train.jsonl, line 83: says almost the same as train.jsonl, line 82.",
        "train.jsonl, line 3: is also test.jsonl, line 1.",
    ]
    tokens = told["tokens"]
    assert 0 < tokens["p50"] <= tokens["p95"] < 1024 < 2000 < tokens["max"]
    assert (tokens["max_length"], tokens["over"], tokens["share_over"]) == (1024, 1, 0.0125)
    labels = told["balance"]["labels"]
    assert (labels["most"], labels["distinct"]) == ({"yes": 59, "no": 21}, 2)
    assert told["balance"]["groups"]["distinct"] == 5
    assert {Path(p).name for p in told["pictures"]} == {"lengths.png", "labels.png"}
    assert all(Path(p).read_bytes().startswith(PNG) for p in told["pictures"])


SHAPES = (
    "chosen + rejected, input + preferred_output + non_preferred_output, messages, conversations, input + reference, "
    "instruction + output, prompt + completion, text + label, text"
)


@pytest.mark.parametrize(("rows", "test", "complaints", "leaked"), [
    ([*map(row, range(40)), *["{"] * 30], [], 30, 0),
    ([*map(row, range(40))], [*map(row, range(5))], 0, 5),
])  # fmt: skip
def test_check_lists_all_that_is_wrong_where_training_would_refuse(
    tmp_path: Path, home: Path, rows: list, test: list, complaints: int, leaked: int
) -> None:
    folder = task(tmp_path / "t", train=rows, dev=[row("d")], test=test)
    with pytest.raises(DataError):
        read_dataset(folder)
    told = run("check", folder, "--no-tokens", code=1)
    assert (told["ok"], len(told["complaints"]), told["counts"]["leaked"]) == (False, complaints, leaked)
    assert CliRunner().invoke(app, ["data", "check", str(folder), "--no-tokens"]).exit_code == 1


def test_balance_and_skew_say_how_uneven_and_how_far() -> None:
    even, uneven = Distribution.of(["a", "b"] * 5), Distribution.of(["a"] * 9 + ["b"], expected=["a", "b", "never"])
    assert (even.evenness, even.imbalance) == (1.0, 1.0)
    assert uneven.evenness < 0.5
    assert uneven.wire()["imbalance"] is None
    assert uneven.wire()["least"]["never"] == 0
    same = skew(["a", "b"], ["b", "a", "a", "b"])
    assert (same.distance, same.leans) == (0.0, ())
    leaning = skew(["a", "b", "c", "c"], ["c", "c", "c", "x"])
    assert leaning.wire() == {"distance": 0.5, "leans": {"a": -0.25, "b": -0.25, "c": 0.25, "x": 0.25}}


def test_an_open_task_has_no_labels_to_balance(tmp_path: Path) -> None:
    data = read_dataset(write(tmp_path / "r.jsonl", [row(n, f"answer {n}") for n in range(30)]))
    assert balance(data.train).wire() == {"labels": None, "groups": None}


def test_quantiles_are_lengths_that_stand_there() -> None:
    found = Lengths(tuple(range(1, 101)), 90)
    assert (found.quantile(0.5), found.quantile(0.95), found.over) == (51, 96, 10)
    assert Lengths((), 90).wire()["max"] == 0


# --- split ---------------------------------------------------------------------------------------------------------

SPLIT = {
    "a task": [row(n, "yes" if n % 2 else "no") for n in range(100)],
    "chat": [{"messages": turns(f"q {n}", "a", "and then?", f"b {n}")} for n in range(100)],
    "preference": [{"prompt": f"q {n}", "chosen": "a", "rejected": "b", "meta": {"x": n}} for n in range(100)],
    "text": [{"text": f"Once upon a time, {n}."} for n in range(100)],
}


@pytest.mark.parametrize("shape", SPLIT)
def test_split_writes_disjoint_splits_that_read_back_as_they_were(tmp_path: Path, home: Path, shape: str) -> None:
    source = write(tmp_path / "rows.jsonl", [*SPLIT[shape], SPLIT[shape][0]])
    told = run("split", source, "--out", tmp_path / "out", "--test", "0.2")
    assert told["counts"]["duplicates"] == (2 if shape == "chat" else 1)
    sizes, items = told["rows"], {}
    for name in ("train", "dev", "test"):
        read = read_dataset(
            write(tmp_path / f"{name}.jsonl", (tmp_path / "out" / f"{name}.jsonl").read_text().split("\n")[:-1])
        )
        items[name] = {(item.key, item.reply) for item in (*read.train_items, *read.dev_items)}
        assert len(items[name]) == sizes[name]
    assert sum(sizes.values()) == len(items["train"] | items["dev"] | items["test"]) == 100 * (1 + (shape == "chat"))
    assert sizes["dev"] == sum(sizes.values()) // 10
    assert sizes["test"] == sum(sizes.values()) // 5
    whole = read_dataset(source)
    assert {(i.key, i.reply) for i in (*whole.train_items, *whole.dev_items)} == set.union(*items.values())


def test_split_keeps_the_splits_there_are_and_takes_leaks_out(tmp_path: Path, home: Path) -> None:
    test = [row(n) for n in range(5)]
    source = task(tmp_path / "t", train=[row(n) for n in range(40)], dev=[row("d")], test=test, license="CC0-1.0")
    told = run("split", source, "--out", tmp_path / "out")
    assert (told["rows"], told["counts"]["leaked"]) == ({"train": 35, "dev": 1, "test": 5}, 5)
    data = read_dataset(tmp_path / "out")
    assert (data.name, data.license, data.instruction) == ("t", "CC0-1.0", "Say it.")
    assert data.train[0].question == "Say it.\n\nquestion 5"
    with pytest.raises(Conflict, match="exists already"):
        run("split", source, "--out", tmp_path / "out")
    with pytest.raises(BadRequest, match="leave rows"):
        run("split", source, "--out", tmp_path / "o", "--dev", "0.9", "--test", "0.2")


# --- next ----------------------------------------------------------------------------------------------------------


def test_next_chooses_what_the_head_does_not_know_and_leaves_out_what_is_known(
    closed: Path, home: Path, tmp_path: Path
) -> None:
    known = {"text": "Will it rain in OSLO tomorrow"}
    unsure = {"id": "unsure", "text": "Sing me something about the weather while I cook."}
    plain = [{"text": f"What can I cook tonight with {food}?"} for food in FOODS[13:]]
    pool = write(tmp_path / "pool.jsonl", [known, *plain, unsure])
    told = run("next", closed, "--pool", pool, "-n", "2")
    assert (told["known"], told["pool"]) == (1, 3)
    assert told["rows"][0]["id"] == "unsure"
    assert told["rows"][0]["uncertainty"] > told["rows"][1]["uncertainty"]
    assert "unsure" in CliRunner().invoke(app, ["data", "next", str(closed), "--pool", str(pool)]).stdout


def test_next_simulated_measures_choosing_against_chance(closed: Path, home: Path) -> None:
    told = run("next", closed, "--simulate")
    assert told["measure"] == "dev accuracy"
    assert [r["labelled"] for r in told["budgets"]] == [3, 6, 12]
    assert all(r["gain"] == pytest.approx(r["chosen"] - r["random"], abs=2e-4) for r in told["budgets"])
    assert told["budgets"][-1]["chosen"] > 0.6


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_no_two_chosen_rows_ask_the_same() -> None:
    train = unit(np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0.1, 1, 0]]))
    pool = unit(np.array([[1, 1, 0]] * 5 + [[1, 0.6, 1.0], [1, 0.05, 0]]))
    for answers in (["a", "a", "b", "b"], None):
        chosen = [c.position for c in choose(train, answers, pool, 2)]
        assert 5 in chosen, "five copies of the most unsure row do not fill the choice"
    assert len(choose(train, None, pool, 100)) == 7


def test_choosing_finds_what_is_rare_and_chance_does_not() -> None:
    dice = np.random.default_rng(0)
    rare = np.repeat(np.eye(20)[1:], 2, axis=0)
    common = np.tile(np.eye(20)[:1], (160, 1))
    train = unit(np.concatenate([common, rare]) + dice.normal(0, 0.02, (198, 20)))
    answers = ["common"] * 160 + [f"rare {n}" for n in range(1, 20) for _ in range(2)]
    dev, dev_answers = unit(np.eye(20)), ["common", *(f"rare {n}" for n in range(1, 20))]
    for given in (answers, None):
        assert simulate(train, given, dev, dev_answers)[-1]["gain"] > 0.1


# --- label ---------------------------------------------------------------------------------------------------------


def test_a_head_s_labels_are_kept_where_it_is_sure_and_their_worth_is_measured(
    closed: Path, home: Path, tmp_path: Path
) -> None:
    sure = topics(FOODS[13:], CITIES[13:], BANDS[13:])
    pool = write(tmp_path / "pool.jsonl", [{"id": r["id"], "input": r["input"]} for r in sure] + [{"text": "Hm."}])
    out = tmp_path / "more.jsonl"
    told = run("label", closed, "--pool", pool, "--out", out, "--above", "0.6")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["id"], r["reference"]) for r in rows} <= {(r["id"], r["reference"]) for r in sure}
    assert (told["rows"], told["unsure"]) == (len(rows), 7 - len(rows))
    assert len(rows) >= 5
    assert all(r["meta"]["pseudo"] and r["meta"]["by"] == "head" and r["meta"]["confidence"] >= 0.6 for r in rows)
    assert told["measured"]["dev_rows"] == 9
    assert told["measured"]["after"] >= told["measured"]["before"] > 0.9
    assert told["dev_accuracy"] > 0.9
    with pytest.raises(Conflict, match=r"more\.jsonl exists"):
        run("label", closed, "--pool", pool, "--out", out)


def test_probabilities_are_as_sure_as_they_are_right() -> None:
    dice = np.random.default_rng(1)
    vectors = unit(dice.normal(0, 1, (600, 8)))
    answers = ["ab"[int(v[0] + dice.normal(0, 0.5) > 0)] for v in vectors]
    probe = Probe(vectors[:60], answers[:60]).calibrate(vectors[60:300], answers[60:300])
    sure = [chance for _, chance in probe.answers(vectors[300:])]
    assert np.mean(sure) == pytest.approx(probe.accuracy(vectors[300:], answers[300:]), abs=0.06)
    alone = Probe(vectors[:3], ["only"] * 3).calibrate(vectors, ["only"] * 600)
    assert alone.answers(vectors[:1]) == [("only", 1.0)]


async def test_an_endpoint_labels_open_rows_with_the_probability_of_its_tokens(tmp_path: Path, home: Path) -> None:
    source = write(tmp_path / "open.jsonl", [row(n, f"answer {n}") for n in range(30)])
    pool = write(tmp_path / "pool.jsonl", [{"prompt": f"Tell me about the {food}."} for food in FOODS[:5]])
    async with running(make_home(tmp_path / "served")) as server:
        common = ["label", source, "--pool", pool, "--endpoint", f"{server.url}/v1", "--model"]
        all_ = await asyncio.to_thread(run, *common, "base", "--out", tmp_path / "all.jsonl", "--above", "0")
        rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
        middle = sorted(r["meta"]["confidence"] for r in rows)[2]
        some = await asyncio.to_thread(run, *common, "base", "--out", tmp_path / "some.jsonl", "--above", middle)
        with pytest.raises(EngineRejected, match="nobody"):
            await asyncio.to_thread(run, *common, "nobody", "--out", tmp_path / "none.jsonl")
    assert (all_["rows"], all_["measured"]) == (5, None)
    assert rows[0]["reference"] == "The base model read: Tell me about the bread."
    assert rows[0]["meta"]["by"] == "base"
    assert 0 < middle < 1
    assert some["rows"] + some["unsure"] == 5
    assert 0 < some["rows"] < 5
    assert not (tmp_path / "none.jsonl").exists()


async def test_an_endpoint_s_answer_that_is_no_label_is_not_kept(tmp_path: Path, home: Path) -> None:
    labels = ["The base model read: yes", "The base model read: no"]
    rows = [{"input": f"is {n} even", "reference": labels[n % 2]} for n in range(30)]
    folder = task(tmp_path / "t", train=rows, labels=labels, instruction="")
    pool = tmp_path / "pool.txt"
    pool.write_text("yes\nno\n\nperhaps\n")
    async with running(make_home(tmp_path / "served")) as server:
        at = ["--endpoint", f"{server.url}/v1", "--model", "base", "--above", "0", "--no-measure"]
        told = await asyncio.to_thread(run, "label", folder, "--pool", pool, "--out", tmp_path / "o.jsonl", *at)
    kept = [json.loads(line)["reference"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert (told["unlisted"], kept) == (1, labels)


# --- grow ----------------------------------------------------------------------------------------------------------


async def test_grown_rows_are_marked_new_and_measured(closed: Path, home: Path, tmp_path: Path) -> None:
    known = "The base model read: Will it rain in Oslo tomorrow?"
    write(closed / "test.jsonl", [{"id": "t", "input": known, "reference": "weather"}])
    async with running(make_home(tmp_path / "served")) as server:
        at = ["--endpoint", f"{server.url}/v1", "--model", "base"]
        told = await asyncio.to_thread(run, "grow", closed, "-n", "40", "--out", tmp_path / "g.jsonl", *at)
        asked = (await server.engine_log())["requests"]
    rows = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    originals = {r["id"]: r for r in topics(FOODS[:10], CITIES[:10], BANDS[:10])}
    assert len(rows) == told["rows"] == 29, "thirty rewordings, of which one stands in the test split"
    assert told["repeated"] == told["asked"] - 29
    assert known not in {r["input"] for r in rows}
    assert all(r["meta"]["synthetic"] and r["meta"]["by"] == "base" for r in rows)
    assert all(r["reference"] == originals[r["meta"]["from"]]["reference"] for r in rows)
    assert {r["reference"] for r in rows[:3]} == {"cooking", "weather", "music"}
    assert set(told["measured"]) == {"before", "after", "dev_rows"}
    assert asked


# --- what is wrong is said -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "kind", "told"), [
    (["next", "{closed}"], BadRequest, "--pool FILE, or ask for --simulate"),
    (["next", "{closed}", "--pool", "{closed}/none.jsonl"], DataError, "does not exist"),
    (["next", "{closed}", "--pool", "{closed}/task.json"], DataError, "task.json, line 1: holds no input"),
    (["next", "{closed}", "--pool", "{closed}/dev.jsonl"], DataError, "stands in the data set already"),
    (["next", "{pairs}", "--simulate"], BadRequest, "preference pairs and plain texts have none"),
    (["label", "{closed}", "--out", "{closed}/o.jsonl"], BadRequest, "--pool FILE"),
    (["label", "{closed}", "--out", "{closed}/o.jsonl", "--pool", "{pool}", "--endpoint", "http://x/v1"],
     BadRequest, "--model"),
    (["label", "{open}", "--out", "{closed}/o.jsonl", "--pool", "{pool}"], BadRequest, "closed tasks alone"),
    (["grow", "{closed}", "--out", "{closed}/o.jsonl"], BadRequest, "Name an endpoint"),
    (["grow", "{pairs}", "--out", "{closed}/o.jsonl", "--endpoint", "http://x/v1", "--model", "m"],
     BadRequest, "one input and one answer"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(
    closed: Path, home: Path, tmp_path: Path, args: list[str], kind: type[HybridError], told: str
) -> None:
    places = {
        "closed": closed,
        "pairs": write(tmp_path / "pairs.jsonl", SPLIT["preference"]),
        "open": write(tmp_path / "open.jsonl", [row(n, f"answer {n}") for n in range(30)]),
        "pool": write(tmp_path / "pool.jsonl", [{"text": "something new"}]),
    }
    with pytest.raises(kind, match=told):
        run(*(arg.format(**places) for arg in args))


def test_an_endpoint_that_is_not_there_is_named(closed: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"127.0.0.1:9/v1 does not answer"):
        run(
            "grow",
            closed,
            "-n",
            1,
            "--out",
            tmp_path / "g.jsonl",
            "--endpoint",
            "http://127.0.0.1:9/v1",
            "--model",
            "m",
        )
    assert not (tmp_path / "g.jsonl").exists()
