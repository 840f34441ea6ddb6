"""Packing: the matrices of the adapters that are used, in the order in which the products read them.

vLLM keeps every adapter of a layer zero-padded to the largest rank, in one tensor a slice (q, k and v, or gate and up):
A_i [slots, 1, max_rank, in] and B_i [slots, 1, out_i, max_rank]. What is made of them here has the ranks in use alone,
one A for all slices, and B transposed; it lives until vLLM writes to the layer again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: the kernel's order: columns in strips, each a whole number of lanes
STRIP, LANES = 64, 16


@dataclass(frozen=True, eq=False, slots=True)
class Slice:
    """Where one slice's part of a pack is: its rows of A, its columns of the output, and its B, [rows, columns]."""

    rows: slice
    columns: slice
    bt: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Pack:
    """One layer's operands for a set of adapters.

    `a` is [R, in], R = Σ over slices and adapters of the rank in use. `owners` names, row by row, the adapter (its
    position in the set) that owns it, and is what the mask is made from.
    """

    a: torch.Tensor
    slices: tuple[Slice, ...]
    owners: tuple[int, ...]


class Layer:
    """What is kept of one wrapped layer. Everything is forgotten when the tensors it was made of are written to."""

    def __init__(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
        self._a, self._b, self._sizes = tuple(a), tuple(b), tuple(sizes)
        #: whether the kernel can compute the layer: bfloat16, in pairs
        operands = (*self._a, *self._b)
        self.fits = all(one.dtype == torch.bfloat16 and one.shape[-1] % 2 == 0 for one in operands)
        self._forget()

    def refresh(self) -> None:
        """Forgets everything if vLLM has written to the layer since it was packed.

        PyTorch counts the writes to a tensor; setting and clearing a slot write to every A.
        """
        if self._version != self._a[0]._version:
            self._forget()

    def _forget(self) -> None:
        self._version = self._a[0]._version
        self._packs: dict[int, Pack | None] = {}
        self._joint: tuple[tuple[int, ...], Pack | None] = ((), None)
        self._words: dict[int, tuple[torch.Tensor, ...]] = {}
        self._table = _table(self._a[0], self._sizes)

    def pack(self, slots: tuple[int, ...]) -> Pack | None:
        """The operands of PyTorch's products for a set of slots; None when none of them touches the layer."""
        if len(slots) > 1:
            if self._joint[0] != slots:  # the last set alone is kept: a step comes back to no other
                self._joint = (slots, pack(self._a, self._b, self._sizes, slots))
            return self._joint[1]
        if slots[0] not in self._packs:
            self._packs[slots[0]] = pack(self._a, self._b, self._sizes, slots)
        return self._packs[slots[0]]

    def table(self, slots: Sequence[int]) -> int:
        """The address of the kernel's description of the layer, with at least these slots in it."""
        for slot in slots:
            if slot not in self._words:
                self._enter(slot)
        return ctypes.addressof(self._table)

    def _enter(self, slot: int) -> None:
        """Packs one slot for the kernel: [address of A, its columns, then for each slice: address of B, its pairs]."""
        ranks = [used_rank(a[slot, 0]) for a in self._a]
        even = [rank + rank % 2 for rank in ranks]  # the row after an odd one is zero
        width = _up(sum(even), LANES)
        if not width:
            self._words[slot] = ()
            return
        a = torch.cat([a[slot, 0, :rank] for a, rank in zip(self._a, even, strict=True)])
        kept, entry = [words(a, width)], list[int]()
        for b, size, rank in zip(self._b, self._sizes, even, strict=True):
            kept.append(words(b[slot, 0, :size, :rank], _up(size, LANES)) if rank else a.new_empty(0))
            entry += [kept[-1].data_ptr(), rank // 2]
        self._words[slot] = tuple(kept)
        at = 2 + len(self._sizes) + slot * (2 + len(entry))
        self._table[at : at + 2 + len(entry)] = [kept[0].data_ptr(), width, *entry]


def used_rank(a: torch.Tensor) -> int:
    """The rank really in use of a zero-padded A [max_rank, in]: the last row that is not zero, counted from one."""
    rows = a.any(dim=1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def pack(
    a_stacked: Sequence[torch.Tensor], b_stacked: Sequence[torch.Tensor], sizes: Sequence[int], slots: Sequence[int]
) -> Pack | None:
    """Packs vLLM's stacked tensors for `slots`. None when no adapter touches the layer."""
    a_rows: list[torch.Tensor] = []
    slices: list[Slice] = []
    owners: list[int] = []
    column = 0
    for a_all, b_all, size in zip(a_stacked, b_stacked, sizes, strict=True):
        first, bt_rows = len(owners), []
        for position, slot in enumerate(slots):
            if rank := used_rank(a_all[slot, 0]):
                a_rows.append(a_all[slot, 0, :rank])
                bt_rows.append(b_all[slot, 0, :size, :rank].T)
                owners += [position] * rank
        if bt_rows:
            bt = torch.cat(bt_rows).contiguous()
            slices.append(Slice(slice(first, len(owners)), slice(column, column + size), bt))
        column += size
    return Pack(torch.cat(a_rows), tuple(slices), tuple(owners)) if a_rows else None


def words(matrix: torch.Tensor, columns: int) -> torch.Tensor:
    """[n, k] bfloat16, k even, as the kernel reads its transpose: [k ∕ 2 · columns] words, columns above n zero.

    A word holds two neighbours of a row, which is a column of the product's operand; columns lie in strips, and a
    strip pair after pair.
    """
    n, k = matrix.shape
    pairs = matrix.new_zeros(columns, k).view(torch.int32)
    pairs[:n] = matrix.view(torch.int32)
    whole = columns // STRIP * STRIP
    strips = pairs[:whole].view(-1, STRIP, k // 2).transpose(1, 2)
    return torch.cat([strips.reshape(-1), pairs[whole:].T.reshape(-1)])


def _table(a: torch.Tensor, sizes: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """The kernel's description of a layer without any adapter."""
    head = [a.shape[-1] // 2, len(sizes), *sizes]
    return (ctypes.c_int64 * (len(head) + a.shape[0] * (2 + 2 * len(sizes))))(*head)


def _up(number: int, step: int) -> int:
    """`number` rounded up to a multiple of `step`."""
    return -(-number // step) * step
