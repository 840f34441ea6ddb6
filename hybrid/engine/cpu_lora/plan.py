"""The plan of a step: which rows want which adapters, and which products serve them. Made once for all layers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

#: rows of one adapter up to which the kernel is the faster; beyond, the weights are read once for many rows anyway
FEW = 64
#: rows of a step from which, without the kernel, each adapter's own are multiplied apart: below it the mask costs less
APART = 48
#: rows that the kernel takes together
TILE = 4

#: None: every row
Rows = slice | torch.Tensor | None


@dataclass(slots=True)
class Group:
    """Rows that PyTorch multiplies together.

    `position` [rows] says which adapter of the set each row wants (-1: none); it is None where all want the only one.
    """

    slots: tuple[int, ...]
    rows: Rows = None
    position: torch.Tensor | None = None
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def masked(self, hidden: torch.Tensor, owners: tuple[int, ...]) -> torch.Tensor:
        """`hidden` [rows, R], zero where a column is not of the row's adapter. Layers that agree share a mask."""
        if self.position is None:
            return hidden
        found = self.masks.get(owners)
        if found is None:
            found = (self.position[:, None] == torch.tensor(owners)[None, :]).to(hidden.dtype)
            self.masks[owners] = found
        return hidden.mul_(found)


class Wanted:
    """The rows that want an adapter. `slots` has each row's slot, -1 without one."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.count = len(slots)
        self.by_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slots):
            if slot >= 0:
                self.by_slot.setdefault(slot, []).append(row)

    def rows(self, slot: int) -> Rows:
        """Where an adapter's rows are: a slice where they lie together, which saves two copies."""
        own = self.by_slot[slot]
        if len(own) == self.count:
            return None
        if own[-1] - own[0] + 1 == len(own):
            return slice(own[0], own[-1] + 1)
        return torch.tensor(own)


class Plan(Wanted):
    """What a step does in every layer; `kernel`: whether there is one."""

    def __init__(self, slots: Sequence[int], kernel: bool) -> None:
        super().__init__(slots)
        few = {slot: rows for slot, rows in self.by_slot.items() if kernel and len(rows) <= FEW}
        #: the slots whose rows the kernel computes, and the address of its own plan of them
        self.few = tuple(few)
        self._tiles = _tiles(few)
        self.tiles = ctypes.addressof(self._tiles)
        #: what PyTorch computes
        self.groups = tuple(self._groups(slots, kernel))

    def _groups(self, slots: Sequence[int], kernel: bool) -> Iterator[Group]:
        many = tuple(slot for slot in self.by_slot if slot not in self.few)
        if len(self.by_slot) > 1 and not kernel and self.count < APART:
            places = {slot: place for place, slot in enumerate(many)}
            yield Group(many, position=torch.tensor([places.get(slot, -1) for slot in slots]))
        else:
            for slot in many:
                yield Group((slot,), self.rows(slot))


def _tiles(few: Mapping[int, list[int]]) -> ctypes.Array[ctypes.c_int64]:
    """[tiles, then for each: slot, how many rows, which]: what the kernel takes a step as."""
    told: list[int] = []
    for slot, rows in few.items():
        for start in range(0, len(rows), TILE):
            tile = rows[start : start + TILE]
            told += [slot, len(tile), *tile, *[0] * (TILE - len(tile))]
    return (ctypes.c_int64 * (1 + len(told)))(len(told) // (2 + TILE), *told)
