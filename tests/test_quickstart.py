"""The quickstart tasks: the same bytes from the same seed, three splits that share nothing, and real variety."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from hybrid.quickstart import COUNTS, TASKS, write_tasks
from hybrid.quickstart.grammar import TOO_ALIKE, alike, bigrams
from hybrid.quickstart.orders_sql import SCHEMA
from hybrid.rooms import Home

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = Home(ROOT)
FILES = ("task.json", "train.jsonl", "dev.jsonl", "test.jsonl")


def rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (COMMITTED.tasks / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def phrasings(task: str, split: str) -> set[str]:
    return {row["meta"]["phrasing"] for row in rows(task, split)}


def test_regeneration_gives_the_committed_bytes(tmp_path: Path) -> None:
    folders = write_tasks(Home(tmp_path))
    assert [folder.name for folder in folders] == list(TASKS)
    for folder in folders:
        for name in FILES:
            assert (folder / name).read_bytes() == (COMMITTED.tasks / folder.name / name).read_bytes()


def test_a_task_that_exists_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "eval" / "tasks" / "tickets"
    mine.mkdir(parents=True)
    (mine / "task.json").write_text("{}")
    write_tasks(Home(tmp_path))
    assert sorted(path.name for path in mine.iterdir()) == ["task.json"]
    assert (tmp_path / "eval" / "tasks" / "orders_sql" / "train.jsonl").exists()


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    folder = write_tasks(Home(tmp_path), seed=7)[0]
    assert (folder / "test.jsonl").read_bytes() != (COMMITTED.tasks / folder.name / "test.jsonl").read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_the_task_folder_is_whole_and_small(task: str) -> None:
    card = json.loads((COMMITTED.tasks / task / "task.json").read_text())
    assert card["name"] == task
    assert card["metric"] in ("json_f1", "sql_exact")
    for split, count in COUNTS.items():
        assert len(rows(task, split)) == count
        assert (COMMITTED.tasks / task / f"{split}.jsonl").stat().st_size < 300_000
    ids = [row["id"] for split in COUNTS for row in rows(task, split)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("task", TASKS)
def test_no_input_is_another_said_twice(task: str) -> None:
    seen = [bigrams(row["input"]) for split in COUNTS for row in rows(task, split)]
    closest = max(alike(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert closest <= TOO_ALIKE


@pytest.mark.parametrize("task", TASKS)
def test_dev_and_test_hold_phrasings_that_training_never_showed(task: str) -> None:
    train, dev, test = (phrasings(task, split) for split in ("train", "dev", "test"))
    for held_out, other in ((dev, test), (test, dev)):
        unseen = [row for row in held_out if row not in train | other]
        assert len(unseen) >= 10


def test_products_of_one_split_are_not_in_another() -> None:
    products = {
        split: {json.loads(row["reference"]).get("product") for row in rows("tickets", split)} - {None}
        for split in COUNTS
    }
    assert not products["train"] & products["dev"]
    assert not products["train"] & products["test"]
    assert not products["dev"] & products["test"]
    assert len(products["train"]) > 100


@pytest.mark.parametrize("task", TASKS)
def test_no_answer_is_asked_for_in_two_splits(task: str) -> None:
    answers = {split: {row["reference"] for row in rows(task, split)} for split in COUNTS}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not answers[one] & answers[other]


@pytest.mark.parametrize("task", TASKS)
def test_the_words_vary(task: str) -> None:
    words = [row["input"].lower().split() for row in rows(task, "train")]
    trigrams = [tuple(w[i : i + 3]) for w in words for i in range(len(w) - 2)]
    assert len(set(trigrams)) > 0.4 * len(trigrams)
    openings = {tuple(w[:4]) for w in words}
    assert len(openings) > 0.4 * len(words)


@pytest.mark.parametrize("split", COUNTS)
def test_every_ticket_reference_is_read_from_its_message(split: str) -> None:
    for row in rows("tickets", split):
        reference, said = json.loads(row["reference"]), row["input"].lower()
        assert {"intent", "urgency"} <= reference.keys()
        for slot in reference.keys() - {"intent", "urgency"}:
            assert reference[slot].lower() in said


@pytest.mark.parametrize("split", COUNTS)
def test_every_query_runs_on_the_schema_it_was_asked_of(split: str) -> None:
    shop = sqlite3.connect(":memory:")
    for table in SCHEMA.split(") "):
        shop.execute(f"CREATE TABLE {table.rstrip(')')})")
    for row in rows("orders_sql", split):
        shop.execute(row["reference"]).fetchall()
