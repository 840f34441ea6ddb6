"""A model split over two processes learns what one process learns, and its checkpoints and artefacts are the same."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from shard_team import run_all
from tiny_model import make_tiny_model
from training_kit import two_processes
from transformers import AutoModelForCausalLM

from hybrid.errors import BadRequest
from hybrid.models import ModelFiles
from hybrid.training.recipes import load_recipe

COLOURS = ("red", "green", "blue", "grey")
COMMON = {"batch_size": 8, "epochs": 3, "early_stop": False, "precision": "float32", "eval_every": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8, "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 3e-3, "accumulate": 2},
    "last": {"method": "last_layers", "layers": 1, "learning_rate": 1e-2, "precision": "bfloat16"},
    "narrow": {"rank": 3, "alpha": 6, "learning_rate": 1e-2, "precision": "bfloat16"},
}
PAUSED = {"by_two": 2, "by_one": 4}  # steps until the pause
UNTRAINED = 6.5  # nats a token


def runs(task: Path, names: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"task": str(task), "name": name, "recipe": {**COMMON, **RECIPES.get(name, RECIPES["full"]), **more}}
        for name in names
    ]


def paused(task: Path, name: str, **more: Any) -> dict[str, Any]:
    return {**runs(task, [name], **more)[0], "steps": PAUSED[name]}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 rows in batches of 8: one batch leaves a process without rows. Some are long: shares differ in passes."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    folder.mkdir()
    for split, start, count in (("train", 0, 25), ("dev", 100, 9)):
        rows = [
            {
                "id": f"{split}{n}",
                "input": f"item {n} is {COLOURS[n % 4]}" + "!" * (300 if n % 5 == 0 else n % 7),
                "reference": COLOURS[n % 4],
            }
            for n in range(start, start + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home: Path, tiny: ModelFiles) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYBRID_MODEL", str(tiny.path))
        patch.setenv("HYBRID_HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def split(environment: None, home: Path, tiny: ModelFiles, task: Path) -> dict[str, Any]:
    """What two processes come to, by run; one of the runs was begun by one process, one is left for it to end."""
    assert run_all(home, tiny, [paused(task, "by_one")])[0]["error"] == "stopped"
    names = [*RECIPES, "by_two", "by_one"]
    wanted = runs(task, names, shard=True)
    wanted[names.index("by_two")]["steps"] = PAUSED["by_two"]
    program = str(Path(__file__).with_name("shard_team.py"))
    argv = two_processes(program, str(home), str(tiny.path), json.dumps(wanted))
    done = subprocess.run(argv, cwd=home, env=os.environ.copy(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(zip(names, json.loads((home / "results.json").read_text()), strict=True))


@pytest.fixture(scope="module")
def whole(split: dict[str, Any], home: Path, tiny: ModelFiles, task: Path) -> dict[str, Any]:
    """What one process comes to; it ends the run that two began."""
    names = [*RECIPES, "by_two"]
    return dict(zip(names, run_all(home, tiny, runs(task, names)), strict=True))


def assert_same(told: dict[str, Any], other: dict[str, Any], near: float) -> None:
    for key in ("steps", "tokens", "trained_parameters", "dev_rows"):
        assert told[key] == other[key], key
    for key in ("dev_loss", "train_loss", "gap"):
        assert told[key] == pytest.approx(other[key], abs=near), key


@pytest.mark.parametrize(("name", "near"), [("lora", 2e-3), ("full", 2e-3), ("last", 0.05), ("narrow", 0.05)])
def test_a_split_model_learns_what_a_whole_one_learns(
    split: dict[str, Any], whole: dict[str, Any], name: str, near: float
) -> None:
    assert whole[name]["dev_loss"] < UNTRAINED - 1  # it learned something that could differ
    assert_same(split[name], whole[name], near)


def test_a_checkpoint_of_one_is_ended_by_two_and_the_other_way_round(
    split: dict[str, Any], whole: dict[str, Any]
) -> None:
    assert split["by_two"]["error"] == "stopped"
    for told, name in ((split, "by_one"), (whole, "by_two")):
        assert told[name]["resumed_from"] == PAUSED[name]
        assert_same(told[name], whole["full"], 2e-3)


def test_what_a_team_saves_opens_with_the_usual_libraries(
    split: dict[str, Any], whole: dict[str, Any], tiny: ModelFiles
) -> None:
    """And holds the weights that one process saves."""
    base = AutoModelForCausalLM.from_pretrained(tiny.path)
    assert PeftModel.from_pretrained(base, split["lora"]["path"]).peft_config["default"].r == 4
    model = AutoModelForCausalLM.from_pretrained(Path(split["full"]["path"]) / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]
    for name, file in (("lora", "adapter_model.safetensors"), ("full", "model/model.safetensors")):
        ours, theirs = (load_file(Path(told[name]["path"]) / file) for told in (split, whole))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=5e-3, msg=key)


def test_one_process_cannot_split_and_is_told_how_to_be_more(
    environment: None, home: Path, tiny: ModelFiles, task: Path
) -> None:
    (told,) = run_all(home, tiny, runs(task, ["lora"], shard=True))
    assert told["error"] == BadRequest.code
    assert "accelerate launch --multi_gpu --num_processes 2" in told["message"]


def test_methods_that_nothing_splits_say_so() -> None:
    with pytest.raises(BadRequest, match="has no such knob; it is for lora"):
        load_recipe(None, {"method": "dpo", "shard": True})
