"""Which parameters learn how fast: discriminative rates over the depth of a model.

Howard & Ruder 2018 (ULMFiT, arXiv 1801.06146) and Clark et al. 2020 (ELECTRA, arXiv 2003.10555): the nearer a block is
to the input, the more general what it knows, and the slower it should change.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hybrid.training.loop import Group

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r"\.(\d+)\.")


def block_of(name: str) -> int | None:
    """The number of the block that the parameter `name` stands in, if it stands in one."""
    found = _BLOCK.search(name)
    return int(found[1]) if found else None


def depth_of(model: Any) -> int:
    """The number of blocks of a language model."""
    return int(model.config.get_text_config().num_hidden_layers)


def token_tables(model: Any) -> tuple[set[int], set[int]]:
    """(ids of the embeddings' parameters, those and the output head's)."""
    import torch

    below = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    return below, below | ({id(head.weight)} if head is not None else set())


def groups(model: Any, layer_decay: float = 1.0, rate: Callable[[str, Tensor], float] = lambda *_: 1.0) -> list[Group]:
    """The parameters of `model` that learn, by rate.

    The last block, what follows it and the head have the full rate, each block `layer_decay` times that of the one
    above it, embeddings the least; `rate(name, parameter)` multiplies.
    """
    depth, (below, _) = depth_of(model), token_tables(model)
    found: dict[float, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = block_of(name)
            height = 0 if id(parameter) in below else depth if block is None else block + 1
            found.setdefault(layer_decay ** (depth - height) * rate(name, parameter), []).append(parameter)
    return [Group(parameters, share) for share, parameters in found.items()]
