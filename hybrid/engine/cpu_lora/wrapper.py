"""The wrapper that vLLM calls in every layer.

A decode step calls it in every linear layer of the model, so what it does besides the products counts: without an
adapter it does nothing, and with some it finds its plan made and their matrices packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from hybrid.engine.cpu_lora import kernel
from hybrid.engine.cpu_lora.pack import Layer, Pack
from hybrid.engine.cpu_lora.plan import Group, Plan, Rows, Wanted


class PackedLoRA(PunicaWrapperCPU):  # type: ignore[misc]
    """Multi-LoRA by a few dense products a layer instead of a gather a token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._few = kernel.load(kernel.given())
        self._layers: dict[int, Layer] = {}
        self._rows: list[int] = []
        self._plan: Plan | None = None
        self._requests = Wanted([])

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Makes the plan of the steps to come. vLLM calls it when rows or slots are others than in the last step."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slots = {number: slot for slot, number in enumerate(lora_index_to_id) if number}
        self._rows = [slots[number] if number else -1 for number in mapping.index_mapping]
        self._requests = Wanted([slots[number] if number else -1 for number in mapping.prompt_mapping])
        self._replan()

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
        """y += scale · B (A x) of each row's own adapter, in place. x [n, in], y [n, Σ output_slices]."""
        plan = self._plan
        if plan is None:
            return
        if y.dim() != 2:
            y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if len(y) != plan.count:  # rows that the plan does not know
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
            return
        layer = self._layer(lora_a_stacked, lora_b_stacked, output_slices)
        if plan.few and self._few is not None:
            if not (layer.fits and x.dtype == y.dtype == torch.bfloat16 and x.stride(1) == y.stride(1) == 1):
                # a model that the kernel cannot compute: never again
                self._few = None
                self._replan()
                self.add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)
                return
            table = layer.table(plan.few)
            self._few(table, plan.tiles, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), scale)
        for group in plan.groups:
            packed = layer.pack(group.slots)
            if packed is not None:
                _multiply(y, x, packed, group, scale)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """y += B x of each row's own adapter, in place. x [n, max_rank] is what A holds for each row's token.

        Rows without an adapter stay as they are; vLLM's own adds the last slot's to them.
        """
        plan = self._plan
        if plan is None:
            return
        for slot in plan.by_slot:
            b = lora_b_stacked[slot, 0]
            if b.any():
                rows = plan.rows(slot)
                own = _of(y, rows)
                own.addmm_(_of(x, rows), b.T)
                _back(y, rows, own)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y += scale · B (A x) of each request's own adapter, in place. x [n, hidden], y [n, vocabulary].

        The log-probabilities of a prompt have a row a token, and nothing says whose: asked for beside other requests,
        they end the engine with vLLM's own product (vllm-project/vllm#16668). Such rows stay the base's here; an
        adapter that touches the output head does not pass preflight.
        """
        wanted = self._requests
        if not wanted.by_slot or wanted.count != len(y):
            return
        size = lora_b_stacked.shape[2]
        layer = self._layer((lora_a_stacked,), (lora_b_stacked,), (size,))
        for slot in wanted.by_slot:
            packed = layer.pack((slot,))
            if packed is not None:
                _multiply(y[:, :size], x, packed, Group((slot,), wanted.rows(slot)), scale)

    def _layer(self, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], sizes: Sequence[int]) -> Layer:
        """What is kept of a layer, without what has been overwritten since."""
        layer = self._layers.get(id(a[0]))
        if layer is None:
            layer = self._layers[id(a[0])] = Layer(a, b, sizes)
        layer.refresh()
        return layer

    def _replan(self) -> None:
        wanted = any(slot >= 0 for slot in self._rows)
        self._plan = Plan(self._rows, self._few is not None) if wanted else None


def _multiply(y: torch.Tensor, x: torch.Tensor, packed: Pack, group: Group, scale: float) -> None:
    own = _of(y, group.rows)
    hidden = group.masked(torch.mm(_of(x, group.rows), packed.a.T), packed.owners)
    for part in packed.slices:
        own[:, part.columns].addmm_(hidden[:, part.rows], part.bt, alpha=scale)
    _back(y, group.rows, own)


def _of(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Some rows: a view where they lie together, else a copy."""
    return tensor if rows is None else tensor[rows]


def _back(y: torch.Tensor, rows: Rows, own: torch.Tensor) -> None:
    """Writes a copy of some rows back; a view was written in place."""
    if isinstance(rows, torch.Tensor):
        y.index_copy_(0, rows, own)
