"""What PEFT trains beside LoRA: IA3, prompt tuning and prefix tuning. None of them can be loaded into vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest
from hybrid.training.batches import PACK_TOKENS, Encoded, Pack
from hybrid.training.job import Fitted, Job
from hybrid.training.lora import opened
from hybrid.training.objective import Forward
from hybrid.training.peft_save import IN_PROCESS, MERGE, save_peft
from hybrid.training.rates import groups
from hybrid.training.supervised import Learner, fit_answers

if TYPE_CHECKING:
    from torch import Tensor


def fit_ia3(job: Job) -> Fitted:
    """IA3 (Liu et al. 2022, arXiv 2205.05638): one factor for every key, value and inner activation.

    Raises BadRequest for modules the base does not have.
    """
    from peft import IA3Config

    targets = list(job.recipe.target_modules)
    chosen = {} if targets == ["all-linear"] else {"target_modules": targets, "feedforward_modules": []}
    base, _, train, dev = opened(job)
    learner = _learner(base, IA3Config(task_type="CAUSAL_LM", **chosen), job, MERGE)
    return fit_answers(job, learner, train, dev)


def fit_prompt(job: Job) -> Fitted:
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691): vectors before the prompt, begun at real tokens."""
    from peft import PromptTuningConfig

    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=job.recipe.virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
    )
    base, _, train, dev = opened(job)
    learner = _learner(base, config, job, IN_PROCESS)
    return fit_answers(job, learner, train, dev, forward=padded_forward(learner.model), cut=padded)


def fit_prefix(job: Job) -> Fitted:
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190): keys and values before the prompt, in every block.

    They begin as those of training questions, as the paper advises for few rows.
    """
    from peft import PrefixTuningConfig, initialize_kv_prefix_from_text

    tokens = job.recipe.virtual_tokens
    base, tokenizer, train, dev = opened(job)
    learner = _learner(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens), job, IN_PROCESS)
    text = "\n".join(example.question for example in job.data.train[:tokens])
    initialize_kv_prefix_from_text(learner.model, tokenizer, text=text, use_chat_template=False)
    return fit_answers(job, learner, train, dev, forward=padded_forward(learner.model), cut=padded)


def _learner(base: Any, config: Any, job: Job, serve_with: str) -> Learner:
    from peft import get_peft_model

    if config.is_prompt_learning:
        base.set_attn_implementation("sdpa")  # ours knows the packs' layout alone
    try:
        model = get_peft_model(base, config).train()
    except ValueError as error:
        raise BadRequest(f"target_modules: {error}", param="target_modules") from error
    config.base_model_name_or_path = job.model.name  # PEFT puts the folder of this machine there
    return Learner(model, groups(model), partial(save_peft, model), "peft", serve_with)


def padded(rows: Sequence[Encoded], limit: int = PACK_TOKENS) -> Iterator[Pack]:
    """The rows side by side, filled up at the end: for models that put something before every row.

    `ids`, `positions` and `mask` (1 for a token) are [rows, width], `keep` counts places through the rows.
    """
    left = sorted(rows, key=lambda row: row.length)
    while left:
        take = 1
        while take < len(left) and (take + 1) * left[take].length <= limit:
            take += 1
        yield _padded(left[:take])
        left = left[take:]


def _padded(rows: Sequence[Encoded]) -> Pack:
    import torch

    width = max(row.length for row in rows) - 1
    own = [[*row.prompt, *row.answer[:-1]] for row in rows]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in own])
    keep = [n * width + len(row.prompt) - 1 + at for n, row in enumerate(rows) for at in range(len(row.answer))]
    return Pack(
        ids=torch.tensor([ids + [0] * (width - len(ids)) for ids in own]),
        positions=torch.arange(width).expand(len(rows), -1),
        mask=mask,
        prefix_mask=mask.new_zeros(0),
        keep=torch.tensor(keep),
        targets=torch.tensor([token for row in rows for token in row.answer]),
        owners=torch.tensor([n for n, row in enumerate(rows) for _ in row.answer]),
        rows=len(rows),
    )


def padded_forward(model: Any) -> Forward:
    """The model as a function from a pack that `padded` made to the logits of its answer places."""

    def forward(pack: Pack) -> Tensor:
        width = pack.ids.shape[1]
        row, place = pack.keep // width, pack.keep % width
        tail = width - int(place.min())  # logits of the prompts are not wanted
        out = model(
            input_ids=pack.ids.to(model.device),
            attention_mask=pack.mask.to(model.device),
            use_cache=False,
            logits_to_keep=tail,
        )
        logits: Tensor = out.logits[row.to(model.device), (place - width + tail).to(model.device)]
        return logits

    return forward
