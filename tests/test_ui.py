"""The face over a real server with the scripted engine: beside the API, answering, and showing nothing as HTML."""

from __future__ import annotations

import base64
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Served, start_server, stop_server
from gradio_client import Client
from server_kit import engine_log, until

from hybrid.ui.answer import Options, Turn, request_body, stopped
from hybrid.ui.chat import messages, place
from hybrid.ui.client import caller_key
from hybrid.ui.house import status_line, versions_table
from hybrid.ui.panels import explain, markdown

HOSTILE = "What says <img src=x onerror=alert(1)> and ![a](http://evil.example/a.png)?"
PASSAGE = "The lighthouse keeper says <script>alert(1)</script> to every ship that passes the rock at night."


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("face")
    (home / "hybrid.toml").write_text("[gate]\ndeadline_ms = 10000\n")  # a busy machine must not hide the scores
    served = start_server(home, "--engine", "scripted", "--no-quickstart")
    documents = home / "documents"
    documents.mkdir()
    (documents / "keeper.md").write_text(f"# The keeper\n\n{PASSAGE}\n")
    served.hybrid("index", str(documents), "--name", "notes")
    deadline = time.monotonic() + 60
    while "rag:notes" not in served.get("/v1/status")["gate"]["arms"]:
        assert time.monotonic() < deadline, "the corpus was not enrolled"
        time.sleep(0.2)
    yield served
    assert stop_server(served) == 0


@pytest.fixture(scope="module")
def page(face: Served) -> Client:
    return Client(face.url, verbose=False)


def fetch(url: str, **headers: str) -> tuple[int, dict[str, str], str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read().decode()


def ask(page: Client, text: str, model: str = "prompt", key: str = "") -> tuple[list[dict], str]:
    window, panel, _box = page.predict(text=text, model=model, temperature=0, max_tokens=64, key=key, api_name="/chat")
    return window, panel


def said(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_and_the_api_share_the_port(face: Served) -> None:
    status, headers, body = fetch(face.url + "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert "hybrid" in body
    assert face.get("/v1/models")["object"] == "list"
    assert face.get("/livez")
    assert fetch(face.url + "/docs")[0] == 200
    assert fetch(face.url + "/metrics")[0] == 200
    status, _, body = fetch(face.url + "/v1/no-such-route")
    assert status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


def test_the_page_loads_nothing_from_elsewhere(face: Served) -> None:
    _, headers, body = fetch(face.url + "/")
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert not re.search(r"https?:", policy)
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"'](https?:)?//", body)
    assert loaded == []
    theme = fetch(face.url + "/theme.css")[2]
    assert not re.search(r"url\([\"']?https?:|@import", theme)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/file=.hybrid/state.db",
        "/gradio_api/file=.env",
        "/file=/etc/passwd",
        "/static/../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/upload",
        "/gradio_api/run-history/records",
    ],
)
def test_S17_no_file_upload_or_fetch_through_the_page(face: Served, path: str) -> None:
    status, _, body = fetch(face.url + path)
    assert status in (403, 404, 405)
    assert "root:" not in body


def test_S17_another_site_cannot_call_the_page(face: Served) -> None:
    _, headers, _ = fetch(face.url + "/config", Origin="https://evil.example")
    assert "access-control-allow-origin" not in headers


# --- a conversation --------------------------------------------------------------------------------------------------


def test_a_message_is_answered_beside_its_reason(page: Client) -> None:
    window, panel = ask(page, "Hello there")
    assert window[0]["role"] == "user"
    assert said(window[0]) == "Hello there"
    assert window[-1]["role"] == "assistant"
    assert len(said(window[-1])) > 3
    assert '<span class="hy-pill hy-prompt">prompt</span>' in panel
    assert "the caller named the model" in panel


def test_auto_shows_the_scores_of_the_arms(page: Client) -> None:
    _, panel = ask(page, "What does the lighthouse keeper say?", model="auto")
    assert "What the gate thought of each arm" in panel
    assert "rag:notes" in panel


def test_S17_html_in_answers_and_passages_is_text(page: Client) -> None:
    window, panel = ask(page, HOSTILE, model="rag:notes")
    for message in window:
        assert "<img" not in said(message)
        assert "![" not in said(message)
    assert "Passages it read" in panel
    assert "<script" not in panel
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in panel


def test_an_unknown_model_is_a_sentence_in_the_window(page: Client) -> None:
    window, panel = ask(page, "Hello", model="no-such-model")
    assert "**Not answered.**" in said(window[-1])
    assert "no-such-model" in said(window[-1])
    assert "no-such-model" in panel


async def test_stopping_an_answer_stops_the_engine(face: Served, page: Client) -> None:
    before = (await engine_log(face.home))["aborted"]
    job = page.submit(text="@tokens 500 @delay 100ms", model="prompt", max_tokens=1024, key="", api_name="/chat")
    await until(lambda: len(job.outputs()) > 2)
    job.cancel()

    async def aborted() -> bool:
        return (await engine_log(face.home))["aborted"] == before + 1

    await until(aborted, 10)


def test_S17_the_page_asks_with_the_callers_own_key(tmp_path: Path) -> None:
    served = start_server(tmp_path, "--engine", "scripted", "--no-quickstart")
    try:
        key = json.loads(served.hybrid("keys", "create", "ann", "--json").stdout)["key"]
        basic = "Basic " + base64.b64encode(f"ann:{key}".encode()).decode()
        assert fetch(served.url + "/")[0] == 401
        assert fetch(served.url + "/", Authorization=basic)[0] == 200
        page = Client(served.url, verbose=False, headers={"Authorization": basic})
        assert "**Not answered.**" not in said(ask(page, "Hello")[0][-1])
        assert "**Not answered.**" in said(ask(page, "Hello", key="sk-wrong")[0][-1])
    finally:
        stop_server(served)


# --- what is painted -------------------------------------------------------------------------------------------------


def turn(**more: object) -> Turn:
    fields: dict = {"question": "q", "model": "auto", "answer": "a", "arm": "prompt", "done": True, **more}
    return Turn(**fields)


def test_code_is_shown_as_it_was_written() -> None:
    text = "a < b <b>bold</b>\n```html\n<b>![x](y)</b>\n```\n`<i>` and ![x](y)"
    shown = markdown(text)
    assert "```html\n<b>![x](y)</b>\n```" in shown
    assert "`<i>`" in shown
    assert "a < b" in shown
    assert "&lt;b>bold&lt;/b>" in shown
    assert shown.count("![") == 1


def test_an_unclosed_fence_is_code_to_its_end() -> None:
    assert markdown("```\n<b>") == "```\n<b>"


def test_every_message_of_the_window_finds_its_turn() -> None:
    turns = (turn(), turn(error="broken", arm=""), turn(arm=""), turn())
    owners = [place(turns, index) for index in range(len(messages(turns)))]
    assert owners == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert place((), 4) == 0


def test_failed_turns_and_old_turns_are_not_sent_again() -> None:
    past = (turn(question="old " * 400), turn(question="kept"), turn(question="failed", error="x"))
    body = request_body("now", past, Options(history_chars=400))
    assert [m["content"] for m in body["messages"]] == ["kept", "a", "now"]


def test_the_words_of_a_stopped_answer_stay() -> None:
    assert stopped(turn(done=False)).answer == "a"
    assert stopped(turn(done=False, answer="")).error


def test_panels_escape_what_they_are_told() -> None:
    evil = "<img src=x onerror=alert(1)>"
    detail = {
        "reason": evil,
        "fallback": evil,
        "scores": {evil: 0.5},
        "passages": [{"title": evil, "quote": evil, "filename": evil, "corpus": evil}],
        "drafts": [{"arm": evil, "text": evil}],
    }
    status = {
        "engine": {"model": evil, "detail": evil},
        "phase": evil,
        "adapters": [{"name": evil, "version": 1, "alias": True, "reason": evil, "state": evil, "metrics": {evil: 1}}],
        "corpora": [{"name": evil}],
        "jobs": [{"kind": evil, "spec": {"name": evil}, "status": "running", "error": evil}],
    }
    painted = explain(turn(arm=evil, adapter=evil, detail=detail), evil) + status_line(status)
    painted += versions_table(status)
    assert "<img" not in painted
    assert "<img" not in explain(turn(error=evil))


def test_the_line_says_what_is_going_on() -> None:
    job = {
        "kind": "train",
        "spec": {"name": "sql"},
        "status": "running",
        "progress": {"step": 50, "steps": 200, "eta_s": 70},
    }
    line = status_line({"status": "not ready", "phase": "starting engine", "engine": {"model": "m"}, "jobs": [job]})
    assert "starting engine" in line
    assert "25 %, 70 s left" in line


@pytest.mark.parametrize(
    ("typed", "header", "key"),
    [
        (" sk-typed ", "Bearer sk-header", "sk-typed"),
        ("", "Bearer sk-header", "sk-header"),
        (None, "Basic " + base64.b64encode(b"ann:sk-basic").decode(), "sk-basic"),
        ("", "Basic not-base64!", ""),
        ("", None, ""),
    ],
)
def test_the_callers_key(typed: str | None, header: str | None, key: str) -> None:
    assert caller_key(typed, header) == key
