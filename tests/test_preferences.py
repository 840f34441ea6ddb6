"""Preferences: pairs of a better and a worse answer, learned by DPO and by a reward model whose losses are TRL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset as HubDataset
from objectives_kit import House, choices, plain_logprobs, preferences
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from hybrid.errors import DataError
from hybrid.models import ModelFiles
from hybrid.training.base import forward_of, load_base
from hybrid.training.data import read_dataset
from hybrid.training.lora import adapted
from hybrid.training.preference import Preferring, answer_logprobs, choice_packs, referenced
from hybrid.training.recipes import Recipe
from hybrid.training.reward import Scorer, best_of, scored, scores, with_head

pytestmark = pytest.mark.usefixtures("one_thread")


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
