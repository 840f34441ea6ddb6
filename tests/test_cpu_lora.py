"""The packed LoRA products equal LoRA's definition, PEFT's layers and vLLM's own, whatever the batch looks like."""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from hybrid.engine.cpu_lora import PLUGIN, TESTED, WRAPPER, kernel, wrapper_for
from hybrid.engine.cpu_lora.wrapper import PackedLoRA
from hybrid.engine.open import vllm_command
from hybrid.errors import SetupError
from hybrid.models import ModelFiles
from hybrid.settings import Settings

SLOTS, MAX_RANK, WIDTH = 4, 64, 48
#: one slice, three and two; sizes that are whole strips of the kernel's, and that are not
SIZES = {"o": (40,), "qkv": (48, 16, 16), "gate_up": (64, 64), "down": (200,)}
CLOSE = {"rtol": 0.03, "atol": 0.06}


@dataclass
class Mapping:
    """What vLLM passes: a LoRA id a token (0: none) and a request."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool


Stack = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The kernel, as this machine's compiler makes it."""
    return kernel.build(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=["kernel", "pytorch"])
def environment(request: pytest.FixtureRequest, made: Path | None) -> Iterator[None]:
    """Both ways of computing: what the gateway tells the engine's processes, or nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernel.VARIABLE, raising=False)
        if request.param == "kernel" and made:
            patch.setenv(kernel.VARIABLE, str(made))
        yield


def stacked(
    sizes: tuple[int, ...], ranks: list[int], seed: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Stack, Stack]:
    """vLLM's zero-padded stacks for adapters of these ranks, one a slot; rank 0 leaves a layer untouched."""
    make = torch.Generator().manual_seed(seed)
    a = tuple(torch.zeros(SLOTS, 1, MAX_RANK, WIDTH, dtype=dtype) for _ in sizes)
    b = tuple(torch.zeros(SLOTS, 1, size, MAX_RANK, dtype=dtype) for size in sizes)
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


def plan(punica: PunicaWrapperCPU, wanted: list[int], ids: list[int | None], prefill: bool = True) -> None:
    tokens = tuple(ids[slot] or 0 if slot >= 0 else 0 for slot in wanted)
    punica.update_metadata(Mapping(tokens, tokens, prefill), ids, SLOTS + 1, 100)


def rows(count: int, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


batches = st.one_of(
    st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24),
    # chunked prefill beside decodes: long runs and single rows
    st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 90)), min_size=1, max_size=5).map(
        lambda runs: [slot for slot, n in runs for _ in range(n)]
    ),
)
ranks_of_slots = st.lists(st.sampled_from([0, 1, 2, 8, 16, 33, 64]), min_size=SLOTS, max_size=SLOTS)


@settings(max_examples=40, deadline=None)
@given(wanted=batches, ranks=ranks_of_slots, layer=st.sampled_from(sorted(SIZES)), seed=st.integers(0, 1000))
def test_equal_to_the_definition(environment: None, wanted: list[int], ranks: list[int], layer: str, seed: int) -> None:
    sizes = SIZES[layer]
    a, b = stacked(sizes, ranks, seed)
    x, y = rows(len(wanted), WIDTH, seed + 1), rows(len(wanted), sum(sizes), seed + 2)
    expected = by_definition(y, x, a, b, sizes, wanted)
    punica = wrapper()
    plan(punica, wanted, [11, 12, 13, 14])
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.float(), expected, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(
    wanted=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=24),
    ranks=ranks_of_slots,
    layer=st.sampled_from(sorted(SIZES)),
    prefill=st.booleans(),
)
def test_equal_to_vllms_own(environment: None, wanted: list[int], ranks: list[int], layer: str, prefill: bool) -> None:
    """Every row with an adapter: to rows without one vLLM's own adds the last slot's."""
    sizes = SIZES[layer]
    a, b = stacked(sizes, ranks, 3)
    x, base = rows(len(wanted), WIDTH, 1), rows(len(wanted), sum(sizes), 2)
    found = []
    for punica in (wrapper(), PunicaWrapperCPU(4096, 256, torch.device("cpu"))):
        y = base.clone()
        plan(punica, wanted, [11, 12, 13, 14], prefill)
        punica.add_lora_linear(y, x, a, b, 1.0, sizes)
        found.append(y.float())
    torch.testing.assert_close(*found, **CLOSE)


def test_equal_to_pefts_layers(environment: None) -> None:
    """The modules of a block, as PEFT computes them in bfloat16 and as vLLM fuses them."""
    from peft import LoraConfig, get_peft_model

    names = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj"), "o": ("o_proj",)}
    torch.manual_seed(0)
    for layer, parts in names.items():
        sizes = SIZES[layer]
        block = torch.nn.ModuleDict(
            {name: torch.nn.Linear(WIDTH, n, bias=False) for name, n in zip(parts, sizes, strict=True)}
        )
        config = LoraConfig(r=12, lora_alpha=18, target_modules=list(parts), init_lora_weights=False)
        block = get_peft_model(block, config).to(torch.bfloat16).base_model.model
        a, b = stacked(sizes, [0] * SLOTS, 0)
        for i, name in enumerate(parts):
            a[i][2, 0, :12] = block[name].lora_A["default"].weight.data
            b[i][2, 0, :, :12] = block[name].lora_B["default"].weight.data * block[name].scaling["default"]
        x = rows(30, WIDTH, 4)
        with torch.no_grad():
            y = torch.cat([block[name].base_layer(x) for name in parts], dim=1)
            expected = torch.cat([block[name](x) for name in parts], dim=1)
        punica = wrapper()
        plan(punica, [2] * 30, [None, None, 7, None])
        punica.add_lora_linear(y, x, a, b, 1.0, sizes)
        torch.testing.assert_close(y.float(), expected.float(), **CLOSE)


def test_rows_without_an_adapter_are_untouched_to_the_bit(environment: None) -> None:
    a, b = stacked(SIZES["qkv"], [8, 8, 8, 8], 0)  # the last slot is taken: index -1 must not read it
    y = rows(6, sum(SIZES["qkv"]), 0)
    before = y.clone()
    punica = wrapper()
    plan(punica, [-1, 3, -1, 0, -1, -1], [1, 2, 3, 4], prefill=False)
    punica.add_lora_linear(y, rows(6, WIDTH, 1), a, b, 1.0, SIZES["qkv"])
    assert torch.equal(y[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    assert not torch.equal(y[[1, 3]], before[[1, 3]])


@pytest.mark.parametrize("again", [[1, 5, 3, 4], [1, 2, 3, 4]], ids=["another id", "the same id"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_slot_that_is_written_to_serves_what_it_holds_now(
    environment: None, again: list[int | None], mode: type[torch.no_grad]
) -> None:
    """Evicted and taken over, or loaded in place: vLLM copies into the same tensors, between steps or inside one."""
    sizes = SIZES["qkv"]
    a, b = stacked(sizes, [8, 8, 8, 8], 0)
    x = rows(3, WIDTH, 0)
    punica = wrapper()
    plan(punica, [1, 1, 1], [1, 2, 3, 4], prefill=False)
    punica.add_lora_linear(torch.zeros(3, sum(sizes)).bfloat16(), x, a, b, 1.0, sizes)
    for kept, fresh in zip(
        (*a, *b), (part for stack in stacked(sizes, [8, 16, 8, 8], 9) for part in stack), strict=True
    ):
        with mode():
            kept[1] = 0
            kept[1].copy_(fresh[1])
    y = torch.zeros(3, sum(sizes)).bfloat16()
    plan(punica, [1, 1, 1], again, prefill=False)
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.float(), by_definition(y * 0, x, a, b, sizes, [1, 1, 1]), **CLOSE)


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("count", [5, 100])
def test_scale(environment: None, scale: float, count: int) -> None:
    sizes = SIZES["o"]
    a, b = stacked(sizes, [8, 0, 0, 0], 0)
    x = rows(count, WIDTH, 0)
    once, scaled = torch.zeros(count, 40).bfloat16(), torch.zeros(count, 40).bfloat16()
    punica = wrapper()
    plan(punica, [0] * count, [1, None, None, None])
    punica.add_lora_linear(once, x, a, b, 1.0, sizes)
    punica.add_lora_linear(scaled, x, a, b, scale, sizes)
    torch.testing.assert_close(scaled.float(), once.float() * scale, rtol=0.02, atol=0.02)


def test_parts_of_wider_tensors_are_computed_where_they_lie(environment: None) -> None:
    """Attention hands out views: rows that are further apart than they are wide."""
    sizes = SIZES["o"]
    a, b = stacked(sizes, [8, 0, 0, 0], 0)
    wide_x, wide_y = rows(6, 2 * WIDTH, 0), rows(6, 100, 1)
    x, y = wide_x[:, WIDTH:], wide_y[:, 20:60]
    expected, beside = by_definition(y, x, a, b, sizes, [0, -1, 0, 0, -1, 0]), wide_y[:, 60:].clone()
    punica = wrapper()
    plan(punica, [0, -1, 0, 0, -1, 0], [1, None, None, None])
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y.float(), expected, **CLOSE)
    assert torch.equal(wide_y[:, 60:], beside)


def test_a_model_in_float32_is_computed_too(environment: None) -> None:
    sizes = SIZES["qkv"]
    a, b = stacked(sizes, [8, 3, 0, 64], 0, torch.float32)
    wanted = [0, 3, -1, 1, 2, 0]
    x, y = rows(6, WIDTH, 0, torch.float32), rows(6, sum(sizes), 1, torch.float32)
    expected = by_definition(y, x, a, b, sizes, wanted)
    punica = wrapper()
    plan(punica, wanted, [1, 2, 3, 4])
    punica.add_lora_linear(y, x, a, b, 1.0, sizes)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_none_stay_so(environment: None) -> None:
    """What a broken adapter computes must be seen by the canary."""
    a, b = stacked(SIZES["o"], [8, 0, 0, 0], 0)
    b[0][0, 0, 5, 0] = float("nan")
    y = rows(3, 40, 0)
    punica = wrapper()
    plan(punica, [0, 0, 0], [1, None, None, None])
    punica.add_lora_linear(y, rows(3, WIDTH, 1), a, b, 1.0, SIZES["o"])
    assert y[:, 5].isnan().all()
    assert not y[:, [*range(5), *range(6, 40)]].isnan().any()


@settings(max_examples=20, deadline=None)
@given(wanted=st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=12))
def test_embeddings_and_the_head_are_each_rows_own(environment: None, wanted: list[int]) -> None:
    a, b = stacked((60,), [8, 16, 0, 5], 0)
    punica = wrapper()
    plan(punica, wanted, [11, 12, 13, 14])
    # vLLM looks A up by the row's token and adapter before it asks for the rest
    looked_up, y = rows(len(wanted), MAX_RANK, 1), rows(len(wanted), 60, 2)
    expected = y.float().clone()
    for row, slot in enumerate(wanted):
        if slot >= 0:
            expected[row] += b[0][slot, 0].float() @ looked_up[row].float()
    punica.add_lora_embedding(y, looked_up, b[0], add_input=True)
    torch.testing.assert_close(y.float(), expected, rtol=0.03, atol=0.15)
    # the logits, wider than the vocabulary where it is padded
    x, logits = rows(len(wanted), WIDTH, 3), rows(len(wanted), 64, 4)
    expected = by_definition(logits[:, :60], x, a, b, (60,), wanted)
    padding = logits[:, 60:].clone()
    punica.add_lora_logits(logits, x, a[0], b[0], 1.0)
    torch.testing.assert_close(logits[:, :60].float(), expected, **CLOSE)
    assert torch.equal(logits[:, 60:], padding)


def test_rows_that_nobody_can_tell_apart_keep_the_bases_logits(environment: None) -> None:
    """The log-probabilities of a prompt: a row a token, in a step of two requests."""
    a, b = stacked((60,), [8, 16, 0, 5], 0)
    punica = wrapper()
    plan(punica, [0, 1], [11, 12, 13, 14])
    logits = rows(9, 60, 0)
    before = logits.clone()
    punica.add_lora_logits(logits, rows(9, WIDTH, 1), a[0], b[0], 1.0)
    assert torch.equal(logits, before)


def test_a_step_without_adapters_after_one_with_does_nothing(environment: None) -> None:
    a, b = stacked(SIZES["o"], [8, 8, 8, 8], 0)
    y = rows(4, 40, 0)
    before = y.clone()
    punica = wrapper()
    plan(punica, [0, 1, 2, 3], [1, 2, 3, 4])
    plan(punica, [-1] * 4, [1, 2, 3, 4])
    punica.add_lora_linear(y, rows(4, WIDTH, 1), a, b, 1.0, SIZES["o"])
    assert torch.equal(y, before)


# --- where it is used, and where not ---------------------------------------------------------------------------------


def test_another_vllm_keeps_its_own_path_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vllm.hybrid.cpu_lora"):
        assert wrapper_for(f"{TESTED[0]}7", "theirs") == WRAPPER
        assert not caplog.records
        for release in ("0.31.2", "0.320.0", "1.0"):
            caplog.clear()
            assert wrapper_for(release, "theirs") == "theirs"
            assert [release in record.getMessage() for record in caplog.records] == [True]


def launch(home: Path, **engine) -> dict[str, str]:
    """The environment of the engine's processes."""
    folder = home / "tiny"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"max_position_embeddings": 1024}')
    chosen = Settings.load(home=home, cache=home / "cache", engine=engine)
    return vllm_command(chosen, ModelFiles("tiny", folder, "00"), lambda: ())[1]


def test_one_setting_turns_it_off(tmp_path: Path) -> None:
    assert PLUGIN in launch(tmp_path)["VLLM_PLUGINS"].split(",")
    off = launch(tmp_path, cpu_lora=False)
    assert PLUGIN not in off["VLLM_PLUGINS"].split(",")
    assert off["VLLM_PLUGINS"]  # the one that ties the engine to the gateway stays
    assert kernel.VARIABLE not in off


def test_settings_of_the_machine_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with pytest.raises(SetupError, match="intel-openmp"):
        launch(tmp_path, openmp="intel", cpu_lora=False)
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    told = launch(tmp_path, openmp="intel", reserved_cores=0, cpu_lora=False)
    assert (told["LD_PRELOAD"], told["VLLM_CPU_NUM_OF_RESERVED_CPU"]) == (str(library), "0")
    assert not {"LD_PRELOAD", "VLLM_CPU_NUM_OF_RESERVED_CPU"} & set(launch(tmp_path, cpu_lora=False))


def test_the_kernel_is_made_once_and_never_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path | None
) -> None:
    if shutil.which("c++") and platform.system() == "Linux":
        assert made is not None
        stamp = made.stat().st_mtime_ns
        assert kernel.build(made.parent.parent) == made
        assert made.stat().st_mtime_ns == stamp
    monkeypatch.setattr(kernel, "FLAGS", ("-no-such-flag",))
    assert kernel.build(tmp_path / "refused") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernel.build(tmp_path / "no-compiler") is None
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    assert kernel.load(broken) is None
    assert kernel.load(None) is None
