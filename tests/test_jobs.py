"""What jobs survive: a killed gateway, an older database, two processes that want the same job, a busy server."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from pathlib import Path

import openai
import psutil
import pytest
from conftest import hybrid, start_server, stop_server
from jobs_kit import LONG, chat_rows
from tiny_model import make_tiny_model

from hybrid.errors import Conflict, SetupError
from hybrid.lifecycle.child import HOLD_S, IDLE_S, WORK_S, GiveWay
from hybrid.state import SCHEMA, State
from hybrid.training.jobs import JobBook

STEPS = 150


def test_D8_a_killed_gateway_leaves_no_trainer_and_its_job_ends_once(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "tiny")
    (tmp_path / "hybrid.toml").write_text(f'model = "{tmp_path / "tiny"}"\n[training]\ncheckpoint_s = 0.2\n')
    flags = ("--engine", "scripted", "--no-quickstart", "--no-ui")
    served = start_server(tmp_path, *flags)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    training = client.files.create(file=("train.jsonl", chat_rows()), purpose="fine-tune").id
    asked = {"model": "tiny", "training_file": training, "extra_headers": {"Idempotency-Key": "once"}}
    recipe = {**LONG, "max_steps": STEPS, "name": "long"}
    job = client.fine_tuning.jobs.create(**asked, extra_body={"hybrid": recipe})
    wait_for(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data)
    served.process.send_signal(signal.SIGKILL)
    served.process.wait()
    wait_for(lambda: not [p for p in psutil.process_iter(["cmdline"]) if job.id in (p.info["cmdline"] or [])])
    row = json.loads(hybrid(tmp_path, "jobs", "show", job.id, "--json").stdout)
    assert row["status"] == "running"  # as the crash left it

    served = start_server(tmp_path, *flags)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    again = client.fine_tuning.jobs.create(**asked, extra_body={"hybrid": recipe})
    assert again.id == job.id
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).status not in ("queued", "running"))
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert done.status == "succeeded", done.error
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=1000))
    assert [e.data["step"] for e in reversed(events) if e.type == "metrics"] == list(range(1, STEPS + 1))
    assert sum("goes on" in event.message for event in events) == 1
    versions = json.loads(hybrid(tmp_path, "adapters", "list", "--json").stdout)["adapters"]
    assert [(v["name"], v["version"]) for v in versions] == [("long", 1)]
    listed = json.loads(hybrid(tmp_path, "jobs", "list", "--json").stdout)["jobs"]
    assert [(row["id"], row["fine_tuned_model"]) for row in listed] == [(job.id, done.fine_tuned_model)]
    assert stop_server(served) == 0


def wait_for(true: object, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def book(tmp_path: Path) -> JobBook:
    return JobBook(State(tmp_path / "state.db"))


def submitted(book: JobBook, **spec: object) -> str:
    job, _ = book.create({"name": "a", "source": "data", "fine_tuned_model": "ft:b:hybrid::1", **spec})
    assert book.validated(job["id"])
    return str(job["id"])


def test_D8_a_job_is_claimed_by_one_process(book: JobBook) -> None:
    job = submitted(book)
    assert [book.claim(job, pid) for pid in (11, 12)] == [True, False]
    assert book.get(job)["pid"] == 11


def test_D8_what_a_crash_left_is_what_was_wanted(book: JobBook) -> None:
    running, pausing, ending, waiting = (submitted(book) for _ in range(4))
    for job in (running, pausing, ending):
        assert book.claim(job, 1)
    book.want(pausing, "pause")
    book.want(ending, "cancel")
    assert book.recover() == [running, waiting]
    found = {job: book.get(job)["status"] for job in (running, pausing, ending, waiting)}
    assert list(found.values()) == ["queued", "paused", "cancelled", "queued"]


def test_a_quick_resume_is_not_lost_and_a_cancel_wins_over_success(book: JobBook) -> None:
    job = submitted(book)
    book.claim(job, 1)
    book.want(job, "pause")
    book.want(job, "run")  # before the process has come to the end of its step
    assert book.stopped(job) == "queued"
    book.claim(job, 2)
    book.want(job, "cancel")
    assert not book.succeed(job, {"fine_tuned_model": "ft:x"})
    book.cancelled(job)
    with pytest.raises(Conflict, match="cannot be paused"):
        book.want(job, "pause")


def test_a_busy_server_holds_a_job_but_not_for_ever() -> None:
    way = GiveWay()
    assert not way.stop(False, 0.0)
    assert way.stop(True, 1.0)
    assert way.stop(False, 1.0 + IDLE_S / 2)
    assert not way.stop(False, 1.0 + 2 * IDLE_S)
    held = [way.stop(True, 10.0 + tick) for tick in range(int(3 * (HOLD_S + WORK_S)))]
    assert held.count(False) >= 2 * WORK_S
    assert held.count(True) >= 2 * HOLD_S


def test_D10_an_older_database_is_kept_and_brought_up_and_a_newer_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    with sqlite3.connect(path) as old:
        old.execute(
            "CREATE TABLE jobs (id VARCHAR PRIMARY KEY, kind VARCHAR NOT NULL, spec JSON NOT NULL, status VARCHAR "
            "NOT NULL, progress JSON NOT NULL, error TEXT NOT NULL, created FLOAT NOT NULL, updated FLOAT NOT NULL)"
        )
        old.execute("""INSERT INTO jobs VALUES ('job-1', 'train', '{"name": "a"}', 'running', '{}', '', 1, 1)""")
    old.close()
    book = JobBook(State(path))
    assert book.get("job-1")["wanted"] == "run"
    assert not book.recover()
    assert book.get("job-1")["status"] == "failed"
    assert submitted(book)
    with sqlite3.connect(tmp_path / "state.v1.db") as copy:
        assert copy.execute("SELECT status FROM jobs").fetchall() == [("running",)]
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(SetupError, match="newer hybrid"):
        State(path)
