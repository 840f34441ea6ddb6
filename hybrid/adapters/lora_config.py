"""Which `adapter_config.json` the engine computes faithfully: an allow-list, since vLLM ignores keys it does not know.

The fields are those of `peft.LoraConfig` (0.21) and `vllm.lora.peft_helper.PEFTHelper` (0.32).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import Refused

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20

#: say how the adapter was made; they change nothing of what it computes
HARMLESS = frozenset(
    [
        "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
        "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config",
        "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "use_rslora",
    ]
)  # fmt: skip

#: checked one by one in `read`
CHECKED = frozenset(["peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "init_lora_weights"])

#: features the engine does not compute, and what to do about each
REFUSED: Mapping[str, str] = {
    "use_dora": "it uses DoRA, which the engine does not compute; train with use_dora=False",
    "lora_bias": "it trains biases in B (lora_bias), which the engine does not add; train with lora_bias=False",
    "modules_to_save": "it replaces whole modules (modules_to_save), which the engine would leave out; "
    "train LoRA on linear layers only",
    "trainable_token_indices": "it trains token embeddings (trainable_token_indices), which the engine would leave "
    "out; train LoRA on linear layers only",
    "target_parameters": "it adapts bare parameters (target_parameters); train LoRA on linear layers only",
    "rank_pattern": "it gives modules different ranks (rank_pattern); train with one rank",
    "alpha_pattern": "it gives modules different scales (alpha_pattern); train with one alpha",
    "alora_invocation_tokens": "it is an activated LoRA (aLoRA), which the engine does not compute; train a plain one",
    "layer_replication": "it replicates layers of the base; train it on the base as it is",
    "loftq_config": "it was started with LoftQ, which changes the base's weights; "
    "convert it with PEFT's path_initial_model_for_weight_conversion",
    "use_qalora": "it uses QALoRA, which the engine does not compute; train a plain LoRA",
    "use_bdlora": "it uses block-diagonal LoRA, which the engine does not compute; train a plain LoRA",
    "fan_in_fan_out": "its base stores weights transposed (fan_in_fan_out); this is not supported",
}

#: initialisations that leave the base's weights alone, so that the saved adapter is a plain LoRA
PLAIN_INITS = frozenset(["gaussian", "eva", "orthogonal", "mica", "lora_ga"])


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What is needed of a valid config. `targets` is None where the modules cannot be told from the config.

    The weight of a module is W + `scale` · B A.
    """

    rank: int
    targets: tuple[str, ...] | None
    scale: float


def read(folder: Path, max_rank: int) -> LoraConfig:
    """The checked config of an adapter folder. Raises Refused with one specific reason."""
    config = _load(folder / CONFIG)
    _check_kind(config)
    for key, value in config.items():
        if _is_default(value) or key in HARMLESS or key in CHECKED:
            continue
        if key in REFUSED:
            raise Refused(f"the adapter is not usable: {REFUSED[key]}.")
        raise Refused(
            f"{CONFIG} sets {key[:80]!r}, which the engine would ignore silently; "
            "retrain without it, or remove it if it has no effect on the result."
        )
    _check_init(config.get("init_lora_weights", True))
    rank = _rank(config, max_rank)
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraConfig(rank, _targets(config), scale)


def _is_default(value: Any) -> bool:
    """Switched off: null, false, empty. Zero is a value."""
    return value is None or value is False or value in ("", [], {})


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Refused(f"{CONFIG} is missing; save the adapter with PEFT's save_pretrained.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise Refused(f"{CONFIG} is larger than {MAX_CONFIG_BYTES:,} bytes; save the adapter again.")
    try:
        config = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{CONFIG} is not JSON; save the adapter again with PEFT's save_pretrained.") from error
    if not isinstance(config, dict):
        raise Refused(f"{CONFIG} is not a JSON object; save the adapter again with PEFT's save_pretrained.")
    return config


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_kind(config: Mapping[str, Any]) -> None:
    kind, task, bias = config.get("peft_type"), config.get("task_type"), config.get("bias", "none")
    if kind != "LORA":
        raise Refused(f"the adapter's peft_type is {str(kind)[:40]!r}; only LORA is served. Train a LoRA instead.")
    if task not in (None, "CAUSAL_LM"):
        raise Refused(f"the adapter's task_type is {str(task)[:40]!r}; only CAUSAL_LM is served.")
    if bias not in (None, "none"):
        raise Refused(f"the adapter trains biases (bias={str(bias)[:40]!r}), which the engine does not add; use none.")


def _check_init(init: Any) -> None:
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in PLAIN_INITS):
        return
    raise Refused(
        f"the adapter was started with init_lora_weights={str(init)[:40]!r}, which changes the base's weights "
        "(PiSSA, OLoRA, CorDA, LoftQ do); convert it with PEFT's path_initial_model_for_weight_conversion."
    )


def _rank(config: Mapping[str, Any], max_rank: int) -> int:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise Refused(f"{CONFIG} gives no positive rank r; save the adapter again with PEFT's save_pretrained.")
    if rank > max_rank:
        raise Refused(
            f"the adapter's rank is {rank} and the engine's limit {max_rank}; "
            "train a smaller one, or raise engine.max_lora_rank and restart."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise Refused(f"{CONFIG} gives no number lora_alpha; save the adapter again with PEFT's save_pretrained.")
    return rank


def _targets(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The module suffixes that PEFT adapted in every layer, or None where a pattern or a selection hides them."""
    targets = config.get("target_modules")
    if isinstance(targets, list) and not all(isinstance(t, str) for t in targets):
        raise Refused(f"target_modules in {CONFIG} must name modules; save the adapter again.")
    if not targets or not isinstance(targets, list | str):
        raise Refused(f"{CONFIG} names no target_modules; save the adapter again with PEFT's save_pretrained.")
    if isinstance(targets, str) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return None
    return tuple(targets)
