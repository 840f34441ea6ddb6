"""Fine-tuning with nothing but the official client, over a real server that trains a tiny model for real."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from jobs_kit import LONG, SHORT, chat_rows, make_trainable_home
from server_kit import Running, make_home, running, until

from hybrid.training.jobs import ENDED

BAD = b'{"messages": []}\n{"nothing": 1}\nno json\n'


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(make_trainable_home(tmp_path, max_file_bytes=1 << 20)) as server:
        yield server


@pytest.fixture
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """For what is refused before anything runs."""
    folder = tmp_path_factory.mktemp("door")
    async with running(make_home(folder, server={"max_file_bytes": 1 << 20})) as server:
        yield server


async def upload(client: openai.AsyncOpenAI, content: bytes = b"", name: str = "train.jsonl") -> str:
    return (await client.files.create(file=(name, content or chat_rows()), purpose="fine-tune")).id


async def comes_to(client: openai.AsyncOpenAI, job_id: str, *statuses: str) -> Any:
    async def there() -> bool:
        job = await client.fine_tuning.jobs.retrieve(job_id)
        assert job.status in statuses or job.status not in ENDED, job.error
        return job.status in statuses

    await until(there, 120)
    return await client.fine_tuning.jobs.retrieve(job_id)


async def started(client: openai.AsyncOpenAI, job_id: str) -> None:
    """Waits until a job has a checkpoint to go on from."""

    async def saved() -> bool:
        await comes_to(client, job_id, "validating_files", "queued", "running")
        return bool((await client.fine_tuning.jobs.checkpoints.list(job_id)).data)

    await until(saved, 120)


async def test_a_fine_tune_is_started_watched_and_used_by_the_official_client(server: Running) -> None:
    client = server.client()
    training, validation = await upload(client), await upload(client, chat_rows(12, start=100))
    job = await client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=validation,
        suffix="colours",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
        metadata={"team": "paint"},
        extra_body={"hybrid": SHORT},
    )
    assert job.status in ("validating_files", "queued")
    assert (job.object, job.seed, job.training_file, job.fine_tuned_model) == ("fine_tuning.job", 7, training, None)
    done = await comes_to(client, job.id, "succeeded")
    assert done.fine_tuned_model == f"ft:tiny:hybrid:colours:{job.id.removeprefix('ftjob-')[:8]}"
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at
    answer = await client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "item 3 is grey!!!"}]
    )
    assert answer.choices[0].message.content == "grey"  # as the training row says: the engine knows them by heart
    assert done.fine_tuned_model in [model.id async for model in client.models.list()]

    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, len(metrics) + 1))
    assert all(data["train_loss"] > 0 for data in metrics)
    assert any("valid_loss" in data for data in metrics)
    checkpoints = [point async for point in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert checkpoints[0].fine_tuned_model_checkpoint == done.fine_tuned_model
    assert all(point.fine_tuning_job_id == job.id for point in checkpoints)
    table = (await client.files.content(done.result_files[0])).text.splitlines()
    assert table[0] == "step,train_loss,valid_loss"
    assert len(table) == len(metrics) + 1
    assert (await client.files.retrieve(done.result_files[0])).purpose == "fine-tune-results"

    listed = await client.fine_tuning.jobs.list(metadata={"team": "paint"})
    assert [job.id for job in listed.data] == [job.id]
    assert not (await client.fine_tuning.jobs.list(metadata={"team": "other"})).data
    with pytest.raises(openai.ConflictError):
        await client.fine_tuning.jobs.pause(job.id)


async def test_a_job_is_paused_resumed_and_cancelled_and_leaves_no_process(server: Running) -> None:
    client, jobs = server.client(), server.client().fine_tuning.jobs
    training = await upload(client)
    job = await jobs.create(model="base", training_file=training, extra_body={"hybrid": {**LONG, "name": "slow"}})
    await started(client, job.id)
    assert trainers(job.id)
    await jobs.pause(job.id)
    assert (await comes_to(client, job.id, "paused")).finished_at is None
    await until(lambda: not trainers(job.id))
    saved = (await jobs.checkpoints.list(job.id)).data[0].step_number
    assert (await jobs.pause(job.id)).status == "paused"
    await client.files.delete(training)  # the job keeps what it needs

    await jobs.resume(job.id)

    async def further() -> bool:
        return (await jobs.checkpoints.list(job.id)).data[0].step_number > saved

    await until(further, 120)
    steps = [e.data["step"] async for e in jobs.list_events(job.id, limit=1000) if e.type == "metrics"]
    assert len(steps) == len(set(steps)), "a step that was done again is told once"
    cancelled = await jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    await until(lambda: not trainers(job.id), 10)
    assert (await jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="cannot be resumed"):
        await jobs.resume(job.id)
    assert not server.gateway.store.versions("slow")


def trainers(job_id: str) -> list[int]:
    """The processes that work for a job."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if job_id in (process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


async def test_a_file_that_cannot_be_trained_on_fails_the_job_before_any_training(server: Running) -> None:
    client, jobs = server.client(), server.client().fine_tuning.jobs
    job = await jobs.create(model="base", training_file=await upload(client, BAD))
    failed = await comes_to(client, job.id, "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert "line 2" in failed.error.message
    assert not [e async for e in jobs.list_events(job.id) if e.type == "metrics" or "started" in e.message]


async def test_D8_the_same_idempotency_key_submits_once(server: Running) -> None:
    client, jobs = server.client(), server.client().fine_tuning.jobs
    asked: dict[str, Any] = {"model": "base", "training_file": await upload(client, BAD), "seed": 3}
    same = {"extra_headers": {"Idempotency-Key": "once"}}
    first, *others = await asyncio.gather(*(jobs.create(**asked, **same) for _ in range(4)))
    assert {job.id for job in others} == {first.id}
    assert [job.id async for job in jobs.list()] == [first.id]
    with pytest.raises(openai.ConflictError, match="another request"):
        await jobs.create(**{**asked, "seed": 4}, **same)
    other = server.keys().create("other")["key"]
    theirs = server.client(other)
    job = await theirs.fine_tuning.jobs.create(**{**asked, "training_file": await upload(theirs, BAD)}, **same)
    assert job.id != first.id


async def test_S7_another_tenants_files_and_jobs_are_unknown(server: Running) -> None:
    alice, bob = (server.client(server.keys().create(name)["key"]) for name in ("alice", "bob"))
    file = await upload(alice, BAD)
    job = await alice.fine_tuning.jobs.create(model="base", training_file=file)
    jobs = bob.fine_tuning.jobs
    attempts = (
        bob.files.retrieve(file), bob.files.content(file), bob.files.delete(file),
        jobs.create(model="base", training_file=file), jobs.retrieve(job.id), jobs.cancel(job.id), jobs.pause(job.id),
        jobs.resume(job.id), jobs.list_events(job.id), jobs.checkpoints.list(job.id), jobs.list(after=job.id),
    )  # fmt: skip
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            await attempt
    assert not (await jobs.list()).data
    assert not (await bob.files.list()).data
    assert [found.id for found in (await alice.files.list()).data] == [file]


async def test_S12_an_order_is_refused_at_the_field_that_is_wrong(door: Running) -> None:
    file = await upload(door.client())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": "auto"}, "model"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"seed": -1}, "seed"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"metadata": {"k": 1}}, "metadata"),
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"hyperparameters": {"n_epochs": -1}}, "n_epochs"),
        ({"hybrid": {"epochs; rm -rf /": "$(id)"}}, "epochs; rm -rf /"),
        ({"hybrid": {"name": "../../escape"}}, "name"),
        ({"hybrid": {"method": "--help"}}, "method"),
    ]
    for asked, param in cases:
        body = {"model": "base", "training_file": file, **asked}
        status, answer, _ = await door.post("/v1/fine_tuning/jobs", body)
        assert status in (400, 404, 422), asked
        assert answer["error"]["param"] == param
    assert not (await door.client().fine_tuning.jobs.list()).data
    assert not list(door.settings.rooms.jobs.iterdir()), "what was refused leaves nothing"


async def test_S16_files_are_kept_under_ids_whatever_they_are_called(door: Running, tmp_path: Path) -> None:
    client = door.client()
    kept = await client.files.create(file=("../../../etc/evil\x00\n.jsonl", b"{}"), purpose="fine-tune")
    assert "/" not in kept.filename
    assert (await client.files.content(kept.id)).content == b"{}"
    assert kept.id in os.listdir(door.settings.rooms.files)
    for name, content, purpose in (
        ("a", b"", "fine-tune"),
        ("a", b"{}", "batch"),
        ("a", b"x" * (2 << 20), "fine-tune"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=(name, content), purpose=purpose)
        assert refused.value.status_code == (413 if len(content) > 100 else 400)
    pages = [await upload(client, name=f"{n}.jsonl") for n in range(3)]
    listed = [file.id async for file in client.files.list(limit=2)]
    assert listed == [*reversed(pages), kept.id]
    assert (await client.files.delete(kept.id)).deleted
    assert sorted(os.listdir(door.settings.rooms.files)) == sorted(pages)
    with pytest.raises(openai.NotFoundError):
        await client.files.content(kept.id)
