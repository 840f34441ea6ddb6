"""The trainers that `bench train` compares, each alone in a process: `python -m hybrid.bench.trainers`.

The same for all: the base model's weights, the rows, the batch size, the first LoRA weights, rank, scale and targets,
AdamW, the schedule, the clipping of gradients, and the judge who measures. What differs is what a trainer is:

* `hybrid` computes what the rows of a batch begin with once, and has kernels of its own for a LoRA layer, attention and
  the loss. It takes rows of like length together.
* `plain` takes the very same batches, padded.
* `trl` takes rows in random order, as its sampler does, and learns the line break after an answer too, as its template
  has it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.bench.contest import (
    INITIAL,
    ROWS,
    Pace,
    Plan,
    Row,
    Work,
    begin,
    drawn,
    lora_config,
    save,
    set_rate,
    tokens_of,
    trained,
)
from hybrid.rooms import write_json
from hybrid.training.base import forward_of, load_base, stops
from hybrid.training.batches import Encoded, encode, end_of_turn
from hybrid.training.data import read_dataset
from hybrid.training.formats import Example
from hybrid.training.loop import CLIP, Group, Watch, glance, optimise
from hybrid.training.lora import adapted
from hybrid.training.objective import NextToken, measure
from hybrid.training.recipes import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def hybrid(plan: Plan, pace: Pace) -> None:
    """The loop of the method `lora`, without what surrounds it in a run: dev measurements, early stop, checkpoints."""
    work = Work.read(plan)
    base, _ = load_base(plan.files, work.recipe.precision)
    model = adapted(base, work.recipe, plan.model)
    lengths = map(tokens_of, work.like_length())
    quiet = work.recipe.model_copy(update={"epochs": 1.0, "max_steps": 0, "early_stop": False, "eval_every": 1 << 30})

    def progress(**told: Any) -> None:
        if "step" in told:
            pace.step(next(lengths))

    pace.ready(begin(model, plan), work.steps)
    objective = NextToken(forward_of(model))
    optimise(objective, [Group(trained(model))], work.rows, work.rows[:1], quiet, Watch(progress))


def plain(plan: Plan, pace: Pace) -> None:
    """PEFT and PyTorch as a careful person writes them: sorted batches, padded; logits only where there is loss."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    work = Work.read(plan)
    recipe = work.recipe
    base = AutoModelForCausalLM.from_pretrained(plan.model_path, dtype=getattr(torch, recipe.precision))
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = get_peft_model(base, lora_config(recipe)).train()
    weights = trained(model)
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    pace.ready(begin(model, plan), work.steps)
    for step, batch in enumerate(work.like_length(), 1):
        _answer_loss(base, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        set_rate(optimiser, recipe, step, work.steps)
        optimiser.step()
        optimiser.zero_grad()
        pace.step(tokens_of(batch))


def _answer_loss(base: Any, batch: Sequence[Encoded]) -> Tensor:
    """The mean cross-entropy of the answer tokens of a padded batch, in nats."""
    import torch

    width = max(row.length for row in batch)
    ids = torch.tensor([[*row.prompt, *row.answer, *[0] * (width - row.length)] for row in batch])
    there = torch.tensor([[1] * row.length + [0] * (width - row.length) for row in batch])
    targets = torch.tensor([token for row in batch for token in row.answer], device=base.device)
    owners = [n for n, row in enumerate(batch) for _ in row.answer]
    places = [len(row.prompt) - 1 + n for row in batch for n in range(len(row.answer))]
    out = base.base_model(input_ids=ids.to(base.device), attention_mask=there.to(base.device), use_cache=False)
    logits = base.get_output_embeddings()(out.last_hidden_state[owners, places])
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def trl(plan: Plan, pace: Pace) -> None:
    """TRL's SFTTrainer on prompt and completion, with its defaults but for the batch, the rate and the LoRA.

    So it loads the model itself, in float32 under bfloat16 autocast, with gradient checkpointing. The rows come in a
    random order, as from its own sampler; the order is ours, so that the tokens of a step are known.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    work = Work.read(plan)
    recipe = work.recipe
    lengths = map(tokens_of, work.in_order())

    class Paced(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            set_rate(given["optimizer"], recipe, state.global_step + 1, work.steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            pace.step(next(lengths))

    config = SFTConfig(
        output_dir=plan.folder,
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=1,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",  # the callback sets it
        weight_decay=recipe.weight_decay,
        max_length=recipe.max_length,
        train_sampling_strategy="sequential",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    chats = [
        {"prompt": list(row.chat), "completion": [{"role": "assistant", "content": row.words}]} for row in work.rows
    ]
    trainer = SFTTrainer(
        plan.model_path,
        args=config,
        train_dataset=Dataset.from_list(chats),
        peft_config=lora_config(recipe),
        callbacks=[Paced()],
    )
    pace.ready(begin(trainer.model, plan), work.steps)
    trainer.train()


def judge(plan: Plan, pace: Pace) -> None:
    """Trains nothing: draws the rows and the initial weights for all, and measures everybody's on the same dev rows."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    recipe = Recipe.model_validate(plan.recipe)
    torch.manual_seed(recipe.seed)
    base, tokenizer = load_base(plan.files, recipe.precision)
    data = read_dataset(Path(plan.source))
    train, dev = (_rows(tokenizer, base, examples, recipe) for examples in (data.train, data.dev))
    rows = drawn(train, recipe, plan.tokens, plan.rounds)
    write_json(Path(plan.folder) / ROWS, [asdict(row) for row in rows])
    model = adapted(base, recipe, plan.model).eval()
    forward = forward_of(model)
    initial = save(model, Path(plan.folder) / INITIAL)
    pace.answer(weights=str(initial), steps=len(rows) // recipe.batch_size, dev_rows=len(glance(dev)))
    while True:
        set_peft_model_state_dict(model, load_file(pace.order()["weights"]))
        pace.answer(dev_loss=measure(forward, glance(dev)).loss)


def _rows(tokenizer: Any, base: Any, examples: Sequence[Example], recipe: Recipe) -> list[Row]:
    """The examples that fit the recipe's length. Raises DataError when none does."""
    end = end_of_turn(tokenizer, stops(base))
    rows, long = encode(tokenizer, examples, end=end, max_length=recipe.max_length)
    left_out = set(map(id, long))
    fitting = (example for example in examples if id(example) not in left_out)
    return [
        Row(
            row.prompt, row.answer, tuple({"role": m.role, "content": m.text} for m in example.messages), example.answer
        )
        for row, example in zip(rows, fitting, strict=True)
    ]


TRAINERS: Mapping[str, Callable[[Plan, Pace], None]] = {"hybrid": hybrid, "trl": trl, "plain": plain, "judge": judge}


def main() -> None:
    """Serves one child. Libraries that print to stdout print to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    plan = Plan(**json.loads(sys.stdin.readline()))
    TRAINERS[plan.who](plan, Pace(sys.stdin, answers, plan))


if __name__ == "__main__":
    main()
