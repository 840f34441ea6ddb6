"""The wrapper vLLM calls in every layer. The plan of a step is made once, in `update_metadata`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from hybrid.engine.cpu_lora.pack import Pack, pack

#: sets of adapters whose packs are kept: a step that comes back to one pays nothing
KEEP = 16
#: rows from which an adapter's own rows are multiplied apart: below it the mask costs less than the calls
APART = 48

Layers = dict[int, Pack | None]


@dataclass(slots=True)
class Group:
    """Rows that are multiplied together. `rows` is None for all of them; `position` [rows] says which adapter of the
    set each row wants (-1 none), and is None where every row wants the only one."""

    slots: tuple[int, ...]
    layers: Layers
    rows: slice | torch.Tensor | None = None
    position: torch.Tensor | None = None
    masks: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def mask(self, owners: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """[rows, R]: one where the row's adapter owns the column. Made once a step for all layers that agree."""
        found = self.masks.get(owners)
        if found is None:
            assert self.position is not None  # noqa: S101  callers checked
            found = self.masks[owners] = (self.position[:, None] == torch.tensor(owners)[None, :]).to(dtype)
        return found


class PackedLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    """Multi-LoRA by two dense products a layer instead of a gather a token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packs: dict[tuple[int, ...], Layers] = {}
        self._groups: list[Group] = []

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Makes the step's plan: which rows are multiplied with which adapters."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        rows = self.token_lora_indices
        wanted = rows.tolist()
        slots = tuple(sorted(set(wanted) - {-1}))
        if not slots:
            self._groups = []
        elif len(slots) == 1 and -1 not in wanted:
            self._groups = [Group(slots, self._layers(slots, lora_index_to_id))]
        elif len(wanted) < APART:
            lookup = torch.full((max_loras + 1,), -1)
            lookup[list(slots)] = torch.arange(len(slots))
            # index -1 reads the last entry of the lookup, which stays -1
            self._groups = [Group(slots, self._layers(slots, lora_index_to_id), position=lookup[rows])]
        else:
            self._groups = [
                Group((slot,), self._layers((slot,), lora_index_to_id), rows=_rows_of(rows, slot)) for slot in slots
            ]

    def _layers(self, slots: tuple[int, ...], ids: list[int | None]) -> Layers:
        """The packs of a set of adapters. A LoRA id never comes back with other weights, so ids and slots name them."""
        key = tuple(part for slot in slots for part in (slot, ids[slot] or 0))
        layers = self._packs.pop(key, {})
        self._packs[key] = layers
        while len(self._packs) > KEEP:
            del self._packs[next(iter(self._packs))]
        return layers

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y += mask(x · Aᵀ) · Bᵀ · scale, in place. x [n, in], y [n, Σ output_slices]."""
        if not self._groups:
            return
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        layer = id(lora_a_stacked[0])
        for group in self._groups:
            packed = group.layers.get(layer, ...)
            if packed is ...:
                packed = group.layers[layer] = pack(lora_a_stacked, lora_b_stacked, output_slices, group.slots)
            if packed is not None:
                _apply(y, x, packed, group, scale)

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the logits as they are: an adapter that touches the output head does not pass preflight.

        vLLM's own gathers the head's matrices for every row, adapter or not. It also counts one row a sequence, while
        the log-probabilities of a prompt have one a token: asked for beside other requests, they end the engine
        (vllm-project/vllm#16668).
        """


def _apply(y: torch.Tensor, x: torch.Tensor, packed: Pack, group: Group, scale: float) -> None:
    rows = group.rows
    if rows is None:
        hidden = linear(x, packed.a)
        if group.position is not None:
            hidden *= group.mask(packed.owners, hidden.dtype)
        y.addmm_(hidden, packed.bt, alpha=scale)
    elif isinstance(rows, slice):
        y[rows].addmm_(linear(x[rows], packed.a), packed.bt, alpha=scale)
    else:
        y.index_add_(0, rows, linear(x[rows], packed.a) @ packed.bt, alpha=scale)


def _rows_of(rows: torch.Tensor, slot: int) -> slice | torch.Tensor:
    """Where an adapter's rows are: a slice when they lie together, which saves two copies."""
    found = (rows == slot).nonzero().flatten()
    first, last = int(found[0]), int(found[-1])
    return slice(first, last + 1) if last - first + 1 == len(found) else found
