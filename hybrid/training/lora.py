"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a causal language model.

PEFT makes the layers, names them and saves them; the forward and backward of a step are `kernels.py`'s.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest, HybridError, SetupError
from hybrid.models import ModelFiles
from hybrid.training.batches import Encoded, Pack, encode, end_of_turn, render
from hybrid.training.data import BAD_LIMIT, DEV_LIMIT, Dataset
from hybrid.training.job import Fitted, Job
from hybrid.training.kernels import ATTENTION, fast_linear, shared_prefix_attention
from hybrid.training.loop import Forward, measure, optimise
from hybrid.training.recipes import Recipe

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("hybrid.training")
#: mean difference in nats a token that rounding may make between the trained adapter and what PEFT reads back, and
#: the same as a share of what the adapter does to the text: 0.05 at an effect of 1 to 2, 0.11 after longer training
READ_BACK, READ_BACK_OF_EFFECT = 0.1, 0.1


def fit(job: Job) -> Fitted:
    """Trains an adapter. Raises DataError for rows that do not fit, BadRequest for a recipe that cannot work."""
    import torch

    torch.manual_seed(job.recipe.seed)
    base, tokenizer = load_base(job.model, job.recipe.precision)
    train, dev = encoded(tokenizer, job.data, job.recipe, stops(base))
    model = _adapted(base, job.recipe, job.model.name)
    forward = forward_of(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    report = optimise(forward, weights, train, dev, job.recipe, job.progress)
    model.eval()
    final = measure(forward, dev)
    sample = min(job.data.dev, key=lambda example: len(example.question))
    text = render(tokenizer, sample.messages) + sample.answer
    metrics = {
        "dev_loss": round(final.loss, 5),
        "dev_token_accuracy": round(final.token_accuracy, 4),
        "dev_exact": round(final.exact, 4),
        "dev_rows": len(dev),
        "train_loss": round(report.train_loss, 5),
        "train_rows": len(train),
        "trained_parameters": sum(weight.numel() for weight in weights),
        "tokens": report.tokens,
        "seconds": round(report.seconds, 1),
        "tokens_per_s": round(report.tokens / report.seconds, 1),
        "steps": report.steps,
        "best_step": report.best_step,
        "stopped_early": report.stopped_early,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    return Fitted(metrics, report.curve, lambda folder: _save(model, tokenizer, text, folder))


def load_base(files: ModelFiles, precision: str) -> tuple[Any, Any]:
    """(model, tokenizer) in the precision of the recipe. Raises SetupError when transformers cannot open it."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # ours is the only one
    AttentionInterface.register(ATTENTION, shared_prefix_attention)
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            files.path, dtype=getattr(torch, precision), attn_implementation=ATTENTION, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise SetupError(f"The base model {files.name} cannot be opened for training: {error}.") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False), tokenizer


def stops(model: Any) -> list[int]:
    """The tokens at which the engine ends an answer."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    found = found if found is not None else model.config.eos_token_id
    return found if isinstance(found, list) else [found]


def encoded(tokenizer: Any, data: Dataset, recipe: Recipe, eos: Sequence[int]) -> tuple[list[Encoded], list[Encoded]]:
    """Training and dev rows as token ids. Raises DataError when more than 5 % of the rows are too long."""
    end = end_of_turn(tokenizer, eos)
    found = []
    for examples in (data.train, data.dev[:DEV_LIMIT]):
        rows, long = encode(tokenizer, examples, end=end, max_length=recipe.max_length)
        if long:
            named = ", ".join(example.id for example in long[:5])
            told = f"{len(long)} of {len(examples)} rows are longer than {recipe.max_length} tokens ({named}, …)"
            if len(long) > BAD_LIMIT * len(examples):
                raise BadRequest(f"{told}; raise max_length, or shorten them.", param="max_length")
            log.warning("%s and are left out.", told)
        found.append(rows)
    return found[0], found[1]


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


def _adapted(base: Any, recipe: Recipe, name: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = list(recipe.target_modules)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({torch.nn.Linear: fast_linear()})
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise BadRequest(f"target_modules: {error}", param="target_modules") from error
    config.base_model_name_or_path = name  # PEFT puts the folder of this machine there
    return model.train()


def _save(model: Any, tokenizer: Any, text: str, folder: Path) -> dict[str, Any]:
    """Saves, reads back with PEFT alone, and records its log-probabilities for the engine's canary."""
    from peft import PeftModel

    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    trained = _logprobs(model, tokenizer, text)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    dtype = base.dtype
    plain = PeftModel.from_pretrained(model.unload(), str(folder)).to(dtype).eval()
    read = _logprobs(plain, tokenizer, text)
    with plain.disable_adapter():
        effect = float((read - _logprobs(plain, tokenizer, text)).abs().mean())
    apart = float((trained - read).abs().mean())
    if not apart <= max(READ_BACK, READ_BACK_OF_EFFECT * effect):
        raise HybridError(
            f"The saved adapter answers differently from the trained one ({apart:.3f} nats a token); nothing was "
            "published. Train with --set precision=float32, and report this base model."
        )
    return {"canary": {"prompt": text, "logprobs": [round(value, 5) for value in read.tolist()]}}


def _logprobs(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The log-probability of each token of `text` but the first, float32 [n - 1]."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    found: Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found.cpu()
