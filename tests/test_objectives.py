"""Objectives and schedules: each trains on real rows into a published version; its loss is the one of its name."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as HubDataset
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from server_kit import chat, running
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, DataError, EngineError, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.models import ModelFiles, materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training.base import forward_of, load_base
from hybrid.training.batches import Encoded
from hybrid.training.data import Dataset, digest, read_dataset
from hybrid.training.distill import Taught
from hybrid.training.formats import Text
from hybrid.training.job import Job
from hybrid.training.loop import Watch
from hybrid.training.lora import adapted
from hybrid.training.mixture import assemble, mixed, shares
from hybrid.training.preference import Choice, Preferring, answer_logprobs, choice_packs, referenced
from hybrid.training.pretrain import pieces
from hybrid.training.raft import Retriever
from hybrid.training.recipes import Recipe
from hybrid.training.reward import Scorer, best_of, scored, scores, with_head
from hybrid.training.run import TrainResult, train

FAST = {"rank": 4, "alpha": 8, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", "max_steps": 8}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    model = materialise(DEFAULT_EMBEDDER, Settings.load().cache)
    return Embedder(model.path, model.name)


class House:
    """A home with the tiny base, and one verb."""

    def __init__(self, home: Path, tiny: ModelFiles, embedder: Embedder) -> None:
        retrieval = {"top_k": 2, "passage_budget_tokens": 500}
        self.settings = Settings.load(home=home, retrieval=retrieval)
        self.store = AdapterStore(self.settings.rooms, State(self.settings.rooms.database), tiny.sha256)
        self.tiny, self.embedder, self.told = tiny, embedder, []

    def train(self, source: Path | Sequence[Path], name: str = "new", **overrides: Any) -> TrainResult:
        result = train(
            source, settings=self.settings, name=name, overrides={**FAST, **overrides},
            progress=lambda **told: self.told.append(told), store=self.store, embedder=self.embedder, model=self.tiny,
        )  # fmt: skip
        assert result is not None
        return result

    def job(self, data: Dataset, recipe: Recipe, name: str) -> Job:
        return Job(data, recipe, self.tiny, Watch(lambda **_: None), self.embedder, self.settings, name)

    def card(self, result: TrainResult) -> dict[str, Any]:
        return json.loads((result.path / "card.json").read_text())


@pytest.fixture
def house(tmp_path: Path, tiny: ModelFiles, embedder: Embedder) -> House:
    return House(tmp_path / "home", tiny, embedder)


def rows(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    with (folder / f"{split}.jsonl").open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def write(folder: Path, **splits: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def sample(data: Path, task: str, folder: Path, train: int = 48, dev: int = 12) -> Path:
    """A task folder with the first rows of a real one."""
    write(folder, train=rows(data / task, "train", train), dev=rows(data / task, "dev", dev))
    about = json.loads((data / task / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def bank(data: Path, tmp_path: Path) -> Path:
    return sample(data, "intent_banking77", tmp_path / "bank")


def preferences(data: Path, folder: Path, train: int = 24, dev: int = 8) -> Path:
    """Real questions with the right label, and as the worse answer a longer text that is no label."""

    def pairs(split: str, count: int) -> list[dict[str, Any]]:
        found = rows(data / "intent_banking77", split, count)
        return [
            {"id": r["id"], "prompt": r["input"][:60], "chosen": r["reference"], "rejected": f"I do not know, {n}."}
            for n, r in enumerate(found)
        ]

    return write(folder, train=pairs("train", train), dev=pairs("dev", dev))


def choices(tiny: ModelFiles, count: int = 7) -> list[Choice]:
    """Pairs of random tokens, some with a common beginning, of different lengths."""
    dice = torch.Generator().manual_seed(3)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (n,), generator=dice).tolist())

    start = tokens(9)
    made = []
    for n in range(count):
        prompt = (start if n % 2 else ()) + tokens(4 + n)
        made.append(
            Choice(Encoded(prompt, (*tokens(3 + n), 2)), Encoded(prompt, (*tokens(8 - n), 2)), reference=0.3 * n - 1)
        )
    return made


def padded(found: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) [n, longest], padded on the right."""
    width = max(map(len, found))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in found])
    return ids, torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in found])


def plain_logprobs(model: Any, found: Sequence[Encoded]) -> torch.Tensor:
    """Of whole answers, by padded rows and transformers' own attention."""
    ids, mask = padded([[*row.prompt, *row.answer] for row in found])
    logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    each = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return torch.stack([
        each[n, len(row.prompt) - 1 : len(row.prompt) + len(row.answer) - 1].sum() for n, row in enumerate(found)
    ])  # fmt: skip


# --- preferences ---------------------------------------------------------------------------------------------------


def test_a_pair_is_never_parted_and_shares_its_prompt(tiny: ModelFiles) -> None:
    found = choices(tiny)
    cut = list(choice_packs(found, limit=60))
    assert sorted(id(row) for group, _ in cut for row in group) == sorted(map(id, found))
    assert len(cut) > 1
    for group, pack in cut:
        assert pack.rows == 2 * len(group)
    alone = [(group[0], pack) for group, pack in cut if len(group) == 1]
    for row, pack in alone:
        assert pack.prefix_mask.shape[-1] == len(row.chosen.prompt) - 1


def test_the_gradient_of_dpo_is_that_of_padded_rows(tiny: ModelFiles) -> None:
    found = choices(tiny)
    base, _ = load_base(tiny, "float32")
    base.requires_grad_(True)
    objective = Preferring(answer_logprobs(forward_of(base)), beta=0.3)
    total = objective.backward(found, 1 / len(found))
    assert total == pytest.approx(objective.total(found) / len(found), rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    better = plain_logprobs(plain, [row.chosen for row in found])
    worse = plain_logprobs(plain, [row.rejected for row in found])
    reference = torch.tensor([row.reference for row in found])
    loss = -torch.nn.functional.logsigmoid(0.3 * (better - worse - reference)).mean()
    loss.backward()
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    ours = dict(base.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


def texts_for_trl() -> HubDataset:
    """What TRL wants to see before it is given batches."""
    return HubDataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)


def test_the_loss_of_dpo_is_trls(tiny: ModelFiles, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    base, tokenizer = load_base(tiny, "float32")
    ours = adapted(base, Recipe(rank=4, alpha=8), "tiny")
    rate = answer_logprobs(forward_of(ours))
    found = referenced(rate, choices(tiny))
    torch.manual_seed(5)
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32),
        args=DPOConfig(output_dir=str(tmp_path), beta=0.2, use_cpu=True, report_to=[], bf16=False),
        train_dataset=texts_for_trl(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(ours))
    batch = DataCollatorForPreference(pad_token_id=0)(
        [
            {
                "prompt_ids": list(row.chosen.prompt),
                "chosen_ids": list(row.chosen.answer),
                "rejected_ids": list(row.rejected.answer),
            }
            for row in found
        ]
    )
    theirs = float(trainer.compute_loss(trainer.model, batch).detach())
    assert Preferring(rate, 0.2).total(found) / len(found) == pytest.approx(theirs, rel=1e-4)
    assert theirs != pytest.approx(0.6931, abs=0.01)


def test_the_loss_of_a_reward_model_is_trls(tiny: ModelFiles, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    base, tokenizer = load_base(tiny, "float32")
    tokenizer.pad_token = "<|endoftext|>"
    ours = adapted(base, Recipe(rank=4, alpha=8), "tiny")
    head = with_head(ours)
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight)
    found = [scored(row) for row in choices(tiny)]
    found = [replace(row, reference=0.0) for row in found]
    theirs = LlamaForSequenceClassification.from_pretrained(
        tiny.path, num_labels=1, dtype=torch.float32, pad_token_id=0
    )
    theirs.score.weight.data.copy_(head.weight.data)
    trainer = RewardTrainer(
        model=theirs,
        args=RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], bf16=False),
        train_dataset=texts_for_trl(),
        processing_class=tokenizer,
    )
    whole = [{"chosen_ids": list(row.chosen.prompt), "rejected_ids": list(row.rejected.prompt)} for row in found]
    loss = float(trainer.compute_loss(theirs, DataCollatorForPreference(pad_token_id=0)(whole)).detach())
    assert Preferring(scores(forward_of(ours))).total(found) / len(found) == pytest.approx(loss, rel=1e-4)


def test_dpo_learns_what_is_preferred(data: Path, house: House, tmp_path: Path) -> None:
    result = house.train(preferences(data, tmp_path / "likes"), method="dpo", epochs=4, max_steps=0)
    assert result.metrics["dev_preference_accuracy"] == 1
    assert result.metrics["dev_loss"] < 0.69
    assert result.metrics["dev_margin"] > 0
    assert house.card(result)["kind"] == "lora"


def test_a_reward_model_tells_the_better_answer(data: Path, house: House, tmp_path: Path, tiny: ModelFiles) -> None:
    folder = preferences(data, tmp_path / "likes")
    result = house.train(folder, method="reward", epochs=4, max_steps=0)
    assert result.metrics["dev_preference_accuracy"] > 0.9
    scorer = Scorer.open(result.path, tiny, "float32")
    found = read_dataset(folder).dev_pairs
    picked = [best_of(scorer, pair.messages, [pair.rejected, pair.chosen, pair.rejected]) for pair in found]
    assert sum(answer == pair.chosen for answer, pair in zip(picked, found, strict=True)) > 0.9 * len(found)


def test_preferences_are_asked_for_by_name(house: House, bank: Path) -> None:
    with pytest.raises(DataError, match="`chosen` and `rejected`"):
        house.train(bank, method="dpo")


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


def test_raft_trains_on_what_the_strategy_will_send(house: House, nq: Path) -> None:
    result = house.train(nq, name="nq", method="raft", max_length=2048, max_steps=2)
    assert house.card(result)["corpus"] == "nq"
    assert result.metrics["retrieval"]["dev_found"] > 0.5
    data = read_dataset(nq)
    job = house.job(data, Recipe(method="raft"), "nq")
    tokenizer = AutoTokenizer.from_pretrained(house.tiny.path)
    with closing(Library(house.settings.rooms, house.embedder, house.settings.retrieval)) as library:
        retriever = Retriever(job, library, "nq", lambda text: len(tokenizer(text)["input_ids"]))
        trained, _ = retriever.over(data)
    assert result.metrics["dev_sha256"] == digest(trained.dev)

    async def sent() -> list[str]:
        engine, server = {"kind": "scripted"}, {"port": 0, "ui": False, "quickstart": False}
        retrieval = house.settings.retrieval.model_dump()
        home, model = house.settings.home, str(house.tiny.path)
        settings = Settings.load(home=home, model=model, engine=engine, server=server, retrieval=retrieval)
        async with running(settings) as server_:
            for row in data.dev:
                status, body, _ = await server_.post(
                    "/v1/chat/completions", chat(row.question, model="rag:nq", max_tokens=1)
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
            _, told = Retriever(job, library, "nq", lambda text: len(text) // 20).over(data)
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
