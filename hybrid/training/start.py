"""Sequential training: a run that starts from the weights of an adapter of this home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybrid.adapters.preflight import WEIGHTS, read_card
from hybrid.errors import BadRequest, Refused
from hybrid.training.job import Job

#: keys of a PEFT configuration that must be equal for the same weights to mean the same
_ALIKE = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")


def take_up(model: Any, job: Job) -> None:
    """Copies the weights of `job.start`, where there is one, into a model with LoRA layers.

    Raises BadRequest when that adapter's layers are not of this recipe's shape, Refused when its base is another.
    """
    if job.start is None:
        return
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    _check_card(job, job.start)
    _check_config(model, job.start, job.recipe.init_from)
    weights = load_file(job.start / WEIGHTS)
    shapes = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = {name: tensor.shape for name, tensor in shapes.items()}
    if ours != {name: tensor.shape for name, tensor in weights.items()}:
        raise BadRequest(
            f"{job.recipe.init_from} adapts other layers than this recipe; set target_modules and rank as its card has "
            "them.", param="init_from",
        )  # fmt: skip
    set_peft_model_state_dict(model, weights)


def _check_card(job: Job, start: Path) -> None:
    card = read_card(start)
    theirs = card.get("base_sha256")
    if theirs and theirs != job.model.sha256:
        raise Refused(
            f"{job.recipe.init_from} was trained on the base {card.get('base')}, not on {job.model.name}; start from "
            "an adapter of this base, or set `model` to that one.", param="init_from",
        )  # fmt: skip
    if card.get("kind", "lora") != "lora":
        raise BadRequest(
            f"{job.recipe.init_from} is no LoRA adapter but {card['kind']}; start from one that is.", param="init_from"
        )


def _check_config(model: Any, start: Path, named: str) -> None:
    theirs = json.loads((start / "adapter_config.json").read_bytes())
    ours = model.peft_config["default"].to_dict()
    apart = {key: (theirs.get(key), ours[key]) for key in _ALIKE if (theirs.get(key) or False) != (ours[key] or False)}
    if apart:
        told = ", ".join(f"{key} is {there!r} there and {here!r} here" for key, (there, here) in apart.items())
        raise BadRequest(
            f"{named} cannot be continued with this recipe: {told}; set rank, alpha and method as its card has them.",
            param="init_from",
        )
