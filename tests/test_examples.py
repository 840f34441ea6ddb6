"""Shelves: examples keep their vectors, in an adapter's folder or in the cache of a task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import DataError
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf

INSTRUCTION = "Name the colour."
PAIRS = [("a ripe banana", "yellow"), ("fresh grass", "green"), ("a clear sky at noon", "blue"), ("coal", "black")]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"name": "colours", "instruction": INSTRUCTION}))
    rows = [{"id": str(i), "input": text, "reference": answer, "meta": {}} for i, (text, answer) in enumerate(PAIRS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_task_folder_becomes_a_shelf_of_full_messages(task: Path, embedder: Embedder, tmp_path: Path) -> None:
    shelf = Shelf.open(task, embedder, tmp_path / "cache")
    assert shelf.name == "colours"
    assert shelf.messages[0] == f"{INSTRUCTION}\n\na ripe banana"
    assert shelf.vectors.shape == shelf.bare.shape == (4, embedder.dim)
    [first, second] = shelf.nearest(embedder.embed_query(f"{INSTRUCTION}\n\nthe lawn in May"), 2)
    assert first[:2] == (f"{INSTRUCTION}\n\nfresh grass", "green")
    assert 1 >= first[2] >= second[2]
    assert shelf.bare[1] @ embedder.embed_query("fresh grass") > 0.999
    assert shelf.nearest(shelf.vectors[0], 0) == []


def test_vectors_are_made_once_and_kept(task: Path, embedder: Embedder, tmp_path: Path) -> None:
    first = Shelf.open(task, embedder, tmp_path / "cache")
    [kept] = (tmp_path / "cache").rglob("*.safetensors")
    made = kept.stat().st_mtime_ns
    again = Shelf.open(task, embedder, tmp_path / "cache")
    assert kept.stat().st_mtime_ns == made
    assert np.array_equal(first.vectors, again.vectors)
    with (task / "train.jsonl").open("a") as file:
        file.write(json.dumps({"input": "snow", "reference": "white"}) + "\n")
    assert len(Shelf.open(task, embedder, tmp_path / "cache").vectors) == 5


def test_an_adapter_s_folder_gives_back_what_was_written(task: Path, embedder: Embedder, tmp_path: Path) -> None:
    shelf = Shelf.open(task, embedder, tmp_path / "cache")
    version = tmp_path / "tints" / "3"
    version.mkdir(parents=True)
    shelf.write(version)
    found = Shelf.open(version, embedder, tmp_path / "unused")
    assert found.name == "tints"
    assert (found.messages, found.answers) == (shelf.messages, shelf.answers)
    assert np.array_equal(found.vectors, shelf.vectors)
    assert np.array_equal(found.bare, shelf.bare)
    assert not (tmp_path / "unused").exists()


def test_vectors_of_another_embedder_are_made_again(task: Path, embedder: Embedder, tmp_path: Path) -> None:
    shelf = Shelf.open(task, embedder, tmp_path / "cache")
    version = tmp_path / "tints" / "1"
    version.mkdir(parents=True)
    Shelf("x", shelf.messages, shelf.answers, np.ones((4, 7), np.float32), np.ones((4, 7), np.float32)).write(version)
    assert Shelf.open(version, embedder, tmp_path / "cache").vectors == pytest.approx(shelf.vectors, abs=2e-2)
    (version / "examples.safetensors").unlink()
    assert Shelf.open(version, embedder, tmp_path / "cache").messages == shelf.messages
    # where the card tells the instruction, what a person asks who does not know it is known again
    (version / "card.json").write_text(json.dumps({"instruction": INSTRUCTION}))
    assert Shelf.open(version, embedder, tmp_path / "cache").bare == pytest.approx(shelf.bare, abs=2e-2)


def test_damage_is_told_with_file_and_line(task: Path, embedder: Embedder, tmp_path: Path) -> None:
    version = tmp_path / "tints" / "1"
    version.mkdir(parents=True)
    Shelf.open(task, embedder, tmp_path / "cache").write(version)
    tensors = (version / "examples.safetensors").read_bytes()
    (version / "examples.safetensors").write_bytes(tensors[:-100])
    with pytest.raises(DataError, match=r"examples\.safetensors cannot be read"):
        Shelf.open(version, embedder, tmp_path / "cache")
    with (task / "train.jsonl").open("a") as file:
        file.write('{"input": "snow"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:5"):
        Shelf.open(task, embedder, tmp_path / "cache")
    (task / "task.json").write_text("[]")
    with pytest.raises(DataError, match=r"task\.json"):
        Shelf.open(task, embedder, tmp_path / "cache")
