"""The base model, opened for training: its weights frozen, its rows encoded, its forward over packs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest, DataError, SetupError
from hybrid.models import ModelFiles
from hybrid.training.batches import Encoded, Pack, encode, end_of_turn
from hybrid.training.data import BAD_LIMIT, DEV_LIMIT, Dataset
from hybrid.training.kernels import ATTENTION, shared_prefix_attention
from hybrid.training.objective import Forward
from hybrid.training.recipes import Recipe

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("hybrid.training")


def load_base(files: ModelFiles, precision: str, *, device: str = "", **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) in the precision of the recipe, on the GPU if there is one; `options` go to transformers.

    Raises SetupError when transformers cannot open it.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is the only one
    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            files.path,
            dtype=getattr(torch, precision),
            attn_implementation=ATTENTION,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model {files.name} cannot be opened for training: {error}.") from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).requires_grad_(False), tokenizer


def stops(model: Any) -> list[int]:
    """The tokens at which the engine ends an answer."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    found = found if found is not None else model.config.eos_token_id
    return found if isinstance(found, list) else [found]


def encoded(tokenizer: Any, data: Dataset, recipe: Recipe, eos: Sequence[int]) -> tuple[list[Encoded], list[Encoded]]:
    """Training and dev rows as token ids. Raises DataError when more than 5 % of the rows are too long."""
    if not data.train:
        raise DataError(
            f"{data.name} holds plain texts; --method pretrain learns from them, or give rows with answers."
        )
    end = end_of_turn(tokenizer, eos)
    found = []
    for examples in (data.train, data.dev[:DEV_LIMIT]):
        rows, long = encode(tokenizer, examples, end=end, max_length=recipe.max_length)
        check_long([example.id for example in long], len(examples), recipe.max_length)
        found.append(rows)
    return found[0], found[1]


def check_long(long: Sequence[str], rows: int, max_length: int) -> None:
    """Says which of the rows are too long and left out. Raises BadRequest when they are more than 5 %."""
    if not long:
        return
    told = f"{len(long)} of {rows} rows are longer than {max_length} tokens ({', '.join(long[:5])}, …)"
    if len(long) > BAD_LIMIT * rows:
        raise BadRequest(f"{told}; raise max_length, or shorten them.", param="max_length")
    log.warning("%s and are left out.", told)


def forward_of(model: Any) -> Forward:
    """The model as a function from a pack to the logits [A, vocabulary] of its answer places."""

    def forward(pack: Pack) -> Tensor:
        tensors = {
            "input_ids": pack.ids,
            "position_ids": pack.positions,
            "attention_mask": pack.mask.to(model.dtype),
            "prefix_mask": pack.prefix_mask.to(model.dtype),
            "logits_to_keep": pack.keep,
        }
        there = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        out = model(**there, rows=pack.rows, use_cache=False)
        logits: Tensor = out.logits[0]
        return logits

    return forward
