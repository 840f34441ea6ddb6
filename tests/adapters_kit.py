"""Adapters and a base model made of safetensors and JSON alone: nothing is trained, nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hybrid.adapters.preflight import BaseFacts, read_base

HIDDEN, INNER, LAYERS, VOCABULARY = 16, 32, 2, 64
BASE_SHA = "b" * 64
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_base(folder: Path, *, hidden: int = HIDDEN, layers: int = LAYERS, prefix: str = "model.") -> BaseFacts:
    """A model folder in the shape of a small llama, and its facts."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        f"{prefix}embed_tokens.weight": np.zeros((VOCABULARY, hidden), np.float32),
        f"{prefix}norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(layers):
        for name in LINEAR:
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            shape = {"down_proj": (hidden, INNER), "gate_proj": (INNER, hidden), "up_proj": (INNER, hidden)}
            weight = np.zeros(shape.get(name, (hidden, hidden)), np.float32)
            tensors[f"{prefix}layers.{layer}.{block}.{name}.weight"] = weight
    save_file(tensors, folder / "model.safetensors")
    return read_base(folder, BASE_SHA)


def weights_of(base: BaseFacts, rank: int = 4, seed: int = 0, *, zero_b: bool = False) -> dict[str, np.ndarray]:
    """LoRA matrices for every linear layer of `base`."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (outputs, inputs) in base.shapes.items():
        b = np.zeros((outputs, rank)) if zero_b else random.normal(size=(outputs, rank))
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(rank, inputs)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
    return tensors


def make_adapter(
    folder: Path, base: BaseFacts, *, rank: int = 4, seed: int = 0, zero_b: bool = False, **overrides: Any
) -> Path:
    """A valid PEFT folder for `base`; `overrides` replace keys of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 16,
        "target_modules": list(LINEAR), "bias": "none", "lora_dropout": 0.05, "init_lora_weights": True,
        "inference_mode": True, "use_rslora": False, "use_dora": False, "modules_to_save": None, "rank_pattern": {},
    } | overrides  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights_of(base, rank, seed, zero_b=zero_b), folder / "adapter_model.safetensors")
    return folder


def filling(base: BaseFacts, card: dict[str, Any] | None = None, **kwargs: Any) -> Callable[[Path], dict[str, Any]]:
    """What `AdapterStore.publish` takes: writes an adapter for `base` and returns its card."""

    def fill(staging: Path) -> dict[str, Any]:
        make_adapter(staging, base, **kwargs)
        return {"base_sha256": base.sha256} | (card or {})

    return fill
