"""The product on real input: real vLLM, the real model, real tasks, through the official client.

A corpus is indexed, two adapters are trained and hot-loaded into the running server, and `auto` finds the right arm.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from conftest import Served

from hybrid.adapters.canary import TOLERANCE, TOLERANCE_OF_EFFECT
from hybrid.models import materialise
from hybrid.settings import DEFAULT_MODEL, Settings

# the fixture indexes and trains three versions beside a serving engine: five minutes on idle cores, more on busy ones
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]

PASSAGES = 1200
ROWS = 500


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, items: list[dict]) -> None:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def slice_task(source: Path, target: Path, train: int, dev: int) -> None:
    """A smaller copy of a task folder, without its test split: training must not even see it."""
    target.mkdir(parents=True)
    (target / "task.json").write_text((source / "task.json").read_text())
    write(target / "train.jsonl", random.Random(0).sample(rows(source / "train.jsonl"), train))
    write(target / "dev.jsonl", rows(source / "dev.jsonl")[:dev])


def ask(client: openai.OpenAI, text: str, model: str = "auto", **more):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=64, temperature=0, **more
    )
    return raw.headers["x-hybrid-selected-arm"], raw.parse().choices[0].message


@pytest.fixture(scope="module")
def client(real_server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", timeout=120)


@pytest.fixture(scope="module")
def home(real_server: Served, data: Path, client: openai.OpenAI) -> Served:
    """A home with a corpus, two adapters and a head, all published while the server runs."""
    work = real_server.home / "slices"
    facts = work / "facts"
    facts.mkdir(parents=True)
    questions = rows(data / "rag_nq" / "test.jsonl")[:40]
    gold = {p for q in questions for p in q["meta"]["gold_passages"]}
    corpus = rows(data / "rag_nq" / "corpus.jsonl")
    rest = random.Random(1).sample([p for p in corpus if p["id"] not in gold], PASSAGES - len(gold))
    write(facts / "corpus.jsonl", [p for p in corpus if p["id"] in gold] + rest)
    report = json.loads(real_server.hybrid("index", str(facts), "--name", "facts", "--json").stdout)
    assert report["passages"] > 0.9 * PASSAGES
    slice_task(data / "intent_banking77", work / "bank", ROWS, 60)
    done = real_server.hybrid("train", str(work / "bank"), "--name", "bank", "--set", "epochs=2", "--json")
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["adapter"], last["version"], last["promoted"]) == ("bank", 1, True)
    heads = real_server.hybrid("train", str(work / "bank"), "--name", "bank", "--method", "head", "--json")
    assert json.loads(heads.stdout.splitlines()[-1])["version"] == 2
    slice_task(data / "slots_snips", work / "voice", ROWS, 60)
    fine_tune(client, work / "voice", "voice")
    return real_server


def chat(folder: Path, split: str) -> bytes:
    """A split of a task as OpenAI's chat rows."""
    instruction = json.loads((folder / "task.json").read_text())["instruction"]
    lines = [
        {"messages": [
            {"role": "user", "content": f"{instruction}\n\n{row['input']}"},
            {"role": "assistant", "content": row["reference"]},
        ]}
        for row in rows(folder / f"{split}.jsonl")
    ]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def fine_tune(client: openai.OpenAI, folder: Path, name: str) -> None:
    """Started, watched, paused, resumed and used with nothing but the official client."""
    jobs = client.fine_tuning.jobs
    training, validation = (
        client.files.create(file=(f"{split}.jsonl", chat(folder, split)), purpose="fine-tune").id
        for split in ("train", "dev")
    )
    job = jobs.create(
        model="base", training_file=training, validation_file=validation, suffix=name,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    )  # fmt: skip
    until(lambda: any(event.type == "metrics" for event in jobs.list_events(job.id)))
    jobs.pause(job.id)
    until(lambda: jobs.retrieve(job.id).status == "paused")
    jobs.resume(job.id)
    until(lambda: jobs.retrieve(job.id).status not in ("queued", "running", "paused"))
    done = jobs.retrieve(job.id)
    assert done.status == "succeeded", done.error
    _, message = ask(client, f"{json.loads((folder / 'task.json').read_text())['instruction']}\n\nplay some jazz",
                     model=str(done.fine_tuned_model))  # fmt: skip
    assert json.loads(message.content or "")["intent"]


def until(there: Callable[[], bool], timeout_s: float = 1200) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_published_adapters_are_models_at_once(home: Served, client: openai.OpenAI) -> None:
    names = {model.id for model in client.models.list()}
    assert {"auto", "base", "prompt", "rag:facts", "bank", "bank@1", "voice", "head:bank", "few_shot:bank"} <= names


@pytest.mark.parametrize(("source", "arms"), [
    ("intent_banking77", {"adapter:bank"}),
    ("slots_snips", {"adapter:voice"}),
    ("rag_nq", {"rag:facts"}),
])  # fmt: skip
def test_auto_takes_the_arm_of_the_task(
    home: Served, client: openai.OpenAI, data: Path, source: str, arms: set[str]
) -> None:
    instruction = json.loads((data / source / "task.json").read_text())["instruction"]
    questions = rows(data / source / "test.jsonl")[:40]
    chosen = [
        client.post("/route", cast_to=object, body={"model": "auto", "messages": [{"role": "user", "content": text}]})
        for question in questions
        for text in (f"{instruction}\n\n{question['input']}",)
    ]
    taken = [answer["decision"]["arm"] for answer in chosen]  # type: ignore[index]
    assert sum(arm in arms for arm in taken) >= 0.9 * len(taken), taken


def test_a_bank_message_gets_its_label(home: Served, client: openai.OpenAI, data: Path) -> None:
    task = json.loads((data / "intent_banking77" / "task.json").read_text())
    right = 0
    for row in rows(data / "intent_banking77" / "test.jsonl")[:20]:
        arm, message = ask(client, f"{task['instruction']}\n\n{row['input']}")
        if arm == "adapter:bank":
            assert message.content
            right += message.content.strip() == row["reference"]
    assert right >= 8  # 77 labels; chance is a quarter of one


def test_a_voice_command_gets_its_json(home: Served, client: openai.OpenAI, data: Path) -> None:
    task = json.loads((data / "slots_snips" / "task.json").read_text())
    valid = 0
    for row in rows(data / "slots_snips" / "test.jsonl")[:10]:
        arm, message = ask(client, f"{task['instruction']}\n\n{row['input']}")
        assert arm == "adapter:voice"
        try:
            valid += json.loads(message.content or "")["intent"] == json.loads(row["reference"])["intent"]
        except (ValueError, KeyError, TypeError):
            continue
    assert valid >= 7


def test_a_factual_question_is_answered_from_the_corpus_with_the_passage_cited(
    home: Served, client: openai.OpenAI, data: Path
) -> None:
    instruction = json.loads((data / "rag_nq" / "task.json").read_text())["instruction"]
    cited = 0
    questions = rows(data / "rag_nq" / "test.jsonl")[:10]
    for row in questions:
        _, message = ask(client, f"{instruction}\n\n{row['input']}", model="rag:facts")
        ids = {note["file_citation"]["filename"] for note in message.model_dump()["annotations"]}
        cited += bool(ids & set(row["meta"]["gold_passages"]))
    assert cited >= 8


@pytest.mark.parametrize("text", ["hi there!", "Thanks a lot, have a nice day", "Tell me a joke about cats."])
def test_small_talk_goes_to_prompt(home: Served, client: openai.OpenAI, text: str) -> None:
    arm, message = ask(client, text)
    assert arm == "prompt"
    assert message.content


def test_few_shot_shows_the_nearest_examples(home: Served, client: openai.OpenAI) -> None:
    arm, _ = ask(client, "I still have not received my new card", model="few_shot:bank")
    assert arm == "few_shot:bank"


def test_a_head_answers_with_a_label(home: Served, client: openai.OpenAI, data: Path) -> None:
    questions = rows(data / "intent_banking77" / "test.jsonl")[:40]
    right = [ask(client, row["input"], model="head:bank")[1].content == row["reference"] for row in questions]
    assert sum(right) >= 25  # of 77 labels, from a tenth of the training rows


def test_arms_confer(home: Served, client: openai.OpenAI, data: Path) -> None:
    row = rows(data / "intent_banking77" / "test.jsonl")[0]
    instruction = json.loads((data / "intent_banking77" / "task.json").read_text())["instruction"]
    question = f"{instruction}\n\n{row['input']}"
    for model, count in (("moa", 3), ("self_moa", 4)):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            extra_body={"hybrid": {"explain": True}},
        )
        drafts = (answer.model_extra or {})["hybrid"]["drafts"]
        assert len(drafts) == count
        assert all(draft["text"] and draft["usage"]["completion_tokens"] for draft in drafts)
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= sum(draft["usage"]["completion_tokens"] for draft in drafts)
        assert answer.choices[0].message.content


def test_adapter_with_passages(home: Served, client: openai.OpenAI) -> None:
    arm, message = ask(client, "who wrote the song?", model="adapter+rag:voice:facts")
    assert arm == "adapter+rag:voice:facts"
    assert message.content is not None


def test_a_mix_answers_as_peft_computes_it(home: Served, client: openai.OpenAI) -> None:
    """The engine's log-probabilities with `mix:` lie as near PEFT's with both adapters as rounding allows."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, weights = "mix:bank=0.7,voice=0.3", (0.7, 0.3)
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "where is my card?"}], max_tokens=8
    )
    assert raw.headers["x-hybrid-selected-arm"] == model
    assert raw.parse().choices[0].message.content
    version = f"{raw.headers['x-hybrid-selected-adapter']}@{raw.headers['x-hybrid-selected-version']}"
    assert json.loads(home.hybrid("adapters", "show", version, "--json").stdout)["card"]["mix"] == {
        "bank@1": 0.7, "voice@1": 0.3,
    }  # fmt: skip

    files = materialise(DEFAULT_MODEL, Settings.load().cache)
    tokenizer = AutoTokenizer.from_pretrained(files.path)
    base = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.bfloat16)
    folders = [home.home / "adapters" / name / "1" for name in ("bank", "voice")]
    peft = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0")
    peft.load_adapter(str(folders[1]), adapter_name="1")
    peft.base_model.set_adapter(["0", "1"])
    for layer in peft.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling.update({name: scale * weights[int(name)] for name, scale in layer.scaling.items()})
    text = "Customer: My parcel has not arrived and I would like my money back.\nAgent: I am sorry to hear that."
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def by_peft() -> torch.Tensor:
        with torch.no_grad():
            logits = peft.to(torch.bfloat16).eval()(ids).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    with peft.disable_adapter():
        plain = by_peft()
    theirs = by_peft()
    ours = torch.tensor(
        client.completions.create(
            model=model, prompt=ids[0].tolist(), max_tokens=1, temperature=0, logprobs=0, echo=True
        ).choices[0].logprobs.token_logprobs[1 : ids.shape[1]]  # type: ignore[union-attr,index,arg-type]
    )  # fmt: skip
    effect = float((theirs - plain).abs().mean())
    assert float((ours - theirs).abs().mean()) <= max(TOLERANCE, TOLERANCE_OF_EFFECT * effect)
    assert effect > TOLERANCE, "the adapters do too little for this to show anything"
