"""Models are materialised whole or not at all, and nothing that brings code is opened."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hybrid.errors import SetupError
from hybrid.models import MANIFEST, ModelFiles, materialise, verify, weights_sha256
from hybrid.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, Settings

Steps = list[tuple[str, int, int]]


def fetch(cache: Path) -> tuple[ModelFiles, Steps]:
    """The small built-in model, and the progress that was told."""
    steps: Steps = []
    files = materialise(DEFAULT_EMBEDDER, cache, lambda *step: steps.append(step))
    return files, steps


def folder_model(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


# --- built-in models -------------------------------------------------------------------------------------------------


def test_a_built_in_model_is_built_once(tmp_path: Path) -> None:
    files, steps = fetch(tmp_path)
    assert files.name == DEFAULT_EMBEDDER
    assert files.sha256 == weights_sha256(files.path)
    assert [done for _, done, _ in steps] == [0, 1, 2, 3]
    assert {total for _, _, total in steps} == {3}
    verify(files)
    again, silence = fetch(tmp_path)
    assert (again, silence) == (files, [])


def test_killed_half_way_the_next_start_finishes(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from hybrid.models import materialise

        def die_at_two(step, done, total):
            if done == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        materialise({DEFAULT_EMBEDDER!r}, Path({str(tmp_path)!r}), die_at_two)
    """)
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert list((tmp_path / "models").glob(".staging-*"))
    files, _ = fetch(tmp_path)
    verify(files)
    assert not list((tmp_path / "models").glob(".staging-*"))


@pytest.mark.parametrize("damage", ["no manifest", "half a file", "a file gone", "manifest cut"])
def test_what_is_not_whole_is_built_anew(tmp_path: Path, damage: str) -> None:
    files, _ = fetch(tmp_path)
    weights, manifest = files.path / "model.safetensors", files.path / MANIFEST
    match damage:
        case "no manifest":
            manifest.unlink()
        case "half a file":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "a file gone":
            (files.path / "tokenizer.json").unlink()
        case "manifest cut":
            manifest.write_text(manifest.read_text()[:50])
    again, steps = fetch(tmp_path)
    assert steps
    verify(again)


def test_a_changed_byte_is_found_by_the_full_check(tmp_path: Path) -> None:
    files, _ = fetch(tmp_path)
    with (files.path / "model.safetensors").open("r+b") as weights:
        weights.seek(5000)
        weights.write(b"\xff\x00\xff")
    with pytest.raises(SetupError, match=r"model\.safetensors is damaged"):
        verify(files)


def test_two_processes_build_one_model(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        from pathlib import Path
        from hybrid.models import materialise
        steps = []
        materialise({DEFAULT_EMBEDDER!r}, Path({str(tmp_path)!r}), lambda *s: steps.append(s))
        print(len(steps))
    """)
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    built = sorted(int(process.communicate()[0]) for process in both)
    assert built == [0, 4]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SetupError, match="HYBRID_CACHE"):
        materialise(DEFAULT_EMBEDDER, tmp_path / "file")


def test_the_default_model_is_ready_to_serve() -> None:
    files = materialise(DEFAULT_MODEL, Settings.load().cache)
    verify(files)
    config = json.loads((files.path / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config["tie_word_embeddings"]) == ("llama", "bfloat16", True)
    assert "<|im_start|>" in (files.path / "chat_template.jinja").read_text()


# --- any other model -------------------------------------------------------------------------------------------------


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = folder_model(tmp_path / "mine")
    files = materialise(str(folder), tmp_path / "cache")
    assert files == ModelFiles("mine", folder, weights_sha256(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    folder = folder_model(tmp_path / "mine")
    first = materialise(str(folder), tmp_path / "cache")
    assert materialise(str(folder), tmp_path / "cache") == first
    (folder / "model.safetensors").write_bytes(b"other weights")
    second = materialise(str(folder), tmp_path / "cache")
    assert second.sha256 != first.sha256
    with pytest.raises(SetupError, match="changed"):
        verify(first)
    (folder / "model-2.safetensors").write_bytes(b"more")
    assert materialise(str(folder), tmp_path / "cache").sha256 not in (first.sha256, second.sha256)


def test_S13_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    folder = folder_model(tmp_path / "evil", {"auto_map": {"AutoModel": "modeling_evil.Evil"}})
    with pytest.raises(SetupError, match="auto_map"):
        materialise(str(folder), tmp_path)
    sly = folder_model(tmp_path / "sly")
    (sly / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tok.Evil", null]}}')
    with pytest.raises(SetupError, match="auto_map"):
        materialise(str(sly), tmp_path)


def test_what_is_no_model_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError, match=r"config\.json"):
        materialise(str(tmp_path / "empty"), tmp_path)
    pickled = folder_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(SetupError, match="safetensors"):
        materialise(str(pickled), tmp_path)


@pytest.mark.parametrize("name", ["nobody/nothing", "SmolLM", "a b c", "../x", ""])
def test_an_unknown_name_says_what_can_be_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError):
        materialise(name, tmp_path)


def test_a_model_in_the_hub_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--ann--tiny"
    folder_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = materialise("ann/tiny", tmp_path)
    assert (files.name, files.path) == ("ann/tiny", repository / "snapshots" / ("a" * 40))
