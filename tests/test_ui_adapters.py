"""The tab Adapters: what is painted is text alone, an upload becomes a job and its losses, a name is moved."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from conftest import Served, start_server, stop_server
from gradio_client import Client as Page
from gradio_client import handle_file
from jobs_kit import SHORT, chat_rows
from server_kit import until
from tiny_model import make_tiny_model

from hybrid.errors import HybridError
from hybrid.training.methods import METHODS
from hybrid.ui.cards import MAX_POINTS, card_markdown, curve_points, plain, thinned
from hybrid.ui.client import Client
from hybrid.ui.house import job_facts, jobs_table, versions_table
from hybrid.ui.jobs import Watch, how_to_ask, newest
from hybrid.ui.status import job_rows
from hybrid.ui.train import about, findings, usual_knobs

EVIL = "<img src=x onerror=alert(1)>![a](http://evil.example/a.png)|`[b](javascript:alert(1))"
ARMS = {
    "adapter:bank@2": {"score": 0.93, "ci95": [0.9, 0.96], "n": 64},
    "prompt": {"score": 0.71, "ci95": [0.6, 0.8], "n": 64},
}
MEASURED = {
    "own": "adapter:bank@2",
    "metric": "accuracy",
    "arms": ARMS,
    "forgetting": {"general": {"before": 0.5, "after": 0.4, "n": 40}},
    "skew": {"answers": 0.1, "right": 0.05},
}


def adapter(**more: Any) -> dict[str, Any]:
    fields = {"name": "bank", "version": 2, "kind": "lora", "state": "live", "alias": True, "reason": ""}
    return {**fields, "metrics": {"dev_loss": 0.25}, "measured": MEASURED, "card": {"method": "lora"}, **more}


def job(**more: Any) -> dict[str, Any]:
    told = {"adapter": "bank", "version": 2, "progress": more.pop("progress", {})}
    return {"id": "ftjob-1", "status": "running", "hybrid": told, "error": None, **more}


# --- what is painted -------------------------------------------------------------------------------------------------


def test_a_card_says_what_was_measured_and_forgotten() -> None:
    shown = card_markdown(adapter())
    for words in ("0&#46;930", "0&#46;710", "general", "0&#46;400", "Skew", "in use"):
        assert words in shown
    row = versions_table({"adapters": [adapter()]})
    assert "0.2500" in row
    assert "prompt 0.71" in row
    assert 'data-pick="bank@2"' in row


def test_S17_cards_jobs_and_findings_show_text_alone() -> None:
    hostile = adapter(
        name=EVIL, state=EVIL, kind=EVIL, reason=EVIL,
        measured={**MEASURED, "own": EVIL, "arms": {EVIL: ARMS["prompt"]}, "metric": EVIL, "reason": EVIL},
        card={"method": EVIL, "instruction": EVIL},
    )  # fmt: skip
    found = {
        "ok": False, "kind": EVIL, "rows": {"train": 1, "dev": 1}, "complaints": [EVIL],
        "counts": {"duplicates": 1, "near_duplicates": 0, "leaked": 0},
        "balance": {"labels": {"distinct": 1, "most": {EVIL: 3}, "least": {}, "imbalance": None}},
    }  # fmt: skip
    failed = job(status="failed", error={"message": EVIL}, hybrid={"adapter": EVIL, "progress": {"phase": EVIL}})
    rows = job_rows({"jobs": [{"id": EVIL, "status": EVIL, "spec": {"name": EVIL}, "error": EVIL}]})
    painted = versions_table({"adapters": [hostile]}) + jobs_table(rows) + job_facts(failed) + findings(EVIL, found)
    done = job(status="succeeded", hybrid={"adapter": EVIL, "version": 2})
    painted += how_to_ask(done, {"adapters": [hostile]})
    assert "<img" not in painted
    card = card_markdown(hostile)
    assert not {"<img", "![", "](", "http:"} & {part for part in ("<img", "![", "](", "http:") if part in card}
    assert "alert" in card


def test_text_in_markdown_is_no_markup() -> None:
    assert plain("a_b *c*\n# d") == "a&#95;b &#42;c&#42; &#35; d"


def test_a_job_says_how_far_it_is() -> None:
    progress = {"step": 50, "steps": 200, "loss": 1.5, "dev_loss": 1.25, "tokens_per_s": 1234.5, "eta_s": 70.0}
    shown = job_facts(job(progress=progress))
    for words in ("50 of 200", "1.5000", "1.2500", "1,234 tokens/s", "70 s", 'aria-valuenow="25"'):
        assert words in shown


def test_the_newest_job_at_work_is_looked_at() -> None:
    jobs = [{"id": "c", "status": "succeeded"}, {"id": "b", "status": "running"}, {"id": "a", "status": "queued"}]
    assert newest(jobs) == "b"
    assert newest(jobs[:1]) == "c"
    assert newest([]) == ""


def test_a_finished_job_says_which_model_to_ask_for() -> None:
    done = job(status="succeeded")
    assert "<code>bank</code>" in how_to_ask(done, {"adapters": [adapter()]})
    worse = adapter(alias=False, reason="its dev loss is worse")
    assert "<code>bank@2</code>" in how_to_ask(done, {"adapters": [worse]})
    assert "its dev loss is worse" in how_to_ask(done, {"adapters": [worse]})
    head = adapter(kind="head", alias=False, reason="ask for head:bank")
    assert "ask for head:bank" in how_to_ask(done, {"adapters": [head]})
    assert how_to_ask(job(), {"adapters": [adapter()]}) == ""


def test_losses_of_many_steps_fit_a_screen() -> None:
    curve = [{"step": n, "train_loss": 1.0, **({"valid_loss": 2.0} if n % 500 == 0 else {})} for n in range(1, 5001)]
    points = thinned(curve_points(curve))
    assert len(points) <= 2 * MAX_POINTS
    assert [p for p in points if p[1] == "dev"] == [(n, "dev", 2.0) for n in range(500, 5001, 500)]
    assert points[-1][0] == 5000


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_when_it_is_for_and_what_it_costs(method: str) -> None:
    assert METHODS[method].cost in about(method)
    assert len(usual_knobs(method)) == 3


# --- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("face")
    make_tiny_model(home / "tiny")
    (home / "hybrid.toml").write_text(f'model = "{home / "tiny"}"\n[server]\nmax_file_bytes = {1 << 20}\n')
    served = start_server(home, "--engine", "scripted", "--no-quickstart")
    yield served
    assert stop_server(served) == 0


async def test_an_upload_is_looked_through_and_trained_on(face: Served, tmp_path: Path) -> None:
    rows = tmp_path / "two colours.jsonl"
    rows.write_bytes(chat_rows(48) + b"no json\n")
    page = await asyncio.to_thread(Page, face.url, verbose=False)
    _, found, name, method, _ = await asyncio.to_thread(
        page.predict, path=handle_file(rows), name="", key="", api_name="/upload"
    )
    assert "two colours.jsonl" in found
    assert "1 rows cannot be used" in found
    assert (value(name), value(method)) == ("two-colours", "lora")
    assert not list(uploads().glob("*/two colours.jsonl"))

    more = "\n".join(f"{key}={v}" for key, v in SHORT.items() if key != "rank")
    knobs = {"epochs": "", "rank": "4", "learning_rate": ""}
    order = {"name": value(name), "method": "lora", "promote": True, "key": "", **knobs}
    said = await asyncio.to_thread(page.predict, more="no equals sign", **order, api_name="/train")
    assert "has no &#x27;=&#x27;" in said
    said = await asyncio.to_thread(page.predict, more=more, **order, api_name="/train")
    job_id = said.partition("Started ")[2].partition(".")[0]

    client = Client(face.url)

    async def ended() -> bool:
        return (await client.job("", job_id))["status"] in ("succeeded", "failed")

    await until(ended, 90)
    done = await client.job("", job_id)
    assert done["error"] is None
    assert (done["hybrid"]["adapter"], done["hybrid"]["version"]) == ("two-colours", 1)
    watch = Watch(job_id)
    watch = watch.with_events(await client.events("", job_id))
    assert {step for step, of, _ in watch.points if of == "training"} == set(range(1, 7))
    assert await client.events("", job_id, newer_than=watch.newest) == []
    seen = await client.status("")
    assert "<code>two-colours</code>" in how_to_ask(done, seen)
    assert "trained on" in card_markdown(seen["adapters"][0])
    assert await client.adapter("", "two-colours", "retire", {"version": 1})
    with pytest.raises(HybridError, match="retired"):
        await client.adapter("", "two-colours", "promote", {"version": 1})
    with pytest.raises(HybridError, match="succeeded"):
        await client.steer("", job_id, "pause")


async def test_S17_uploads_come_from_the_page_are_bounded_and_never_read_back(face: Served) -> None:
    url = face.url + "/gradio_api/upload"

    async def upload(size: int, **headers: str) -> tuple[int, str]:
        form = aiohttp.FormData()
        form.add_field("files", b"x" * size, filename="<b>.jsonl")
        async with aiohttp.ClientSession() as http, http.post(url, data=form, headers=headers) as answer:
            return answer.status, await answer.text()

    assert (await upload(10, **{"Sec-Fetch-Site": "cross-site"}))[0] == 404
    assert (await upload(2 << 20))[0] == 413
    status, told = await upload(10)
    assert status == 200
    path = told.strip('[]"\n')
    async with aiohttp.ClientSession() as http, http.get(f"{face.url}/gradio_api/file={path}") as answer:
        assert answer.status == 404


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.jsonl", "https://example.com/x.jsonl", "/etc/passwd"])
async def test_S17_an_address_or_a_file_of_the_server_is_not_taken_for_an_upload(face: Served, address: str) -> None:
    file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
    async with aiohttp.ClientSession(face.url) as http:
        async with http.post("/gradio_api/call/upload", json={"data": [file, "", ""]}) as answer:
            event = (await answer.json())["event_id"]
        async with http.get(f"/gradio_api/call/upload/{event}") as answer:
            assert "event: error" in await answer.text()


def uploads() -> Path:
    """Where the page keeps what comes in, until it has sent it on."""
    return Path(tempfile.gettempdir(), "gradio")


def value(update: Any) -> Any:
    """What an output holds, said outright or as an update."""
    return update["value"] if isinstance(update, dict) else update
