"""Fine-tuning with nothing but the official client, over a real server that trains a tiny model for real."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from jobs_kit import LONG, SHORT, chat_rows, make_trainable_home
from server_kit import Running, running, until

from hybrid.training.jobs import ENDED

BAD = b'{"messages": []}\n{"nothing": 1}\nno json\n'


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(make_trainable_home(tmp_path, max_file_bytes=1 << 20)) as server:
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
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "item 3 is red"}]
    )
    assert "colours@1" in answer.choices[0].message.content
    assert done.fine_tuned_model in [model.id async for model in client.models.list()]

    events = [event async for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert events[0].message == "The job has successfully completed"
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    metrics = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, len(metrics) + 1))
    assert all(data["train_loss"] > 0 for data in metrics)
    assert any("valid_loss" in data for data in metrics)
    checkpoints = [point async for point in client.fine_tuning.jobs.checkpoints.list(job.id, limit=1)]
    assert checkpoints
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
