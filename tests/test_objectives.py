"""Objectives and schedules: each trains on real rows into a published version, and its loss is the one it is named for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, DataError, EngineError, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training.base import forward_of, load_base
from hybrid.training.batches import Encoded, packs
from hybrid.training.data import read_dataset
from hybrid.training.distill import Taught
from hybrid.training.mixture import mixed, shares
from hybrid.training.preference import Choice, Preferring, answer_logprobs, choice_packs, referenced
from hybrid.training.reward import Scorer, best_of, scored, scores, with_head
from hybrid.training.run import TrainResult, train
from hybrid.types import Message

FAST = {"rank": 4, "alpha": 8, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", "max_steps": 8}


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
        retrieval = {"top_k": 2, "passage_budget_tokens": 700}
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


def preferences(data: Path, folder: Path, train: int = 32, dev: int = 12) -> Path:
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


def test_dpo_is_trls_and_its_gradient_that_of_padded_rows(tiny: ModelFiles, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

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
    assert total == pytest.approx(float(loss), rel=1e-5)
    ours, theirs = dict(base.named_parameters()), dict(plain.named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)
    print(DPOConfig, DPOTrainer, referenced, replace, packs, scored, scores, with_head, Taught, mixed, shares)


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


def test_pretraining_on_text(data: Path, house: House, tmp_path: Path) -> None:
    texts = [{"id": row["id"], "text": row["text"]} for row in rows(data / "rag_nq", "corpus", 60)]
    result = house.train(write(tmp_path / "nq", train=texts), method="pretrain", max_length=128)
    print(result.metrics)


def test_raft(data: Path, house: House, tmp_path: Path) -> None:
    folder = sample(data, "rag_nq", tmp_path / "nq", 16, 6)
    found = [*rows(folder, "train", 99), *rows(folder, "dev", 99)]
    gold = {name for row in found for name in row["meta"]["gold_passages"]}
    corpus = [row for row in rows(data / "rag_nq", "corpus", 10**6) if row["id"] in gold][:22]
    write(folder, corpus=corpus + rows(data / "rag_nq", "corpus", 40))
    result = house.train(folder, method="raft", max_length=2048)
    print(result.metrics, house.card(result)["corpus"])


def test_sequential(house: House, bank: Path) -> None:
    first = house.train(bank)
    second = house.train(bank, init_from="new@1", measure_on=str(bank), rows=16)
    print(first.metrics, second.metrics)


def test_mixture(data: Path, house: House, bank: Path, tmp_path: Path) -> None:
    other = sample(data, "slots_snips", tmp_path / "snips", 24, 6)
    print(house.train([bank, other], mixture_temperature=2.0).metrics)


def test_distill_logits(house: House, bank: Path, tiny: ModelFiles) -> None:
    print(house.train(bank, method="distill_logits", teacher=str(tiny.path)).metrics)
