"""Raw text, passages, teachers and schedules: each trains on real rows into a published version."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from objectives_kit import House, choices, padded, rows, sample, write
from server_kit import chat, running, until
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.errors import BadRequest, DataError, EngineError, Refused
from hybrid.knowledge.search import Library
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.training.base import forward_of, load_base
from hybrid.training.data import digest, read_dataset
from hybrid.training.distill import Taught
from hybrid.training.formats import Text
from hybrid.training.mixture import assemble, mixed, shares
from hybrid.training.pretrain import pieces
from hybrid.training.raft import Retriever
from hybrid.training.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

# --- raw text ------------------------------------------------------------------------------------------------------


def test_every_token_of_a_text_is_predicted_once(tiny: ModelFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    text = "The quick brown fox jumps over the lazy dog. " * 5
    cut = pieces(tokenizer, [Text("a", text), Text("b", "x")], 50)
    assert max(row.length for row in cut) <= 50
    *of_a, of_b = cut
    assert (
        tokenizer.decode([of_a[0].prompt[0], *(token for row in of_a for token in row.answer)]) == text + "<|im_end|>"
    )
    assert tokenizer.decode([*of_b.prompt, *of_b.answer]) == "x<|im_end|>"


def test_raw_text_becomes_an_adapter(data: Path, house: House, tmp_path: Path) -> None:
    texts = [{"id": row["id"], "text": row["text"]} for row in rows(data / "rag_nq", "corpus", 40)]
    result = house.train(write(tmp_path / "nq", train=texts), method="pretrain", max_length=128)
    losses = [point["dev_loss"] for point in house.card(result)["curve"]]
    assert result.metrics["dev_loss"] == pytest.approx(min(losses), rel=1e-3)
    assert result.metrics["dev_perplexity"] == pytest.approx(math.exp(result.metrics["dev_loss"]), rel=1e-3)
    assert (result.path / "adapter_model.safetensors").is_file()
    assert not (result.path / "examples.jsonl").exists()  # nothing is asked, so nothing routes to it
    with pytest.raises(DataError, match="plain texts"):
        house.train(tmp_path / "nq")


# --- passages ------------------------------------------------------------------------------------------------------


@pytest.fixture
def nq(data: Path, tmp_path: Path) -> Path:
    """Real questions with a corpus of the passages that answer them and as many others."""
    folder = sample(data, "rag_nq", tmp_path / "nq", 8, 4)
    gold = {
        name for split in ("train", "dev") for row in rows(folder, split, 99) for name in row["meta"]["gold_passages"]
    }
    corpus = rows(data / "rag_nq", "corpus", 10**6)
    return write(folder, corpus=[row for row in corpus if row["id"] in gold] + corpus[:20])


@pytest.mark.parametrize(("passages", "model"), [(None, "rag:nq"), (3, "adapter+rag:nq:nq")])
def test_raft_trains_on_what_the_strategy_will_send(house: House, nq: Path, passages: int | None, model: str) -> None:
    result = house.train(nq, name="nq", method="raft", max_length=2048, max_steps=2, passages=passages)
    assert house.card(result)["corpus"] == "nq"
    assert house.card(result)["passages"] == (passages or house.settings.retrieval.top_k)
    assert result.metrics["retrieval"]["dev_found"] > 0.5
    data = read_dataset(nq)
    job = house.job(data, Recipe(method="raft", passages=passages), "nq")
    tokenizer = AutoTokenizer.from_pretrained(house.tiny.path)
    with closing(Library(house.settings.rooms, house.embedder, house.settings.retrieval)) as library:
        retriever = Retriever(
            job,
            library,
            "nq",
            passages or house.settings.retrieval.shown(),
            lambda text: len(tokenizer(text)["input_ids"]),
        )
        trained, _ = retriever.over(data)
    assert result.metrics["dev_sha256"] == digest(trained.dev)

    async def sent() -> list[str]:
        engine, server = {"kind": "scripted"}, {"port": 0, "ui": False, "quickstart": False}
        retrieval = house.settings.retrieval.model_dump()
        home, base = house.settings.home, str(house.tiny.path)
        settings = Settings.load(home=home, model=base, engine=engine, server=server, retrieval=retrieval)
        async with running(settings) as server_:
            store = server_.gateway.store
            await until(lambda: store.resolve("nq@1").state == "live")  # its checks go on after the server is ready
            for row in data.dev:
                status, body, _ = await server_.post(
                    "/v1/chat/completions", chat(row.question, model=model, max_tokens=1)
                )
                assert status == 200, body
            requests = (await server_.engine_log())["requests"]
        asked = [request["body"]["messages"] for request in requests if "messages" in request["body"]]
        return [turns[-1]["content"] for turns in asked if "Use the passages" in str(turns[-1]["content"])]

    assert asyncio.run(sent()) == [row.question for row in trained.dev]


def test_the_right_passage_is_put_in_where_the_search_misses_it(house: House, nq: Path) -> None:
    data = read_dataset(nq)
    swapped = [
        replace(row, meta={"gold_passages": other.meta["gold_passages"]}, answer="~")
        for row, other in zip(data.train, [*data.train[1:], data.train[0]], strict=True)
    ]
    data = replace(data, train=tuple(swapped))
    with closing(Library(house.settings.rooms, house.embedder, house.settings.retrieval)) as library:
        library.ingest("nq", nq)
        for share, low, high in ((0.0, 0.0, 0.3), (1.0, 1.0, 1.0)):
            job = house.job(data, Recipe(method="raft", gold_share=share), "nq")
            _, told = Retriever(job, library, "nq", 3, lambda text: len(text) // 20).over(data)
            assert low <= told["train_shown"] <= high, told
            assert told["train_found"] < 0.3


def test_raft_without_a_corpus_says_what_to_do(house: House, bank: Path) -> None:
    with pytest.raises(BadRequest, match="hybrid index DIR --name new"):
        house.train(bank, method="raft")


# --- teachers ------------------------------------------------------------------------------------------------------


class Teacher(ThreadingHTTPServer):
    """An endpoint that answers in capitals, and refuses what `refuses` says."""

    def __init__(self, refuses: Callable[[str], bool]) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                question = body["messages"][-1]["content"]
                server.asked.append(question)
                refused = refuses(question)
                message = {"role": "assistant", "content": question[-12:].upper()}
                answer = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
                whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "t", **answer}
                told = json.dumps({"error": {"message": "no"}} if refused else whole).encode()
                self.send_response(400 if refused else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def test_a_teacher_is_asked_once_and_its_answers_are_learned(house: House, bank: Path) -> None:
    broken = True
    teacher = Teacher(lambda question: broken and len(question) % 3 == 0)
    try:
        recipe = {"method": "distill", "teacher": teacher.url, "teacher_model": "t"}
        with pytest.raises(EngineError, match="unanswered"):
            house.train(bank, **recipe)
        answered = {question for question in teacher.asked if len(question) % 3}
        assert len(answered) < len(teacher.asked) < 48  # it gave up
        teacher.asked.clear()
        broken = False
        result = house.train(bank, **recipe)
        assert len(teacher.asked) == len(set(teacher.asked))
        assert not answered & set(teacher.asked)
        told = result.metrics["teacher"]
        assert (told["answers"], told["failed"], told["equal_to_reference"]) == (48, 0, 0.0)
        assert len(answered) + len(teacher.asked) == 48
    finally:
        teacher.shutdown()
        teacher.server_close()


def test_the_distance_to_a_teacher_is_torchs_on_padded_rows(tiny: ModelFiles) -> None:
    found = [row.chosen for row in choices(tiny)]
    student, _ = load_base(tiny, "float32")
    teacher, _ = load_base(tiny, "float32")
    torch.manual_seed(7)
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    student.requires_grad_(True)
    objective = Taught(forward_of(student), forward_of(teacher), 3.0, 0.25)
    total = objective.backward(found, 1.0)
    plain = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    plain_teacher = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    plain_teacher.load_state_dict(teacher.state_dict())
    ids, mask = padded([[*row.prompt, *row.answer] for row in found])
    logits = plain(input_ids=ids, attention_mask=mask).logits
    with torch.no_grad():
        wanted = plain_teacher(input_ids=ids, attention_mask=mask).logits
    kl = entropy = torch.zeros(())
    for n, row in enumerate(found):
        places = slice(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
        soft, target = (logits[n, places] / 3).log_softmax(-1), (wanted[n, places] / 3).softmax(-1)
        kl = kl + 9 * torch.nn.functional.kl_div(soft, target, reduction="sum")
        entropy = entropy + torch.nn.functional.cross_entropy(
            logits[n, places], torch.tensor(row.answer), reduction="sum"
        )
    loss = 0.25 * kl + 0.75 * entropy
    loss.backward()
    assert float(kl.detach()) > 1
    assert total == pytest.approx(float(loss.detach()), rel=1e-4)
    assert total == pytest.approx(objective.total(found), rel=1e-4)
    assert objective.apart(found) * objective.weight(found) == pytest.approx(float(kl.detach()), rel=1e-4)
    ours = dict(student.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=2e-3, atol=1e-4)


def test_a_local_teacher_is_learned_from(house: House, bank: Path, tmp_path: Path) -> None:
    model, tokenizer = load_base(house.tiny, "float32")
    model.model.layers[1].mlp.down_proj.weight.data *= 3
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    result = house.train(bank, method="distill_logits", teacher=teacher, distill_weight=1.0, eval_every=1)
    losses = [point["dev_loss"] for point in house.card(result)["curve"]]
    assert result.metrics["dev_teacher_kl"] == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < 0.9 * losses[0]


# --- schedules -----------------------------------------------------------------------------------------------------


def test_a_run_starts_where_the_adapter_it_names_ended(house: House, bank: Path, tiny: ModelFiles) -> None:
    first = house.train(bank)
    second = house.train(bank, init_from="new@1", rows=16, measure_on=str(bank))
    elsewhere = second.metrics["elsewhere"]
    assert elsewhere["before"]["loss"] == pytest.approx(first.metrics["dev_loss"], abs=2e-5)
    assert elsewhere["after"]["loss"] == pytest.approx(second.metrics["dev_loss"], abs=2e-5)
    assert second.metrics["train_rows"] == 16
    assert house.card(second)["recipe"]["init_from"] == "new@1"
    with pytest.raises(BadRequest, match="r is 4 there and 8 here"):
        house.train(bank, init_from="new@1", rank=8)
    with pytest.raises(BadRequest, match="other layers"):
        house.train(bank, init_from="new@1", target_modules=["q_proj"])
    house.tiny = replace(tiny, sha256="0" * 64)
    with pytest.raises(Refused, match="was trained on the base"):
        house.train(bank, init_from="new@1")


def test_another_task_is_measured_before_and_after(data: Path, house: House, bank: Path, tmp_path: Path) -> None:
    other = sample(data, "slots_snips", tmp_path / "snips", 4, 5)
    told = house.train(bank, measure_on=str(other)).metrics["elsewhere"]
    assert (told["task"], told["rows"]) == ("slots_snips", 5)
    assert told["before"]["loss"] != told["after"]["loss"]


def test_few_rows_are_drawn_from_every_label(tmp_path: Path) -> None:
    made = [{"input": f"word {n} of {'ab' * (n % 7)}", "reference": "xyz"[min(n % 6, 2)]} for n in range(90)]
    folder = write(tmp_path / "t", train=made, dev=[{"input": "other", "reference": "x"}])
    drawn = assemble([read_dataset(folder)], Recipe(rows=12)).train
    assert len(drawn) == 12
    assert {label: sum(row.answer == label for row in drawn) for label in "xyz"} == {"x": 2, "y": 2, "z": 8}
    assert len(assemble([read_dataset(folder)], Recipe(rows=500)).train) == len(read_dataset(folder).train)


@pytest.mark.parametrize(("temperature", "wanted"), [(1.0, [80, 10, 10]), (2.0, [59, 21, 21]), (1e6, [33, 33, 33])])
def test_a_mixtures_temperature_evens_out_the_sizes(temperature: float, wanted: list[int]) -> None:
    assert shares([80, 10, 10], temperature) == wanted


def test_a_mixture_keeps_each_tasks_instruction(data: Path, house: House, bank: Path, tmp_path: Path) -> None:
    other = sample(data, "slots_snips", tmp_path / "snips", 24, 6)
    found = [read_dataset(bank), read_dataset(other)]
    whole = mixed(found, seed=0, temperature=1e6)
    for part in found:
        of_it = [row for row in whole.train if row.meta["task"] == part.name]
        assert {row.question for row in of_it} <= {row.question for row in part.train}
        assert all(row.question.startswith(part.instruction) and row.bare == row.question for row in of_it)
    counts = [sum(row.meta["task"] == part.name for row in whole.train) for part in found]
    assert counts[0] == counts[1] > len(found[1].train)
    assert {row.meta["task"] for row in whole.dev[:2]} == {part.name for part in found}
    result = house.train([bank, other], name="both", mixture_temperature=2.0)
    assert result.metrics["dev_rows"] == sum(len(part.dev) for part in found)
    assert house.card(result)["task"] == "intent_banking77-slots_snips"
