"""What the harness for standard benchmarks (lm-eval's `local-completions` and `local-chat-completions`) asks of an
endpoint, sent as it sends it and read as it reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from server_kit import make_home, running

from hybrid.prompts import task_message

ROOT = Path(__file__).resolve().parents[1]
HARNESS_TASKS = ("tickets.yaml", "tickets_intent.yaml")

#: the body of its loglikelihood requests, beside model and prompt
SCORED = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


def loglikelihoods(body: dict[str, Any], contexts: Sequence[int]) -> list[tuple[float, bool]]:
    """(sum over the continuation, whether the model would say it) of each choice, after the context's tokens."""
    found = []
    for choice, skip in zip(sorted(body["choices"], key=lambda c: c["index"]), contexts, strict=True):
        logprobs = choice["logprobs"]
        own, top = logprobs["token_logprobs"][skip:-1], logprobs["top_logprobs"][skip:-1]
        found.append((sum(own), all(value == max(best.values()) for value, best in zip(own, top, strict=True))))
    return found


@pytest.mark.parametrize(
    "prompts",
    [
        [[11, 12, 13, 14], [11, 12, 15]],
        ["one two three four", "one two five"],
    ],
    ids=["token ids", "texts"],
)
async def test_loglikelihoods_of_continuations(tmp_path: Path, prompts: list[Any]) -> None:
    async with running(make_home(tmp_path)) as server:
        status, together, _ = await server.post("/v1/completions", {"model": "base", "prompt": prompts, **SCORED})
        apart = [await server.post("/v1/completions", {"model": "base", "prompt": p, **SCORED}) for p in prompts]
        _, asked, _ = await server.post(
            "/v1/completions", {"model": "base", "prompt": prompts, "max_tokens": 1, "prompt_logprobs": 1}
        )
    assert status == 200
    scores = loglikelihoods(together, [2, 2])
    assert [loglikelihoods(body, [2])[0] for _, body, _ in apart] == scores
    for (score, greedy), choice, length in zip(scores, asked["choices"], [4, 3], strict=True):
        told = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][2:]]
        assert score == pytest.approx(sum(told))
        assert score < 0
        assert greedy
        assert len(told) == length - 2
    assert [len(c["logprobs"]["tokens"]) for c in together["choices"]] == [5, 4]
    assert together["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert together["usage"]["completion_tokens"] == 2


async def test_a_prompt_alone_is_scored_without_an_answer(tmp_path: Path) -> None:
    ask = {"model": "base", "prompt": "one two three", **SCORED, "max_tokens": 0}
    async with running(make_home(tmp_path)) as server:
        status, body, _ = await server.post("/v1/completions", ask)
        without, error, _ = await server.post("/v1/completions", {**ask, "echo": False})
        chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0, "echo": True}
        in_chat, _, _ = await server.post("/v1/chat/completions", chat)
    assert (status, without, in_chat) == (200, 400, 400)
    assert error["error"]["param"] == "max_tokens"
    choice = body["choices"][0]
    assert choice["text"] == "one two three"
    assert choice["logprobs"]["tokens"] == ["one", " two", " three"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7]
    assert body["usage"]["prompt_tokens"] == 3


async def test_generations_for_several_prompts_and_for_a_chat(tmp_path: Path) -> None:
    asked = {"max_tokens": 9, "temperature": 0, "stop": ["\n\n", "<|im_end|>"], "seed": 1234}
    async with running(make_home(tmp_path)) as server:
        _, many, _ = await server.post(
            "/v1/completions", {"model": "prompt", "prompt": [[1, 2], [3, 4, 5]], "until_not_known": None, **asked}
        )
        message = {"role": "user", "content": "Which colour?", "type": "text"}
        body = {"model": "auto", "messages": [message], **asked}
        _, chat, _ = await server.post("/v1/chat/completions", body, authorization="Bearer ")  # it has no key to send
    assert [c["text"] for c in sorted(many["choices"], key=lambda c: c["index"])] == [
        "The base model read: 1 2", "The base model read: 3 4 5",
    ]  # fmt: skip
    assert chat["choices"][0]["message"]["content"] == "The base model read: Which colour?"


async def test_there_is_no_tokenizer_at_the_server(tmp_path: Path) -> None:
    """It looks for one first; anything but an error would be taken for one."""
    async with running(make_home(tmp_path)) as server:
        status, error, _ = await server.get("/tokenizer_info")
    assert (status, error["error"]["code"]) == (404, "not_found")


def test_the_tasks_in_the_docs_are_those_of_the_home() -> None:
    folder = ROOT / "eval" / "tasks" / "tickets"
    about = json.loads((folder / "task.json").read_text())
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    written, scored = (yaml.safe_load((ROOT / "docs" / "lm-eval" / name).read_text()) for name in HARNESS_TASKS)
    for task in (written, scored):
        assert (ROOT / task["dataset_kwargs"]["data_files"]["test"]).resolve() == folder / "test.jsonl"
    assert written["doc_to_text"] == task_message(about["instruction"], "{{input}}")
    assert set(scored["doc_to_choice"]) == {json.loads(row["reference"])["intent"] for row in rows}
    assert all(row["meta"]["phrasing"].split(".")[0] == json.loads(row["reference"])["intent"] for row in rows)
