"""`lora`: low-rank adapters on the linear layers (Hu et al. 2021, arXiv 2106.09685), by PEFT, in bfloat16.

The base stays frozen in bfloat16, the adapter's own matrices in float32. Logits are computed only where an answer
token is predicted: with a vocabulary of tens of thousands they would otherwise cost more than the model.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.models import ModelFiles
from hybrid.training.batches import Batch, Row, batches, collate
from hybrid.training.fused import register_fused_lora
from hybrid.training.recipes import Recipe

#: what a progress callback is told, after every step
Progress = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run: the PEFT model with its best weights, and what was measured."""

    model: Any
    dev_loss: float
    train_loss: float
    steps: int
    tokens: int
    seconds: float
    curve: tuple[dict[str, float], ...]


def train_lora(
    model: ModelFiles, recipe: Recipe, rows: Sequence[Row], dev: Sequence[Row], pad: int, progress: Progress
) -> Trained:
    """Trains to the end of the recipe or until the dev loss stops falling; the best measurement's weights are kept."""
    import torch

    torch.manual_seed(recipe.seed)
    peft_model = _wrap(model.path, recipe)
    run = _Run(peft_model, recipe, pad, progress, total=_total_steps(recipe, len(rows)))
    began = time.monotonic()
    rng = random.Random(recipe.seed)
    every = recipe.eval_every or max(1, math.ceil(run.steps_per_epoch(len(rows)) / 2))
    best = _Best(recipe.patience)
    for batch in _forever(rows, recipe.batch_size, rng):
        run.learn(batch)
        if run.at_step and (run.step % every == 0 or run.done):
            best.offer(run.measure(dev), peft_model)
        if run.done or (recipe.early_stop and best.stalled):
            break
    best.restore(peft_model)
    seconds = time.monotonic() - began
    return Trained(peft_model, best.loss, run.loss, run.step, run.tokens, seconds, tuple(run.curve))


def _forever(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """Epoch after epoch of batches; the run says when it is done."""
    while True:
        yield from batches(rows, size, rng)


def _total_steps(recipe: Recipe, rows: int) -> int:
    steps = math.ceil(math.ceil(rows / recipe.batch_size) / recipe.accumulate * recipe.epochs)
    return max(1, min(steps, recipe.max_steps or steps))


def _wrap(path: Path, recipe: Recipe) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    targets: Any = list(recipe.target_modules)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    if not recipe.dropout:
        register_fused_lora(config)
    wrapped = get_peft_model(base, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    wrapped.train()
    return wrapped


def answer_loss(model: Any, batch: Batch) -> Any:
    """The summed cross-entropy of the answer tokens, nats: hidden states everywhere, logits only where needed."""
    import torch

    base = model.get_base_model()
    hidden = base.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    logits = base.lm_head(hidden[batch.at[:, 0], batch.at[:, 1]])
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="sum")


class _Best:
    """The adapter weights of the lowest dev loss so far, and how long ago that was."""

    def __init__(self, patience: int) -> None:
        self.loss = math.inf
        self._patience = patience
        self._since = 0
        self._weights: dict[str, Any] = {}

    @property
    def stalled(self) -> bool:
        return self._since >= self._patience

    def offer(self, loss: float, model: Any) -> None:
        if loss < self.loss:
            self.loss, self._since = loss, 0
            self._weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            self._since += 1

    def restore(self, model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name in self._weights:
                parameter.data.copy_(self._weights[name])


class _Run:
    """The optimiser's state and the clock."""

    def __init__(self, model: Any, recipe: Recipe, pad: int, progress: Progress, total: int) -> None:
        import torch

        self._model = model
        self._recipe = recipe
        self._pad = pad
        self._progress = progress
        self._total = total
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trainable, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=True
        )
        self._began = time.monotonic()
        self._pending = 0
        self._sums = (0.0, 0)
        self.step = 0
        self.tokens = 0
        self.loss = math.nan
        self.dev_loss = math.nan
        self.curve: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        return self.step >= self._total

    @property
    def at_step(self) -> bool:
        """Whether the last batch completed an optimiser step."""
        return self._pending == 0

    def steps_per_epoch(self, rows: int) -> float:
        return math.ceil(rows / self._recipe.batch_size) / self._recipe.accumulate

    def learn(self, rows: Sequence[Row]) -> None:
        """One batch; every `accumulate` batches an optimiser step."""
        import torch

        batch = collate(rows, self._pad)
        loss = answer_loss(self._model, batch)
        (loss / (len(batch.labels) * self._recipe.accumulate)).backward()
        self.tokens += batch.tokens
        self._sums = (self._sums[0] + float(loss.detach()), self._sums[1] + len(batch.labels))
        self._pending += 1
        if self._pending < self._recipe.accumulate:
            return
        self._pending = 0
        torch.nn.utils.clip_grad_norm_(self._trainable, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._recipe.learning_rate * self._schedule()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.loss = self._sums[0] / self._sums[1]
        self._sums = (0.0, 0)
        self._tell()

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        warm = max(1, round(self._total * self._recipe.warmup_ratio))
        if self.step < warm:
            return (self.step + 1) / warm
        done = (self.step - warm) / max(1, self._total - warm)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    def measure(self, dev: Sequence[Row]) -> float:
        """The mean loss of an answer token on the dev rows, nats."""
        import torch

        self._model.eval()
        total, count = 0.0, 0
        ordered = sorted(dev, key=len)
        with torch.inference_mode():
            for i in range(0, len(ordered), 2 * self._recipe.batch_size):
                batch = collate(ordered[i : i + 2 * self._recipe.batch_size], self._pad)
                total += float(answer_loss(self._model, batch))
                count += len(batch.labels)
        self._model.train()
        self.dev_loss = total / count
        self.curve.append({"step": self.step, "train_loss": self.loss, "dev_loss": self.dev_loss})
        self._tell()
        return self.dev_loss

    def _tell(self) -> None:
        spent = time.monotonic() - self._began
        self._progress(
            step=self.step,
            steps=self._total,
            loss=round(self.loss, 4),
            tokens_per_s=round(self.tokens / spent, 1),
            eta_s=round(spent / max(1, self.step) * (self._total - self.step), 1),
            **({} if math.isnan(self.dev_loss) else {"dev_loss": round(self.dev_loss, 4)}),
        )
