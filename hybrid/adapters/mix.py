"""A weighted mix of LoRAs as one LoRA: exact, since a sum of low-rank updates is a low-rank update.

    Σ wᵢ sᵢ Bᵢ Aᵢ  =  [w₁s₁B₁, w₂s₂B₂, …] · [A₁; A₂; …]      with scale 1 and rank Σ rᵢ,   sᵢ = αᵢ / rᵢ

This is the "cat" combination of PEFT's `add_weighted_adapter`. The mixture is of requests: one update for the whole
answer, as vLLM applies it, and not another one for every token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid.adapters import lora_config
from hybrid.adapters.lora_config import CONFIG
from hybrid.adapters.preflight import PREFIX, WEIGHTS
from hybrid.adapters.tensors import Floats, read_floats
from hybrid.errors import BadRequest

#: weights are kept in steps of one twentieth, so that few artefacts arise
STEPS = 20
#: the ranks vLLM has kernels for; a mix is padded with zeros to the next of them
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """A LoRA as numbers: by module A [rank, inputs] and B [outputs, rank], the scale already in B."""

    rank: int
    by_module: Mapping[str, tuple[Floats, Floats]]


def parse_weights(text: str) -> dict[str, float]:
    """The weights that `a=0.7,b@2=0.3` spells. Raises BadRequest in words."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise BadRequest(
                f"{part.strip()[:80]!r} gives no weight above zero; write a mix as mix:a=0.7,b=0.3.", param="model"
            )
        if name in weights:
            raise BadRequest(f"The mix names {name[:80]!r} twice; give each adapter one weight.", param="model")
        weights[name] = weight
    if len(weights) < 2:
        raise BadRequest(f"A mix takes two adapters or more; ask for {next(iter(weights))[:80]} itself.", param="model")
    return weights


def quantised(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights as they are kept: divided by their sum, in twentieths that sum to one, sorted by name.

    Each gets the whole twentieths of its share, and what is left goes one by one to the largest remainders (Hamilton's
    method), of equal ones to the first name. What gets nothing is left out. Equal shares in any order become equal
    weights: this is the key under which a mix is found again.
    """
    largest = max(weights.values())
    parts = {name: weights[name] / largest for name in sorted(weights)}  # a sum of them is always a number
    total = math.fsum(parts.values())
    exact = {name: part / total * STEPS for name, part in parts.items()}
    steps = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (round(steps[name] - exact[name], 9), name))
    for name in by_remainder[: STEPS - sum(steps.values())]:
        steps[name] += 1
    return {name: count / STEPS for name, count in steps.items() if count}


def padded(rank: int) -> int:
    """The smallest rank of the engine's that holds `rank`; one beyond them all stays as it is, and is refused."""
    return next((allowed for allowed in RANKS if allowed >= rank), rank)


def read_factors(folder: Path) -> Factors:
    """A PEFT folder that preflight lets through. Raises Refused."""
    config = lora_config.read(folder, max_rank=RANKS[-1])
    tensors = read_floats(folder / WEIGHTS)
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    return Factors(
        config.rank,
        {
            module: (
                tensors[f"{PREFIX}{module}.lora_A.weight"],
                tensors[f"{PREFIX}{module}.lora_B.weight"] * np.float32(config.scale),
            )
            for module in modules
        },
    )


def concatenated(members: Sequence[tuple[float, Factors]]) -> Factors:
    """The factors of Σ wᵢ ΔWᵢ, exactly, of rank `padded(Σ rᵢ)`.

    A module that some members leave alone holds the others' parts, and zeros where theirs would stand.
    """
    rank = padded(sum(factors.rank for _, factors in members))
    shapes = {
        module: (a.shape[1], b.shape[0]) for _, factors in members for module, (a, b) in factors.by_module.items()
    }
    mixed: dict[str, tuple[Floats, Floats]] = {
        module: (np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32))
        for module, (inputs, outputs) in sorted(shapes.items())
    }
    start = 0
    for weight, factors in members:
        end = start + factors.rank
        for module, (a, b) in factors.by_module.items():
            mixed[module][0][start:end] = a
            mixed[module][1][:, start:end] = b * np.float32(weight)
        start = end
    return Factors(rank, mixed)


def write_factors(folder: Path, factors: Factors, base: str = "") -> None:
    """Writes the factors as PEFT's folder, scale 1; equal factors give equal bytes."""
    from safetensors.numpy import save_file

    tensors = {}
    for module, (a, b) in factors.by_module.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": factors.rank,
        "lora_alpha": factors.rank,
        "target_modules": sorted(factors.by_module),  # whole paths: a suffix would name modules that are left alone
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
