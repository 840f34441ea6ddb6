"""What a comparison of trainers agrees on: the plan, the rows, the pace, the schedule, the first weights.

A trainer's process reads JSON lines from stdin and answers each on stdout: first a `Plan`, answered when everything is
loaded; then `{"steps": n}`, answered after as many steps with the tokens and seconds they took, the peak memory so far
and the file of the weights. In between it waits, so what disturbs the machine disturbs all trainers alike.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TextIO

from hybrid.models import ModelFiles
from hybrid.training.batches import Encoded, batches
from hybrid.training.loop import rate
from hybrid.training.recipes import Recipe

#: steps before the first that counts: allocators, caches and kernels settle
WARM_UP = 2
#: what the judge leaves for the trainers
INITIAL, ROWS = "initial.safetensors", "rows.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison, as every child gets it. `folder` is where weights are exchanged."""

    who: str
    source: str
    model: str
    model_path: str
    recipe: Mapping[str, Any]
    tokens: int
    rounds: int
    folder: str

    @property
    def files(self) -> ModelFiles:
        """The base model, unchecked: the parent has done that."""
        return ModelFiles(self.model, Path(self.model_path), "")


@dataclass(frozen=True, slots=True)
class Row(Encoded):
    """A row as token ids, and as what it was made of: the chat before the answer, and the answer."""

    chat: tuple[Mapping[str, str], ...]
    words: str


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of the whole run in a random order."""

    rows: Sequence[Row]
    recipe: Recipe

    @classmethod
    def read(cls, plan: Plan) -> Work:
        """What the judge wrote for all."""
        rows = json.loads((Path(plan.folder) / ROWS).read_bytes())
        found = [Row(tuple(row["prompt"]), tuple(row["answer"]), tuple(row["chat"]), row["words"]) for row in rows]
        return cls(found, Recipe.model_validate(plan.recipe))

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return len(self.rows) // self.recipe.batch_size

    def like_length(self) -> Iterator[Sequence[Encoded]]:
        """The batches of a run: rows of like length, as ours takes them."""
        return islice(batches(self.rows, self.recipe.batch_size, self.recipe.seed), self.steps)

    def in_order(self) -> Iterator[Sequence[Encoded]]:
        """The batches of a run in the order of the rows."""
        size = self.recipe.batch_size
        return (self.rows[n : n + size] for n in range(0, len(self.rows), size))


class Pace:
    """A child's end of the pipe: it holds the trainer at every step that ends a slice."""

    def __init__(self, orders: TextIO, answers: TextIO, plan: Plan) -> None:
        self._orders, self._answers = orders, answers
        self._path = Path(plan.folder) / f"{plan.who}.safetensors"
        self._model: Any = None
        self._left = self._tokens = 0
        self._began = 0.0

    def ready(self, model: Any, steps: int) -> None:
        """Says that everything is loaded, and waits for the first slice."""
        self._model = model
        self.answer(steps=steps)
        self._next()

    def step(self, tokens: int) -> None:
        """Counts a step that is done; at the end of a slice, answers and waits for the next."""
        self._left -= 1
        self._tokens += tokens
        if self._left:
            return
        settle()
        seconds = time.perf_counter() - self._began
        peak = peak_mb()
        weights = str(save(self._model, self._path))
        self.answer(tokens=self._tokens, seconds=seconds, peak_mb=peak, weights=weights)
        self._next()

    def order(self) -> dict[str, Any]:
        """The next line. Ends the process when there is none: the run is over, or the parent gone."""
        line = self._orders.readline()
        if not line:
            sys.exit(0)
        order: dict[str, Any] = json.loads(line)
        return order

    def answer(self, **told: Any) -> None:
        """One line back."""
        self._answers.write(json.dumps(told) + "\n")
        self._answers.flush()

    def _next(self) -> None:
        self._left, self._tokens = self.order()["steps"], 0
        self._began = time.perf_counter()


def drawn(rows: Sequence[Row], recipe: Recipe, tokens: int, rounds: int) -> list[Row]:
    """Rows for the warm-up and for rounds of equally many steps with about `tokens` tokens, epoch after epoch."""
    step = recipe.batch_size * tokens_of(rows) / len(rows)
    wanted = recipe.batch_size * (WARM_UP + rounds * math.ceil(tokens / step / rounds))
    rng, found = Random(recipe.seed), list[Row]()
    while len(found) < wanted:
        found += rng.sample(rows, len(rows))
    return found[:wanted]


def tokens_of(rows: Sequence[Encoded]) -> int:
    """Tokens of prompts and answers, whatever a trainer pads or shares."""
    return sum(row.length for row in rows)


def lora_config(recipe: Recipe) -> Any:
    """PEFT's configuration of the recipe's adapter."""
    from peft import LoraConfig

    targets = list(recipe.target_modules)
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def set_rate(optimiser: Any, recipe: Recipe, step: int, steps: int) -> None:
    """The schedule of our own loop."""
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * rate(step, steps, recipe.warmup_ratio)


def trained(model: Any) -> list[Any]:
    """The parameters with gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def begin(model: Any, plan: Plan) -> Any:
    """The model with the initial weights that all share."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(Path(plan.folder) / INITIAL))
    return model


def save(model: Any, path: Path) -> Path:
    """The adapter's weights as a file, in float32."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return path


def peak_mb() -> int:
    """The most memory this process has held, in MiB: the device's where there is one, else its resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def settle() -> None:
    """Waits until the device has done what was asked of it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
