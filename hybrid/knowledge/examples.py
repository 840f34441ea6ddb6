"""A shelf: the training examples of one task with their vectors, for few-shot prompts and for the gate.

The trainer writes one into every adapter it publishes (`examples.jsonl`, `examples.safetensors`); a task folder
becomes one when it is first asked for, and its vectors are kept in a cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import DataError
from hybrid.knowledge.embed import Embedder, Vectors
from hybrid.prompts import task_message
from hybrid.rooms import CARD, fsync_tree, publish

ROWS = "examples.jsonl"
TENSORS = "examples.safetensors"

Found = tuple[str, str, float]


def rows_file(folder: Path) -> Path:
    """The file that holds a shelf's rows: an adapter's own, or a task folder's train split."""
    own = folder / ROWS
    return own if own.is_file() else folder / "train.jsonl"


@dataclass(frozen=True, slots=True)
class Shelf:
    """Examples as a client would send them: `messages` are full user messages, `answers` their references.

    `vectors` [n, dim] are the unit vectors of the messages; `bare` [m, dim] those of the inputs without the
    instruction, which is how a person asks who does not know it. `embedder` is the digest of what made them.
    """

    name: str
    messages: tuple[str, ...]
    answers: tuple[str, ...]
    vectors: Vectors
    bare: Vectors
    embedder: str = ""

    def nearest(self, vector: Vectors, k: int) -> list[Found]:
        """The `k` examples (message, answer, cosine) nearest to a unit vector [dim], the nearest first."""
        if k < 1 or not self.messages:
            return []
        scores = self.vectors @ vector
        best = np.argsort(-scores, kind="stable")[:k]
        return [(self.messages[i], self.answers[i], float(scores[i])) for i in best]

    @classmethod
    def open(cls, folder: Path, embedder: Embedder, cache: Path) -> Shelf:
        """The shelf of an adapter's version folder, or of a task folder (its train split).

        Vectors that are missing or another embedder's are made now and kept under `cache`. Raises DataError naming
        file and line.
        """
        if not (folder / ROWS).is_file():
            task = _task(folder)
            pairs = _pairs(rows_file(folder))
            return cls.embedded(str(task["name"]), str(task.get("instruction", "")), pairs, embedder, cache)
        if (folder / TENSORS).is_file():
            shelf = cls.load(folder)
            if shelf.embedder == embedder.query_digest:
                return shelf
        return cls.embedded(folder.parent.name, *_parted(folder), embedder, cache)

    @classmethod
    def embedded(
        cls, name: str, instruction: str, pairs: Sequence[tuple[str, str]], embedder: Embedder, cache: Path
    ) -> Shelf:
        """A shelf of (input, reference) pairs under an instruction; vectors come from `cache` where they are there."""
        bare = [text for text, _ in pairs]
        messages = [task_message(instruction, text) for text in bare]
        kept = cache / "shelves" / _key(embedder.query_digest, messages, bare)
        if not (kept / TENSORS).is_file():
            _embed(kept, embedder, messages, bare)
        tensors, made_by = _tensors(kept / TENSORS)
        answers = tuple(answer for _, answer in pairs)
        return cls(name, tuple(messages), answers, tensors["vectors"], tensors["bare"], made_by)

    @classmethod
    def load(cls, folder: Path) -> Shelf:
        """The shelf in a folder that `write` filled; its name is the adapter's. Raises DataError."""
        pairs = _pairs(folder / ROWS)
        tensors, made_by = _tensors(folder / TENSORS)
        if len(tensors["vectors"]) != len(pairs):
            raise DataError(f"{folder / TENSORS} has {len(tensors['vectors'])} vectors for {len(pairs)} examples.")
        messages, answers = tuple(m for m, _ in pairs), tuple(a for _, a in pairs)
        return cls(folder.parent.name, messages, answers, tensors["vectors"], tensors["bare"], made_by)

    def write(self, folder: Path) -> None:
        """Writes `examples.jsonl` and `examples.safetensors` into a folder that is being staged."""
        with (folder / ROWS).open("w", encoding="utf-8") as file:
            for message, answer in zip(self.messages, self.answers, strict=True):
                file.write(json.dumps({"input": message, "reference": answer}, ensure_ascii=False) + "\n")
        _save(folder, self.vectors, self.bare, self.embedder)
        fsync_tree(folder)


def _embed(folder: Path, embedder: Embedder, messages: Sequence[str], bare: Sequence[str]) -> None:
    """Publishes the vectors into the cache; another process that was faster did the same work."""
    vectors = embedder.embed_queries([*messages, *(bare if list(bare) != list(messages) else [])])
    try:
        with publish(folder) as staging:
            _save(staging, vectors[: len(messages)], vectors[len(vectors) - len(bare) :], embedder.query_digest)
    except FileExistsError:
        return


def _save(folder: Path, vectors: Vectors, bare: Vectors, made_by: str) -> None:
    from safetensors.numpy import save_file

    tensors = {"vectors": vectors, "bare": bare}
    contiguous = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
    save_file(contiguous, folder / TENSORS, metadata={"embedder": made_by})


def _tensors(path: Path) -> tuple[Mapping[str, Vectors], str]:
    """The two tensors of a file, and the digest of the embedder that made them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no iterator of its own
            made_by = (file.metadata() or {}).get("embedder", "")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for name in ("vectors", "bare"):
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != 2 or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise DataError(f"{path} holds no tensor {name!r} of finite float32 in two dimensions.")
    return tensors, made_by


def _parted(folder: Path) -> tuple[str, list[tuple[str, str]]]:
    """(the instruction on an adapter's card, its rows without it); none where a row does not begin with it."""
    pairs = _pairs(folder / ROWS)
    try:
        instruction = str(json.loads((folder / CARD).read_text(encoding="utf-8"))["instruction"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", pairs
    before = task_message(instruction, "")
    if not all(message.startswith(before) for message, _ in pairs):
        return "", pairs
    return instruction, [(message.removeprefix(before), answer) for message, answer in pairs]


def _task(folder: Path) -> dict[str, Any]:
    path = folder / "task.json"
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not isinstance(task, dict):
        raise DataError(f"{path} is not an object.")
    return {"name": folder.name, **task}


def _pairs(path: Path) -> list[tuple[str, str]]:
    """The (input, reference) of every row. Raises DataError naming the line that has none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return [_pair(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _pair(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
        text, answer = row["input"], row["reference"]
        if isinstance(text, str) and isinstance(answer, str):
            return text, answer
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f'{path}:{number}: a row is an object with two strings, {{"input": "...", "reference": "..."}}.')


def _key(digest: str, *texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([digest, *map(list, texts)]).encode()).hexdigest()[:32]
