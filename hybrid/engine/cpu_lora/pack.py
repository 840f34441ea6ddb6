"""Packing: the matrices of the adapters a step uses, as two dense operands a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """One layer's operands for a set of adapters.

    `a` is [R, in] and `bt` is [R, out] with R = Σ over slices and adapters of the rank in use; `owners` names, row by
    row, the adapter (its position in the set) that owns it, and is what the mask is made from.
    """

    a: torch.Tensor
    bt: torch.Tensor
    owners: tuple[int, ...]


def used_rank(a: torch.Tensor) -> int:
    """The rank really in use of a zero-padded A [max_rank, in]: the last row that is not zero, counted from one."""
    rows = a.abs().amax(dim=1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def pack(
    a_stacked: Sequence[torch.Tensor], b_stacked: Sequence[torch.Tensor], sizes: Sequence[int], slots: Sequence[int]
) -> Pack | None:
    """Packs vLLM's stacked tensors (A_i [slots, 1, max_rank, in], B_i [slots, 1, out_i, max_rank]) for `slots`.

    B becomes a block matrix, so that q, k and v (or gate and up) are one product. None when no adapter touches the
    layer.
    """
    total = sum(sizes)
    a_rows: list[torch.Tensor] = []
    bt_rows: list[torch.Tensor] = []
    owners: list[int] = []
    offset = 0
    for a_all, b_all, size in zip(a_stacked, b_stacked, sizes, strict=True):
        for position, slot in enumerate(slots):
            a, b = a_all[slot, 0], b_all[slot, 0]
            rank = used_rank(a)
            if rank == 0:
                continue
            block = torch.zeros(rank, total, dtype=b.dtype)
            block[:, offset : offset + size] = b[:size, :rank].T
            a_rows.append(a[:rank])
            bt_rows.append(block)
            owners += [position] * rank
        offset += size
    if not a_rows:
        return None
    return Pack(torch.cat(a_rows), torch.cat(bt_rows), tuple(owners))
