"""A linear head on frozen features: trained from a task folder, served as `head:NAME` without the engine."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from server_kit import Running, make_home, running, until

from hybrid.adapters.heads import CLASSES, HEAD_WEIGHTS, Head, bare, read_head
from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, ModelNotFound, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.rooms import Home
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training.run import TrainResult, train

INSTRUCTION = "Say what the customer wants."
OPENINGS = ("please", "hello,", "quick question:", "hi there,", "urgent!", "sorry to ask,", "good morning,", "well,")
WORDS = {
    "lost_card": ["my card is gone", "I lost my card", "somebody stole my bank card", "I cannot find my card anywhere"],
    "refund": ["I want my money back", "refund my purchase", "return this payment to me", "give me a refund"],
    "weather": ["will it rain tomorrow", "how warm is it outside", "is it snowing today", "tell me the forecast"],
}


def rows(openings: tuple[str, ...]) -> list[dict[str, Any]]:
    texts = [(f"{opening} {words}", label) for opening in openings for label, said in WORDS.items() for words in said]
    return [{"id": str(n), "input": text, "reference": label} for n, (text, label) in enumerate(texts)]


def write_task(folder: Path, train: list[dict[str, Any]], dev: list[dict[str, Any]], **task: Any) -> Path:
    folder.mkdir()
    facts = {"name": "wishes", "instruction": INSTRUCTION, "metric": "accuracy", "labels": sorted(WORDS)} | task
    (folder / "task.json").write_text(json.dumps(facts))
    for split, part in (("train", train), ("dev", dev)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@cache
def the_embedder() -> Embedder:
    files = materialise(DEFAULT_EMBEDDER, Settings.load().cache)
    return Embedder(files.path, files.name)


def fitted(home: Path, task: Path, model: ModelFiles, told: list[dict[str, Any]] | None = None, **recipe: Any) -> Any:
    """Trains in a home of its own; (result, store)."""
    settings = Settings.load(home=home)
    store = AdapterStore(Home(home), State(Home(home).database))
    result = train(
        task, settings=settings, name=None, overrides={"method": "head", **recipe}, store=store, model=model,
        embedder=the_embedder(), progress=lambda **said: told.append(said) if told is not None else None,
    )  # fmt: skip
    assert isinstance(result, TrainResult)
    return result, store


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("data") / "wishes", rows(OPENINGS), rows(("excuse me,", "so,")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, task: Path, tiny: ModelFiles) -> Path:
    """A published head."""
    return fitted(tmp_path_factory.mktemp("trained"), task, tiny)[0].path


def publish(home: Path, folder: Path, name: str = "wishes", **changes: Any) -> None:
    """Publishes a copy of a head in another home."""
    state = State(Home(home).database)

    def fill(staging: Path) -> dict[str, Any]:
        for file in (HEAD_WEIGHTS, CLASSES):
            (staging / file).write_bytes((folder / file).read_bytes())
        return json.loads((folder / "card.json").read_text()) | changes

    AdapterStore(Home(home), state).publish(name, fill)
    state.close()


# --- training --------------------------------------------------------------------------------------------------------


def test_a_task_folder_becomes_a_head(tmp_path, task, tiny):
    told: list[dict[str, Any]] = []
    result, store = fitted(tmp_path, task, tiny, told)
    version = store.resolve(f"{result.adapter}@{result.version}")
    metrics = version.card["metrics"]
    assert version.kind == "head"
    assert version.serve_with == "ask for head:wishes"
    assert (metrics["train_rows"], metrics["dev_rows"]) == (96, 24)
    assert metrics["dev_right"] >= 22
    assert metrics["dev_accuracy"] == round(metrics["dev_right"] / 24, 4)
    assert 0 < metrics["dev_loss"] < math.log(3) / 2
    assert version.card["base_sha256"] == ""  # whatever model is served, the embedder is the same
    assert version.card["embedder"] == the_embedder().digest
    steps = [said for said in told if "step" in said]
    assert steps[-1]["step"] == steps[-1]["steps"]
    head = read_head(version.ref.path)
    assert head.classes == ("lost_card", "refund", "weather")
    assert head.weight.shape == (3, the_embedder().dim)
    assert (version.ref.path / "dev.jsonl").exists()


@pytest.mark.parametrize(("features", "width"), [("base", 64), ("both", 64)])
def test_the_bases_own_features_are_measured_and_not_served(tmp_path, task, tiny, features, width):
    result, store = fitted(tmp_path, task, tiny, features=features)
    head = read_head(result.path)
    assert head.weight.shape[1] == width + (the_embedder().dim if features == "both" else 0)
    assert store.resolve("wishes@1").card["base_sha256"] == tiny.sha256
    assert result.metrics["dev_right"] > 24 / 3
    store.mark("wishes@1", "candidate")
    with pytest.raises(ModelNotFound, match="does not answer: It reads the base model's hidden states"):
        store.head("wishes")


def test_two_labels_and_a_dev_label_that_training_never_saw(tmp_path, tiny):
    two = [row for row in rows(OPENINGS) if row["reference"] != "weather"]
    result, _ = fitted(tmp_path, write_task(tmp_path / "two", two, rows(("so,",))), tiny)
    assert result.metrics["dev_rows"] == 12
    assert 7 <= result.metrics["dev_right"] <= 8  # the third label cannot be right
    assert read_head(result.path).weight.shape[0] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n: f"an answer of its own, number {n}", "open-ended"),
        (lambda _: "always this", "same answer"),
    ],
)
def test_a_task_without_a_closed_set_of_answers_is_refused(tmp_path, tiny, change, says):
    part = [row | {"reference": change(n)} for n, row in enumerate(rows(OPENINGS))]
    folder = write_task(tmp_path / "open", part, [row | {"reference": "x"} for row in rows(("so,",))], labels=[])
    with pytest.raises(BadRequest, match=says):
        fitted(tmp_path, folder, tiny)


def test_the_dev_loss_is_that_of_the_published_numbers(trained, task):
    """What the card says is what the files do: nothing is lost between fitting and saving."""
    head = read_head(trained)
    dev = rows(("excuse me,", "so,"))
    chances = head.probabilities(the_embedder().embed([row["input"] for row in dev]))
    truth = [head.classes.index(row["reference"]) for row in dev]
    loss = -np.log(chances[range(len(dev)), truth]).mean()
    metrics = json.loads((trained / "card.json").read_text())["metrics"]
    assert loss == pytest.approx(metrics["dev_loss"], abs=0.01)
    assert (chances.argmax(axis=1) == truth).sum() == metrics["dev_right"]


# --- the files -------------------------------------------------------------------------------------------------------


def small(classes: int = 3, dim: int = 4) -> Head:
    random = np.random.default_rng(0).normal(size=(classes, dim)).astype(np.float32)
    ones = np.ones(dim, np.float32)
    return Head(tuple("abcdef"[:classes]), random, np.zeros(classes, np.float32), 0 * ones, ones, 2.0)


def test_a_head_is_read_as_it_was_saved(tmp_path):
    head = small()
    head.save(tmp_path)
    again = read_head(tmp_path)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert np.array_equal(head.probabilities(x), again.probabilities(x))
    assert np.allclose(again.probabilities(x).sum(axis=1), 1)
    verdict = again.verdict(x[1])
    assert verdict.label == again.classes[int(head.logits(x)[1].argmax())]
    assert [chance for _, chance in verdict.ranked] == sorted((c for _, c in verdict.ranked), reverse=True)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a: a.pop("bias"), "does not hold a head"),
        (lambda a: a.update(weight=a["weight"][:, :2]), "does not hold a head"),
        (lambda a: a.update(mean=np.zeros((), np.float32)), "does not hold a head"),
        (lambda a: a.update(temperature=np.zeros(1, np.float32)), "divides by zero"),
        (lambda a: a["std"].fill(0), "divides by zero"),
        (lambda a: a["weight"].fill(np.inf), "NaN or infinity"),
        (lambda a: a.update(extra=np.ones(2, np.float32)), "does not hold a head"),
    ],
)
def test_a_spoiled_head_is_refused(tmp_path, spoil, says):
    small().save(tmp_path)
    arrays = load_file(tmp_path / HEAD_WEIGHTS)
    spoil(arrays)
    save_file(arrays, tmp_path / HEAD_WEIGHTS)
    with pytest.raises(Refused, match=says):
        read_head(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", '["a"]', "[1, 2, 3]", "[" * 5000])
def test_labels_that_are_none_are_refused(tmp_path, text):
    small().save(tmp_path)
    (tmp_path / CLASSES).write_text(text)
    with pytest.raises(Refused, match=CLASSES):
        read_head(tmp_path)


@pytest.mark.parametrize("text", ["my card", f"{INSTRUCTION}\n\nmy card", "  my card\n", f"{INSTRUCTION} my card"])
def test_the_instruction_is_no_part_of_what_is_read(text):
    assert bare(text, INSTRUCTION) == "my card"
    assert bare(text, "") == text.strip()


# --- serving ---------------------------------------------------------------------------------------------------------


async def served(server: Running, name: str = "wishes@1") -> None:
    await until(lambda: server.gateway.store.resolve(name).state in ("candidate", "rejected"))


async def test_a_head_answers_over_http_and_the_engine_is_not_asked(tmp_path, trained):
    publish(tmp_path, trained)
    async with running(make_home(tmp_path)) as server, server.client() as client:
        await served(server)
        before = (await server.engine_log())["requests"]
        for text in ("I lost my card!", f"{INSTRUCTION}\n\nI lost my card!"):
            said = [{"role": "user", "content": text}]
            raw = await client.chat.completions.with_raw_response.create(model="head:wishes", messages=said)
            answer = raw.parse()
            assert answer.choices[0].message.content == "lost_card"
            assert answer.choices[0].finish_reason == "stop"
            assert answer.model == "head:wishes"
            assert answer.usage.completion_tokens >= 1
            assert raw.headers["x-hybrid-selected-arm"] == "head:wishes"
            assert raw.headers["x-hybrid-selected-adapter"] == "wishes"
            assert raw.headers["x-hybrid-selected-version"] == "1"
        stream = await client.chat.completions.create(
            model="head:wishes@1", messages=said, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "lost_card"
        assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, "stop"]
        assert chunks[-1].usage.total_tokens > 0
        plain = await client.completions.create(model="head:wishes", prompt="give me a refund", logprobs=2)
        assert plain.choices[0].text == "refund"
        assert len(plain.choices[0].logprobs.top_logprobs[0]) == 2
        parts = [c async for c in await client.completions.create(model="head:wishes", prompt="refund", stream=True)]
        assert "".join(c.choices[0].text for c in parts) == "refund"
        assert (await server.engine_log())["requests"] == before


async def test_its_probabilities_are_shown_to_those_who_ask(tmp_path, trained):
    publish(tmp_path, trained)
    async with running(make_home(tmp_path)) as server, server.client() as client:
        await served(server)
        said = [{"role": "user", "content": "is it snowing today"}]
        answer = await client.chat.completions.create(
            model="head:wishes",
            messages=said,
            logprobs=True,
            top_logprobs=3,
            n=2,
            extra_body={"hybrid": {"explain": True}},
        )
        assert [choice.message.content for choice in answer.choices] == ["weather", "weather"]
        (token,) = answer.choices[0].logprobs.content
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
        assert sum(math.exp(other.logprob) for other in token.top_logprobs) == pytest.approx(1)
        (draft,) = answer.model_extra["hybrid"]["drafts"]
        assert draft["arm"] == "head:wishes"
        assert draft["text"].startswith("weather 0.")
        stream = await client.chat.completions.create(
            model="head:wishes", messages=said, stream=True, n=2, extra_body={"hybrid": {"explain": True}}
        )
        chunks = [chunk async for chunk in stream]
        assert [c.choices[0].index for c in chunks] == [0, 0, 1, 1]
        assert chunks[-1].model_extra["hybrid"]["arm"] == "head:wishes"


async def test_a_head_is_routed_to_by_name_and_an_unknown_one_is_404(tmp_path, trained):
    publish(tmp_path, trained)
    async with running(make_home(tmp_path)) as server:
        await served(server)
        body = {"messages": [{"role": "user", "content": "refund"}]}
        code, said, headers = await server.post("/v1/route", body | {"model": "head:wishes"})
        assert (code, said["decision"]["arm"], said["decision"]["adapter"]) == (200, "head:wishes", "wishes@1")
        assert headers["x-hybrid-selected-arm"] == "head:wishes"
        for model in ("head", "head:", "head:nobody", "head:wishes@2", "head:wishes:corpus", "wishes", "wishes@1"):
            code, said, _ = await server.post("/v1/chat/completions", body | {"model": model})
            assert (code, said["error"]["code"]) == (404, "model_not_found"), model
        code, said, _ = await server.post("/v1/chat/completions", {"model": "head:wishes", "messages": [
            {"role": "user", "content": "  "}]})  # fmt: skip
        assert (code, said["error"]["code"]) == (400, "invalid_request_error")


async def test_a_head_of_another_embedder_or_of_spoiled_files_says_so(tmp_path, trained):
    publish(tmp_path, trained, embedder="0" * 64)
    broken = tmp_path / "broken"
    broken.mkdir()
    small().save(broken)
    (broken / "card.json").write_text((trained / "card.json").read_text())
    (broken / CLASSES).write_text('["only"]')
    publish(tmp_path, broken, "broken")
    async with running(make_home(tmp_path)) as server:
        await served(server)
        await served(server, "broken@1")
        body = {"messages": [{"role": "user", "content": "refund"}]}
        code, said, _ = await server.post("/v1/chat/completions", body | {"model": "head:wishes"})
        assert code == 422
        assert "another embedder" in said["error"]["message"]
        code, said, _ = await server.post("/v1/chat/completions", body | {"model": "head:broken"})
        assert code == 404
        assert "at least two labels" in said["error"]["message"]
