"""The packed LoRA products equal LoRA's definition, row by row, whatever the batch looks like."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.engine.cpu_lora.wrapper import PackedLoRA

SLOTS, MAX_RANK, WIDTH = 4, 64, 48
SIZES = {"o": (40,), "qkv": (48, 16, 16), "gate_up": (64, 64)}


@dataclass
class Mapping:
    """What vLLM passes: a LoRA id a token (0: none) and a request."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool


Stack = tuple[torch.Tensor, ...]


def stacked(sizes: tuple[int, ...], ranks: list[int], seed: int) -> tuple[Stack, Stack]:
    """vLLM's zero-padded stacks for adapters of these ranks, one a slot; rank 0 leaves a layer untouched."""
    make = torch.Generator().manual_seed(seed)
    a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, WIDTH, dtype=torch.bfloat16) for _ in sizes)
    b = tuple(torch.zeros(SLOTS, 1, size, MAX_RANK, dtype=torch.bfloat16) for size in sizes)
    for slot, rank in enumerate(ranks):
        for i, size in enumerate(sizes):
            a[i][slot, 0, :rank] = torch.randn(rank, WIDTH, generator=make) / WIDTH**0.5
            b[i][slot, 0, :, :rank] = torch.randn(size, rank, generator=make) / max(rank, 1) ** 0.5
    return a, b


def by_definition(y, x, a, b, sizes, wanted):
    """y + x Aᵀ Bᵀ of each row's own adapter, in float32."""
    out = y.float().clone()
    for row, slot in enumerate(wanted):
        offset = 0
        for i, size in enumerate(sizes):
            if slot >= 0:
                out[row, offset : offset + size] += b[i][slot, 0].float() @ (a[i][slot, 0].float() @ x[row].float())
            offset += size
    return out


def wrapper() -> PackedLoRA:
    return PackedLoRA(4096, 256, torch.device("cpu"))


def plan(punica: PackedLoRA, wanted: list[int], ids: list[int | None], prefill: bool = True) -> None:
    tokens = tuple(ids[slot] or 0 if slot >= 0 else 0 for slot in wanted)
    punica.update_metadata(Mapping(tokens, tokens, prefill), ids, SLOTS, 100)


batches = st.one_of(
    st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24),
    # chunked prefill beside decodes: long runs and single rows
    st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 60)), min_size=1, max_size=5).map(
        lambda runs: [slot for slot, n in runs for _ in range(n)]
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    wanted=batches,
    ranks=st.lists(st.sampled_from([0, 1, 2, 8, 16, 33, 64]), min_size=SLOTS, max_size=SLOTS),
    layer=st.sampled_from(sorted(SIZES)),
    prefill=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equal_to_the_definition(wanted: list[int], ranks: list[int], layer: str, prefill: bool, seed: int) -> None:
    sizes = SIZES[layer]
    a, b = stacked(sizes, ranks, seed)
    make = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(len(wanted), WIDTH, generator=make).bfloat16()
    y = torch.randn(len(wanted), sum(sizes), generator=make).bfloat16()
    expected = by_definition(y, x, a, b, sizes, wanted)
    punica = wrapper()
    plan(punica, wanted, [11, 12, 13, 14], prefill)
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.06)


def test_rows_without_an_adapter_are_untouched_to_the_bit() -> None:
    a, b = stacked(SIZES["qkv"], [8, 8, 8, 8], 0)  # the last slot is taken: index -1 must not read it
    y = torch.randn(6, sum(SIZES["qkv"])).bfloat16()
    before = y.clone()
    punica = wrapper()
    plan(punica, [-1, 3, -1, 0, -1, -1], [1, 2, 3, 4], prefill=False)
    punica.add_lora_linear(y, torch.randn(6, WIDTH).bfloat16(), a, b, 1.0, SIZES["qkv"])
    assert torch.equal(y[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    assert not torch.equal(y[[1, 3]], before[[1, 3]])


def test_a_slot_taken_over_by_another_adapter_serves_the_new_one() -> None:
    sizes = SIZES["o"]
    a, b = stacked(sizes, [8, 8, 8, 8], 0)
    x = torch.randn(3, WIDTH).bfloat16()
    punica = wrapper()
    plan(punica, [1, 1, 1], [1, 2, 3, 4], prefill=False)
    punica.add_lora_linear(torch.zeros(3, 40).bfloat16(), x, a, b, 1.0, sizes)
    fresh_a, fresh_b = stacked(sizes, [8, 8, 8, 8], 9)
    a[0].copy_(fresh_a[0])
    b[0].copy_(fresh_b[0])
    y = torch.zeros(3, 40).bfloat16()
    plan(punica, [1, 1, 1], [1, 5, 3, 4], prefill=False)
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.float(), by_definition(y * 0, x, a, b, sizes, [1, 1, 1]), rtol=0.03, atol=0.06)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_scale(scale: float) -> None:
    sizes = SIZES["o"]
    a, b = stacked(sizes, [8, 0, 0, 0], 0)
    x = torch.randn(5, WIDTH).bfloat16()
    once, scaled = torch.zeros(5, 40).bfloat16(), torch.zeros(5, 40).bfloat16()
    punica = wrapper()
    plan(punica, [0] * 5, [1, None, None, None])
    punica.add_lora_linear(once, x, a, b, 1.0, sizes)
    punica.add_lora_linear(scaled, x, a, b, scale, sizes)
    torch.testing.assert_close(scaled.float(), once.float() * scale, rtol=0.02, atol=0.02)
