"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the linear layers of a causal language model.

PEFT makes the layers, names them and saves them; the forward and backward of a step are `kernels.py`'s.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest, HybridError
from hybrid.training.base import encoded, load_base, stops
from hybrid.training.batches import Encoded, render
from hybrid.training.job import Fitted, Job
from hybrid.training.kernels import fast_linear
from hybrid.training.loop import Group
from hybrid.training.rates import groups
from hybrid.training.recipes import Recipe
from hybrid.training.shard import in_team, needs_team, spread
from hybrid.training.start import take_up
from hybrid.training.supervised import Learner, fit_answers

if TYPE_CHECKING:
    from torch import Tensor

#: mean difference in nats a token that rounding may make between the trained adapter and what PEFT reads back, and
#: the same as a share of what the adapter does to the text: 0.05 at an effect of 1 to 2, 0.11 after longer training
READ_BACK, READ_BACK_OF_EFFECT = 0.1, 0.1


def fit(job: Job) -> Fitted:
    """Trains an adapter. Raises DataError for rows that do not fit, BadRequest for a recipe that cannot work."""
    return fit_at(job)


def fit_rslora(job: Job) -> Fitted:
    """rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): the update is scaled by alpha / sqrt(rank).

    That is LoRA with alpha · sqrt(rank), and it is saved as that, so that every engine reads it alike.
    """
    alpha = job.recipe.alpha * job.recipe.rank**0.5
    return fit_at(replace(job, recipe=job.recipe.model_copy(update={"alpha": alpha})))


def fit_plus(job: Job) -> Fitted:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B, which starts at zero, learns faster than A."""
    return fit_at(job, job.recipe.lora_plus_ratio)


def fit_at(job: Job, b_rate: float = 1.0) -> Fitted:
    """LoRA in which B learns at `b_rate` times the rate of A."""
    base, tokenizer, train, dev = opened(job)
    model = adapted(base, job.recipe, job.model.name)
    take_up(model, job)
    text = canary_text(job, tokenizer)

    def save(model: Any, folder: Path) -> dict[str, Any]:
        return save_adapter(model, tokenizer, text, folder)

    def anew() -> Any:
        return adapted(load_base(job.model, job.recipe.precision, device="cpu")[0], job.recipe, job.model.name)

    if job.recipe.shard:
        spread(model, job.watch.team)
    learner = Learner(model, lora_groups(model, job.recipe, b_rate), partial(save, model))
    if job.recipe.shard:
        learner = in_team(learner, job.watch.team, train, anew, save)
    return fit_answers(job, learner, train, dev)


def opened(job: Job, **options: Any) -> tuple[Any, Any, list[Encoded], list[Encoded]]:
    """(base, tokenizer, training rows, dev rows) of a job, the random numbers seeded.

    A base that is to be split stays on the CPU until then. Raises BadRequest where there is nobody to split it with.
    """
    import torch

    torch.manual_seed(job.recipe.seed)
    if job.recipe.shard:
        needs_team(job.watch.team)
        options["device"] = "cpu"
    base, tokenizer = load_base(job.model, job.recipe.precision, **options)
    return base, tokenizer, *encoded(tokenizer, job.data, job.recipe, stops(base))


def lora_groups(model: Any, recipe: Recipe, b_rate: float = 1.0) -> list[Group]:
    """A model's LoRA matrices by their rates."""
    return groups(model, recipe.layer_decay, lambda name, _: b_rate if ".lora_B." in name else 1.0)


def canary_text(job: Job, tokenizer: Any) -> str:
    """A dev row as text, prompt and answer: what the engine's canary compares log-probabilities on."""
    sample = min(job.data.dev, key=lambda example: len(example.question))
    return render(tokenizer, sample.messages) + sample.answer


def adapted(base: Any, recipe: Recipe, name: str, *, plain: bool = True, **options: Any) -> Any:
    """The base with LoRA layers of the recipe, in training mode. Raises BadRequest for modules it does not have.

    `plain` layers have our fast forward, others PEFT's own; `options` go to PEFT's LoraConfig.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = list(recipe.target_modules)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        **options,
    )
    if plain:
        config._register_custom_module({torch.nn.Linear: fast_linear()})
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise BadRequest(f"target_modules: {error}", param="target_modules") from error
    config.base_model_name_or_path = name  # PEFT puts the folder of this machine there
    return model.train()


def save_adapter(model: Any, tokenizer: Any, text: str, folder: Path) -> dict[str, Any]:
    """Saves, reads back with PEFT alone, and records its log-probabilities for the engine's canary."""
    from peft import PeftModel

    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    trained = token_logprobs(model, tokenizer, text)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    dtype = base.dtype
    plain = PeftModel.from_pretrained(model.unload(), str(folder)).to(dtype).eval()
    read = token_logprobs(plain, tokenizer, text)
    with plain.disable_adapter():
        effect = float((read - token_logprobs(plain, tokenizer, text)).abs().mean())
    apart = float((trained - read).abs().mean())
    if not apart <= max(READ_BACK, READ_BACK_OF_EFFECT * effect):
        raise HybridError(
            f"The saved adapter answers differently from the trained one ({apart:.3f} nats a token); nothing was "
            "published. Train with --set precision=float32, and report this base model."
        )
    return {"canary": {"prompt": text, "logprobs": [round(value, 5) for value in read.tolist()]}}


def token_logprobs(model: Any, tokenizer: Any, text: str) -> Tensor:
    """The log-probability of each token of `text` but the first, float32 [n - 1]."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    found: Tensor = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return found.cpu()
