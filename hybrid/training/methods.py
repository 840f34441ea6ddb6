"""The one table of methods: the word of a recipe → the function that trains, and what there is to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid.errors import BadRequest
from hybrid.training import distill, dora, full, head, lora, preference, pretrain, prompting, qlora, raft, reward, soft
from hybrid.training.job import Method


@dataclass(frozen=True, slots=True)
class Row:
    """One method. `makes` is the kind of the version that it publishes; the rest is the row of docs/methods.md."""

    fit: Method
    family: str
    makes: str
    served: str
    cost: str
    use: str


_ENGINE = "hot-loaded beside others, as `NAME`"
_OWN = "by an engine of its own: `HYBRID_MODEL=…/model hybrid serve`"
_MERGED = "not by vLLM; merged into the base, by an engine of its own"
_NOT = "not by vLLM; by PEFT in a process of your own"

METHODS: Mapping[str, Row] = {
    "zero_shot": Row(
        prompting.fit_zero_shot, "prompting", "prompt", "as `base`",
        "one pass over dev", "first, always: what the others have to beat",
    ),
    "few_shot": Row(
        prompting.fit_few_shot, "prompting", "prompt", "as `few_shot:TASK`, its folder in `eval/tasks/`",
        "one pass over dev; each request pays for its examples", "a handful to some hundred rows, or rows that change",
    ),
    "prompt_search": Row(
        prompting.fit_search, "prompting", "prompt", "as `base`, with the instruction it found",
        "a pass over half of dev for each candidate", "the wording was never tried out, and training is out of reach",
    ),
    "head": Row(
        head.fit, "feature-based", "head", "as `head:NAME`; on the base's features it is measured only",
        "seconds; a request costs one embedding, no engine", "closed tasks: the first thing to try beside the prompts",
    ),
    "lora": Row(
        lora.fit, "parameter-efficient", "lora", _ENGINE,
        "the least time for what it reaches: our own fast layers", "the default; from about a hundred rows on",
    ),
    "rslora": Row(
        lora.fit_rslora, "parameter-efficient", "lora", _ENGINE,
        "as `lora`", "ranks of 64 and more, where LoRA's scale makes the update too small",
    ),
    "lora_plus": Row(
        lora.fit_plus, "parameter-efficient", "lora", _ENGINE,
        "as `lora`", "few steps: B, which starts at zero, moves at once; lower `learning_rate` if it diverges",
    ),
    "dora": Row(
        dora.fit, "parameter-efficient", "lora or peft", f"{_ENGINE}, where it is a LoRA exactly; else {_MERGED}",
        "slower than `lora`: the norms of every adapted weight at each step", "low ranks, where LoRA stays behind "
        "full fine-tuning and a merged model is welcome",
    ),
    "qlora": Row(
        qlora.fit, "parameter-efficient", "lora", _ENGINE,
        "a quarter of the memory for the base; slower steps, above all on a CPU",
        "the base does not fit the device otherwise",
    ),
    "ia3": Row(
        soft.fit_ia3, "parameter-efficient", "peft", _MERGED,
        "as `lora`; a hundredth of its parameters", "very few rows, or thousands of tasks to keep",
    ),
    "prompt_tuning": Row(
        soft.fit_prompt, "parameter-efficient", "peft", _NOT,
        "slower than `lora`: rows do not share their beginning; needs many steps", "to compare; models of billions",
    ),
    "prefix_tuning": Row(
        soft.fit_prefix, "parameter-efficient", "peft", _NOT,
        "as `prompt_tuning`; two vectors a token and block", "to compare; generation tasks with few rows",
    ),
    "full": Row(
        full.fit, "full", "weights", _OWN,
        "20 bytes of memory a weight, and an engine for every task", "tens of thousands of rows, far from what the "
        "base knows; a small base",
    ),
    "last_layers": Row(
        full.fit_last, "full", "weights", _OWN,
        "a share of `full`: no gradient below the lowest block that learns", "the domain is near, the device small",
    ),
    "pretrain": Row(
        pretrain.fit, "objectives", "lora", _ENGINE,
        "as `lora` for as many tokens; every token is learned", "plain text of the domain and no questions; then "
        "`--set init_from=NAME@1` with the few rows there are",
    ),
    "raft": Row(
        raft.fit, "objectives", "lora", "with retrieval, as `adapter+rag:NAME:CORPUS`",
        "`lora` on prompts as long as those of `rag`", "answers stand in a corpus, and the base reads passages badly",
    ),
    "dpo": Row(
        preference.fit, "objectives", "lora", _ENGINE,
        "two answers a row, and one pass more over all of them for the reference", "which answer is better is known: "
        "after a supervised run, with `init_from`",
    ),
    "reward": Row(
        reward.fit, "objectives", "peft", "not served: `Scorer` rates answers, `best_of` chooses among n",
        "as `dpo` without the reference", "n answers can be drawn and the best is wanted; the gain of RLHF without it",
    ),
    "distill": Row(
        distill.fit, "objectives", "lora", _ENGINE,
        "one answer of the teacher a row, asked once; then as `lora`", "inputs without good references, and a stronger "
        "model behind some endpoint",
    ),
    "distill_logits": Row(
        distill.fit_logits, "objectives", "lora", _ENGINE,
        "`lora` and a forward pass of the teacher", "a bigger model with the same tokenizer lies at hand",
    ),
}  # fmt: skip


def find_method(name: str) -> Method:
    """The method called `name`. Raises BadRequest naming those that exist."""
    if name not in METHODS:
        raise BadRequest(f"There is no method {name[:80]!r}; use one of {', '.join(METHODS)}.", param="method")
    return METHODS[name].fit
