"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA for the direction of each row of a weight, a number for its length.

The engine computes plain LoRA. A DoRA whose lengths are those of its directions is one, and is saved as one; any other
stays a DoRA, which has to be merged into the base to be served.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hybrid.training.job import Fitted, Job
from hybrid.training.lora import adapted, canary_text, lora_groups, opened, save_adapter
from hybrid.training.peft_save import MERGE, save_peft
from hybrid.training.supervised import Learner, fit_answers

if TYPE_CHECKING:
    from torch import Tensor

#: by how much a length may differ, as a share: less than the bfloat16 rounding of the weights it multiplies
EXACT = 1e-3


def fit(job: Job) -> Fitted:
    """Trains direction and length. Raises as LoRA does."""
    base, tokenizer, train, dev = opened(job)
    model = adapted(base, job.recipe, job.model.name, plain=False, use_dora=True)
    learner = Learner(model, lora_groups(model, job.recipe), partial(save_peft, model), "peft", MERGE)

    def finish() -> Learner:
        if _furthest(model) > EXACT:
            return learner
        lora, text = _as_lora(model, job), canary_text(job, tokenizer)
        return Learner(lora, (), lambda folder: save_adapter(lora, tokenizer, text, folder))

    return fit_answers(job, replace(learner, finish=finish), train, dev)


def _furthest(model: Any) -> float:
    """The largest relative difference between a learned length and that of the row it belongs to."""
    import torch

    with torch.no_grad():
        return max(float((_length(layer) / _norms(layer) - 1).abs().max()) for layer in _layers(model))


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if len(getattr(module, "lora_magnitude_vector", ()))]


def _length(layer: Any) -> Tensor:
    length: Tensor = layer.lora_magnitude_vector["default"].weight.float()
    return length


def _norms(layer: Any) -> Tensor:
    """The length of each row of the base's weight with the update added, [outputs]."""
    norms: Tensor = (layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()).norm(dim=1)
    return norms


def _as_lora(model: Any, job: Job) -> Any:
    """The same matrices in a plain LoRA on the same base."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    matrices = {
        name: tensor.detach().clone()
        for name, tensor in get_peft_model_state_dict(model).items()
        if "lora_magnitude_vector" not in name
    }
    lora = adapted(model.unload(), job.recipe, job.model.name)
    set_peft_model_state_dict(lora, matrices)
    return lora
