"""What preflight lets through and what it refuses, each with its own reason (rows A1 and A2)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapters_kit import BASE_SHA, HIDDEN, LINEAR, make_adapter, make_base, weights_of
from safetensors.numpy import save_file

from hybrid.adapters.preflight import BaseFacts, check, read_base
from hybrid.errors import Refused, SetupError
from hybrid.models import materialise
from hybrid.settings import DEFAULT_MODEL, Settings

WEIGHTS = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def base(tmp_path: Path) -> BaseFacts:
    return make_base(tmp_path / "base")


def refusal(folder: Path, base: BaseFacts, max_rank: int = 32) -> str:
    with pytest.raises(Refused) as caught:
        check(folder, base, max_rank)
    return caught.value.message


def test_base_facts_are_the_linear_layers(base):
    assert len(base.shapes) == 2 * len(LINEAR)
    assert base.shapes["model.layers.1.mlp.down_proj"] == (HIDDEN, 32)
    assert (base.model_type, base.sha256) == ("llama", BASE_SHA)


def test_base_folder_without_weights_is_a_setup_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SetupError, match="no linear layers"):
        read_base(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_valid_adapter_passes(tmp_path, base, dtype):
    folder = make_adapter(tmp_path / "a", base)
    save_file({k: v.astype(dtype) for k, v in weights_of(base).items()}, folder / WEIGHTS)
    check(folder, base, 32)


def test_harmless_settings_pass(tmp_path, base):
    harmless = {
        "use_rslora": True, "init_lora_weights": "gaussian", "runtime_config": {"ephemeral_gpu_offload": False},
        "peft_version": "0.21.0", "megatron_core": "megatron.core", "some_new_switch": False,
        "target_modules": ".*proj",
    }  # fmt: skip
    check(make_adapter(tmp_path / "a", base, **harmless), base, 32)


def test_adapter_of_some_layers_passes_when_it_says_so(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base, layers_to_transform=[0])
    save_file({k: v for k, v in weights_of(base).items() if ".layers.0." in k}, folder / WEIGHTS)
    check(folder, base, 32)


CONFIGS = {
    "rank_above_limit": ({"r": 1024}, "rank is 1024 and the engine's limit 32"),
    "rank_is_no_number": ({"r": True}, "no positive rank"),
    "alpha_is_no_number": ({"lora_alpha": "16"}, "no number lora_alpha"),
    "dora": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "all"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights"),
    "olora": ({"init_lora_weights": "olora"}, "changes the base's weights"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
    "loha": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no_peft_type": ({"peft_type": None}, "peft_type"),
    "other_task": ({"task_type": "SEQ_CLS"}, "task_type"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "rank_pattern": ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    "qalora": ({"use_qalora": True}, "QALoRA"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "replicates"),
    "token_indices": ({"trainable_token_indices": [1]}, "token embeddings"),
    "unknown_field": ({"velora_config": {"rank": 1}}, "velora_config"),
    "unknown_zero": ({"brand_new_scale": 0}, "brand_new_scale"),
    "no_targets": ({"target_modules": None}, "target_modules"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_A1_config_is_refused_with_its_reason(tmp_path, base, case):
    overrides, reason = CONFIGS[case]
    assert reason in refusal(make_adapter(tmp_path / "a", base, **overrides), base)


@pytest.mark.parametrize("text", [b"r: 8", b"\xff\xfe", b"[" * 100_000, b'{"r": NaN}', b""])
def test_A1_config_not_json(tmp_path, base, text):
    folder = make_adapter(tmp_path / "a", base)
    (folder / "adapter_config.json").write_bytes(text)
    assert "not JSON" in refusal(folder, base)


def test_A1_config_not_an_object(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    (folder / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in refusal(folder, base)


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_A1_missing_file(tmp_path, base, name):
    folder = make_adapter(tmp_path / "a", base)
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder, base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "x.PKL"])
def test_A1_pickles(tmp_path, base, name):
    folder = make_adapter(tmp_path / "a", base)
    (folder / name).write_bytes(b"\x80\x04N.")
    assert "is a pickle" in refusal(folder, base)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_A1_numbers_that_are_none(tmp_path, base, value, dtype):
    folder = make_adapter(tmp_path / "a", base)
    tensors = {k: v.astype(dtype) for k, v in weights_of(base).items()}
    tensors[Q0][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    assert f"tensor '{Q0}' holds NaN or infinity" in refusal(folder, base)


def test_A1_bfloat16_is_read(tmp_path, base):
    """bfloat16 is the upper half of float32; numpy lacks it, so the file is spelled by hand."""
    folder = make_adapter(tmp_path / "a", base)
    halves = {k: (v.view(np.uint32) >> 16).astype("<u2") for k, v in weights_of(base).items()}
    write_raw(folder / WEIGHTS, {k: ("BF16", v) for k, v in halves.items()})
    check(folder, base, 32)
    halves[Q0][0, 0] = 0x7FC0
    write_raw(folder / WEIGHTS, {k: ("BF16", v) for k, v in halves.items()})
    assert "holds NaN" in refusal(folder, base)


def test_A1_whole_numbers_are_no_weights(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    save_file({k: v.astype(np.int8) for k, v in weights_of(base).items()}, folder / WEIGHTS)
    assert "has dtype I8" in refusal(folder, base)


def write_raw(path: Path, tensors: dict[str, tuple[str, np.ndarray]], **lies: object) -> None:
    header, body = {}, b""
    for name, (dtype, array) in tensors.items():
        span = [len(body), len(body) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span} | lies
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated_data": (lambda whole: whole[:-10], "truncated: it ends 10 bytes too early"),
    "truncated_header": (lambda whole: whole[:40], "truncated or forged"),
    "empty": (lambda _: b"", "holds 0 bytes"),
    "ten_gigabytes_declared": (lambda whole: struct.pack("<Q", 10 << 30) + whole[8:], "10,737,418,240 bytes"),
    "trailing_bytes": (lambda whole: whole + b"x", "gaps"),
    "header_not_json": (lambda whole: whole[:8] + b"x" + whole[9:], "not JSON"),
    "header_a_list": (lambda _: struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "header_too_deep": (lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_A1_broken_safetensors(tmp_path, base, case):
    spoil, reason = FILES[case]
    path = make_adapter(tmp_path / "a", base) / WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    assert reason in refusal(path.parent, base)


@pytest.mark.parametrize(
    "lies",
    [
        {"dtype": "F32", "shape": [1 << 40, 1 << 40]},
        {"shape": [-1, -1]},
        {"data_offsets": [0]},
        {"dtype": "Q4"},
        {"data_offsets": [0, 0], "shape": [0]},
    ],
)
def test_A1_headers_that_lie(tmp_path, base, lies):
    folder = make_adapter(tmp_path / "a", base)
    write_raw(folder / WEIGHTS, {k: ("F32", v) for k, v in weights_of(base).items()}, **lies)
    assert "again" in refusal(folder, base)


@pytest.mark.parametrize("where", ["README.md", "deep/er/link"])
def test_A1_symlink(tmp_path, base, where):
    folder = make_adapter(tmp_path / "a", base)
    (folder / where).parent.mkdir(parents=True, exist_ok=True)
    (folder / where).symlink_to("/etc/hostname")
    assert "is a symbolic link" in refusal(folder, base)


def test_A1_folder_that_is_a_symlink(tmp_path, base):
    make_adapter(tmp_path / "a", base)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert "links are not followed" in refusal(tmp_path / "link", base)


def test_A1_pipe(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    os.mkfifo(folder / "pipe")
    assert "not a plain file" in refusal(folder, base)


def test_A2_narrower_base(tmp_path, base):
    narrow = make_base(tmp_path / "narrow", hidden=8)
    reason = refusal(make_adapter(tmp_path / "a", narrow), base)
    assert "model.layers.0" in reason
    assert "another width" in reason


def test_A2_deeper_base(tmp_path, base):
    deep = make_base(tmp_path / "deep", layers=3)
    reason = refusal(make_adapter(tmp_path / "a", deep), base)
    assert "model.layers.2" in reason
    assert "deeper model" in reason


def test_A2_shallower_base(tmp_path, base):
    shallow = make_base(tmp_path / "shallow", layers=1)
    reason = refusal(make_adapter(tmp_path / "a", shallow), base)
    assert "model.layers.1" in reason
    assert "shallower model" in reason


def test_A2_renamed_prefix(tmp_path, base):
    renamed = make_base(tmp_path / "renamed", prefix="language_model.model.")
    assert "no linear layer language_model.model.layers.0" in refusal(make_adapter(tmp_path / "a", renamed), base)


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        (lambda k: k.removeprefix("base_model."), "does not begin with"),
        (lambda k: k.replace(".weight", ".bias"), "not a lora_A or lora_B weight"),
        (lambda k: k.replace(".lora_A.weight", ".lora_A.default.weight"), "not a lora_A or lora_B weight"),
        (lambda k: k.replace("layers.0.self_attn.q_proj", "embed_tokens"), "embeddings"),
    ],
)
def test_A2_keys_that_are_not_the_bases(tmp_path, base, rename, reason):
    folder = make_adapter(tmp_path / "a", base)
    save_file({rename(k): v for k, v in weights_of(base).items()}, folder / WEIGHTS)
    assert reason in refusal(folder, base)


def test_A2_half_a_pair(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    save_file({k: v for k, v in weights_of(base).items() if k != Q0}, folder / WEIGHTS)
    assert "has lora_B and not its other half" in refusal(folder, base)


def test_A2_rank_of_the_file_is_not_that_of_the_config(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    save_file(weights_of(base, rank=64), folder / WEIGHTS)
    assert "at rank 4 needs" in refusal(folder, base)


@pytest.mark.parametrize("key", ["base_sha256", "base_config_sha256"])
def test_A2_card_names_another_base(tmp_path, base, key):
    folder = make_adapter(tmp_path / "a", base)
    (folder / "card.json").write_text(json.dumps({key: "c" * 64}))
    assert "trained on another base model" in refusal(folder, base)


def test_S11_weights_changed_after_publication(tmp_path, base):
    folder = make_adapter(tmp_path / "a", base)
    (folder / "card.json").write_text(json.dumps({"base_sha256": BASE_SHA, "sha256": "0" * 64}))
    assert "not the file its card was written for" in refusal(folder, base)


def test_the_default_model_is_read_and_takes_an_adapter(tmp_path):
    model = materialise(DEFAULT_MODEL, Settings.load().cache)
    base = read_base(model.path, model.sha256)
    assert len(base.shapes) == 30 * len(LINEAR)
    check(make_adapter(tmp_path / "a", base, rank=8), base, 32)
    strange = make_base(tmp_path / "strange", prefix="language_model.model.")
    assert "another architecture" in refusal(make_adapter(tmp_path / "b", strange), base)
