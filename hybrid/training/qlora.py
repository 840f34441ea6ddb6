"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a base whose weights are held in four bits.

What comes out is a plain LoRA, served on the base as it is. Its dev loss is measured there, since that is where it
answers; the loss on the four-bit base is on the card too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from hybrid.errors import BadRequest
from hybrid.training.base import forward_of, load_base
from hybrid.training.job import Fitted, Job
from hybrid.training.lora import adapted, canary_text, lora_groups, opened, save_adapter
from hybrid.training.objective import measure
from hybrid.training.peft_save import save_peft
from hybrid.training.supervised import Learner, fit_answers

INSTEAD = "use --method lora, or a machine whose device bitsandbytes supports"


def fit(job: Job) -> Fitted:
    """Trains on the four-bit base. Raises BadRequest where bitsandbytes cannot work on this machine's device."""
    base, tokenizer, train, dev = opened(job, quantization_config=_four_bits(job.recipe.precision))
    model = adapted(base, job.recipe, job.model.name, plain=False)
    text = canary_text(job, tokenizer)
    trained: dict[str, float] = {}

    def finish() -> Learner:
        model.eval()
        trained["dev_loss_4bit"] = round(measure(forward_of(model), dev).loss, 5)
        lora = _on_served_base(model, job)
        return Learner(lora, (), lambda folder: save_adapter(lora, tokenizer, text, folder))

    learner = Learner(model, lora_groups(model, job.recipe), partial(save_peft, model), finish=finish)
    fitted = fit_answers(job, learner, train, dev)
    return replace(fitted, metrics={**fitted.metrics, **trained})


def _four_bits(precision: str) -> Any:
    """NF4 with double quantisation, as in the paper; tried on one small matrix first."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        from transformers import BitsAndBytesConfig

        probe = torch.ones(64, 64, device="cuda" if torch.cuda.is_available() else "cpu")
        dequantize_4bit(*quantize_4bit(probe, quant_type="nf4"))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, precision),
        )
    except (ImportError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise BadRequest(
            f"bitsandbytes cannot hold weights in four bits on this machine ({error}); {INSTEAD}.", param="method"
        ) from error


def _on_served_base(model: Any, job: Job) -> Any:
    """The trained matrices on the base as the engine holds it."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    base, _ = load_base(job.model, job.recipe.precision)
    lora = adapted(base, job.recipe, job.model.name)
    set_peft_model_state_dict(lora, get_peft_model_state_dict(model))
    return lora
