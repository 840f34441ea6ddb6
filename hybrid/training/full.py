"""Full fine-tuning, and of the last blocks alone (Howard & Ruder 2018, arXiv 1801.06146).

What learns is held in float32 and computed with in the recipe's precision: a bfloat16 weight does not move by a small
step. What comes out is a whole model folder, in that precision, which an engine of its own serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest
from hybrid.training.base import forward_of, load_base
from hybrid.training.batches import Pack
from hybrid.training.job import Fitted, Job
from hybrid.training.lora import opened
from hybrid.training.objective import Forward
from hybrid.training.rates import block_of, depth_of, groups, token_tables
from hybrid.training.shard import in_team, spread
from hybrid.training.supervised import Learner, fit_answers

if TYPE_CHECKING:
    from torch import Tensor

#: the model stands in a folder of its own: engines read every weight file beside the one they are after
FOLDER, WEIGHTS = "model", "model.safetensors"
SERVE = f"serve it by an engine of its own: HYBRID_MODEL=FOLDER/{FOLDER} hybrid serve, FOLDER being this version's"


def fit(job: Job) -> Fitted:
    """Trains every weight. Raises DataError for rows that do not fit, BadRequest where the loss diverges."""
    return _fit(job, lambda model: {name for name, _ in model.named_parameters()})


def fit_last(job: Job) -> Fitted:
    """Trains the last `layers` blocks and the norm after them; below them there is neither gradient nor graph."""
    return _fit(job, lambda model: _last(model, job.recipe.layers))


def _last(model: Any, layers: int) -> set[str]:
    depth, (_, tables) = depth_of(model), token_tables(model)
    if layers > depth:
        raise BadRequest(f"layers is {layers}, and the base model has {depth}; use at most that.", param="layers")
    found = set()
    for name, parameter in model.named_parameters():
        block = block_of(name)
        if id(parameter) not in tables and (block is None or block >= depth - layers):
            found.add(name)
    return found


def _fit(job: Job, choose: Callable[[Any], set[str]]) -> Fitted:
    import torch

    model, tokenizer, train, dev = opened(job)
    chosen, dtype = choose(model), model.dtype
    for name, parameter in model.named_parameters():
        if name in chosen:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.train()
    if job.recipe.shard:
        spread(model, job.watch.team, dtype)
    _, tables = token_tables(model)

    def rate(_name: str, parameter: Tensor) -> float:
        return job.recipe.embedding_rate if id(parameter) in tables else 1.0

    learner = Learner(
        model, groups(model, job.recipe.layer_decay, rate), partial(_save, model, tokenizer), "weights", SERVE
    )

    def finish() -> Learner:
        for parameter in model.parameters():  # not the buffers: they keep what precision they were made in
            parameter.data = parameter.data.to(dtype)
        return replace(learner, finish=None)

    if job.recipe.shard:  # its own mixed precision, and nothing left to finish: it is measured as it will be saved
        learner = in_team(learner, job.watch.team, train, partial(_anew, job), lambda m, f: _save(m, tokenizer, f))
        return fit_answers(job, learner, train, dev)
    forward = forward_of(model) if dtype == torch.float32 else _mixed(model, dtype)
    return fit_answers(job, replace(learner, finish=finish), train, dev, forward=forward)


def _anew(job: Job) -> Any:
    return load_base(job.model, job.recipe.precision, device="cpu")[0]


def _mixed(model: Any, dtype: Any) -> Forward:
    """The forward in which float32 weights multiply in `dtype`."""
    import torch

    plain = forward_of(model)

    def forward(pack: Pack) -> Tensor:
        with torch.autocast(model.device.type, dtype=dtype):
            return plain(pack)

    return forward


def _save(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """A Hugging Face model folder with its tokenizer, in one weight file."""
    model.save_pretrained(folder / FOLDER, max_shard_size="1TB")
    tokenizer.save_pretrained(folder / FOLDER)
    return {"weights": f"{FOLDER}/{WEIGHTS}"}
