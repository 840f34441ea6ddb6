"""Files that a crash met on their way into a vector store."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import openai
import pytest
from conftest import hybrid, start_server, stop_server
from server_kit import make_home


def test_D1_files_that_a_kill_met_on_their_way_are_found_after_it(tmp_path: Path) -> None:
    base = make_home(tmp_path).model
    (tmp_path / "hybrid.toml").write_text(f'model = "{base}"\n')
    flags = ("--engine", "scripted", "--no-quickstart", "--no-ui")
    served = start_server(tmp_path, *flags)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    store = client.vector_stores.create(name="town")
    texts = [f"House number {i} of the street is painted in colour {i * 7}." for i in range(8)]
    files = [client.files.create(file=(f"{i}.md", t.encode()), purpose="assistants").id for i, t in enumerate(texts)]
    batch = client.vector_stores.file_batches.create(store.id, file_ids=files)
    client.vector_stores.files.poll(files[0], vector_store_id=store.id, poll_interval_ms=10)
    served.process.send_signal(signal.SIGKILL)
    served.process.wait()

    served = start_server(tmp_path, *flags)
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    batch = client.vector_stores.file_batches.poll(batch.id, vector_store_id=store.id, poll_interval_ms=50)
    assert (batch.status, batch.file_counts.completed, batch.file_counts.failed) == ("completed", 8, 0)
    hits = client.vector_stores.search(store.id, query="house", max_num_results=50).data
    assert sorted(hit.file_id for hit in hits) == sorted(files)
    listed = json.loads(hybrid(tmp_path, "corpora", "list", "--json").stdout)["corpora"]
    assert [(row["name"], row["id"], row["documents"]) for row in listed] == [("town", store.id, 8)]
    shown = json.loads(hybrid(tmp_path, "corpora", "show", "town", "--json").stdout)
    assert {row["id"] for row in shown["files"]} == set(files)
    hybrid(tmp_path, "corpora", "delete", "town", "--yes")
    with pytest.raises(openai.NotFoundError):
        client.vector_stores.retrieve(store.id)
    assert stop_server(served) == 0
