"""Adapters made for tests: a PEFT folder with random weights, for the shapes of a base model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hybrid.engine import AdapterRef
from hybrid.rooms import sha256_file


def write_adapter(
    folder: Path, base: Path | None = None, *, rank: int = 8, scale: float = 0.02, nan: bool = False, version: int = 1
) -> AdapterRef:
    """A LoRA on the down projections of `base` (of a tiny made-up model without one). `scale=0` does nothing."""
    config = json.loads((base / "config.json").read_text()) if base else {}
    layers, out, into = (
        config.get("num_hidden_layers", 2),
        config.get("hidden_size", 8),
        config.get("intermediate_size", 16),
    )
    random = np.random.default_rng(rank)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(layers):
        module = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        tensors[f"{module}.lora_A.weight"] = random.normal(0, 0.05, (rank, into)).astype("float32")
        tensors[f"{module}.lora_B.weight"] = random.normal(0, 1, (out, rank)).astype("float32") * np.float32(scale)
    if nan:
        tensors[f"{module}.lora_B.weight"][0, 0] = np.nan
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "bias": "none",
                    "target_modules": ["down_proj"]})
    )  # fmt: skip
    return AdapterRef(folder.name, version, sha256_file(folder / "adapter_model.safetensors"), folder)
