"""A run that is killed, paused, starved of disk or shared by processes ends where an undisturbed one ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import hybrid
from safetensors.torch import load_file
from training_kit import two_processes, write_colours

from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training.checkpoints import STATE, TENSORS, Checkpoints
from hybrid.training.control import RUN, Control, Stopped, Wanted
from hybrid.training.recipes import parse_sets
from hybrid.training.run import train

SETS = ["rank=4", "alpha=8", "learning_rate=1e-2", "batch_size=8", "precision=float32", "epochs=20", "early_stop=false"]
ARGUMENTS = [word for pair in SETS for word in ("--set", pair)]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "colours"
    folder.mkdir()
    return write_colours(folder, train=(0, 64), dev=(100, 12))


@pytest.fixture
def home(tmp_path: Path, tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRID_MODEL", str(tiny.path))
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    monkeypatch.setenv("HYBRID_TRAINING__CHECKPOINT_S", "0")  # one after every step
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(task: Path, tiny: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run comes to when nothing happens to it."""
    home = tmp_path_factory.mktemp("calm")
    env = {**os.environ, "HYBRID_MODEL": str(tiny.path), "HYBRID_HOME": str(home)}
    argv = [sys.executable, "-m", "hybrid.cli", "train", str(task), "--json", *ARGUMENTS]
    done = subprocess.run(argv, env=env, cwd=home, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"home": home}


def start(home: Path, task: Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "hybrid.cli", "train", str(task), "--json", "--progress-json", *ARGUMENTS]
    return subprocess.Popen(argv, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], step: int) -> Mapping[str, Any]:
    """Reads progress until a step is reached."""
    assert process.stdout is not None
    for line in process.stdout:
        told = json.loads(line)
        if told.get("step", 0) >= step:
            return told
    raise AssertionError(process.communicate()[1])


def finish(home: Path, task: Path) -> dict[str, Any]:
    return json.loads(hybrid(home, "train", str(task), "--json", *ARGUMENTS).stdout.splitlines()[-1])


def weights(told: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(told["path"]) / "adapter_model.safetensors")


def assert_same_run(told: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for key in ("steps", "tokens", "best_step"):
        assert told["metrics"][key] == other["metrics"][key], key
    for key in ("dev_loss", "train_loss"):
        assert told["metrics"][key] == pytest.approx(other["metrics"][key], rel=1e-3, abs=1e-4), key
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(told)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_D7_a_run_killed_again_and_again_ends_where_an_undisturbed_one_ends(
    home: Path, task: Path, undisturbed: dict[str, Any]
) -> None:
    """Kills at random moments, most of them inside a save, since every step saves; then a torn checkpoint."""
    dice = random.Random(7)
    for reach in (20, 100):
        process = start(home, task)
        read_until(process, reach)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        process.communicate()
    newest = sorted((home / ".hybrid" / "training").glob("*/checkpoints/step-*"))[-1]
    (newest / TENSORS).write_bytes((newest / TENSORS).read_bytes()[:-100])
    (newest.parent / ".staging-left").mkdir()
    told = finish(home, task)
    assert told["metrics"]["resumed_from"] >= 95
    assert_same_run(told, undisturbed)
    assert not list((home / ".hybrid" / "training").glob("*/checkpoints"))


def test_an_interrupt_saves_and_the_same_command_goes_on_but_not_twice_at_once(
    home: Path, task: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_TRAINING__CHECKPOINT_S", "3600")
    process = start(home, task)
    read_until(process, 30)
    argv = [sys.executable, "-m", "hybrid.cli", "train", str(task), "--json", *ARGUMENTS]
    process.send_signal(signal.SIGSTOP)  # or it might be done before the second has started
    second = subprocess.run(argv, cwd=home, capture_output=True, text=True, check=False)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "same command" in words
    assert second.returncode == 1
    assert "Another process is training" in second.stderr
    assert not list((home / "adapters").rglob("*.safetensors"))
    told = finish(home, task)
    assert told["metrics"]["resumed_from"] >= 30
    assert_same_run(told, undisturbed)


def test_fresh_starts_anew_and_a_cancelled_run_leaves_nothing_served(home: Path, task: Path, tiny: ModelFiles) -> None:
    settings = Settings.load()
    store = AdapterStore(settings.rooms, State(settings.rooms.database))
    embedding = materialise(DEFAULT_EMBEDDER, settings.cache)

    def run(control: Control, *, fresh: bool = False) -> Any:
        return train(
            task, settings=settings, name=None, overrides=parse_sets(SETS), progress=lambda **_: None, store=store,
            embedder=Embedder(embedding.path, embedding.name), model=tiny, control=control, fresh=fresh,
        )  # fmt: skip

    class After:
        def __init__(self, steps: int, then: Wanted) -> None:
            self.left, self.then = steps, then

        def wanted(self) -> Wanted:
            self.left -= 1
            return "run" if self.left >= 0 else self.then

    for then in ("pause", "cancel"):
        with pytest.raises(Stopped) as stopped:
            run(After(7, then))
        assert stopped.value.wanted == then
    assert stopped.value.step == 14  # it went on from the pause
    assert store.versions() == []
    assert run(RUN, fresh=True).metrics["resumed_from"] == 0


def test_two_processes_make_the_steps_that_one_makes(
    home: Path, task: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallel under accelerate: the same losses, up to the order of additions."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = two_processes("-m", "hybrid.cli", "train", str(task), "--json", *ARGUMENTS)
    done = subprocess.run(argv, cwd=home, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("steps", "tokens"):
        assert told["metrics"][key] == undisturbed["metrics"][key]
    assert told["metrics"]["dev_loss"] == pytest.approx(undisturbed["metrics"]["dev_loss"], rel=0.02, abs=2e-3)
    assert len(list((home / "adapters" / "colours").glob("*/card.json"))) == 1


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from hybrid.errors import SetupError
from hybrid.training.checkpoints import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"w": torch.ones(1000)}, {"report": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # from here on no file can grow larger
try:
    checkpoints.save(2, {"w": torch.ones(1_000_000)}, {"report": 2})
except SetupError as error:
    print(error.message)
"""


def test_D2_a_full_disk_is_an_error_that_says_so_and_spoils_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "free space" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert (found.step, found.state["report"]) == (1, 1)


@pytest.mark.parametrize("harm", ["state", "tensors", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": torch.full((4,), float(step))}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    newest = tmp_path / "step-00000003"
    if harm == "state":
        (newest / STATE).write_text("{")
    elif harm == "tensors":
        data = bytearray((newest / TENSORS).read_bytes())
        data[-1] ^= 1
        (newest / TENSORS).write_bytes(data)
    else:
        (newest / TENSORS).unlink()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 2
    assert found.tensors["w"].tolist() == [2.0] * 4
    shutil.rmtree(tmp_path / "step-00000002")
    assert checkpoints.newest() is None
