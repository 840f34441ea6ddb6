"""Heads: a linear layer on the embedder's frozen vectors, which names one of a closed set of labels.

`weight` [classes, d], `bias` [classes], `mean` and `std` [d] and `temperature` [1], all float32, and `classes.json`.
The text x becomes softmax((weight · (x − mean) / std + bias) / temperature): a microsecond of numpy and no engine.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.adapters.tensors import check_finite, read_header
from hybrid.errors import Refused
from hybrid.knowledge.embed import Embedder
from hybrid.rooms import write_json

Vectors = npt.NDArray[np.float32]

HEAD_WEIGHTS, CLASSES = "head.safetensors", "classes.json"
MAX_CLASSES_BYTES = 4 << 20
#: heads kept in memory, the least used leaves first
KEPT = 32


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a head says of a text: the likeliest label first, with their calibrated probabilities, 0 to 1."""

    ranked: tuple[tuple[str, float], ...]

    @property
    def label(self) -> str:
        return self.ranked[0][0]

    @property
    def probability(self) -> float:
        return self.ranked[0][1]


@dataclass(frozen=True, slots=True)
class Head:
    """The numbers of one head and the labels of its rows."""

    classes: tuple[str, ...]
    weight: Vectors
    bias: Vectors
    mean: Vectors
    std: Vectors
    temperature: float

    def logits(self, features: Vectors) -> Vectors:
        """Uncalibrated scores [n, classes] of features [n, d]."""
        return np.asarray(((features - self.mean) / self.std) @ self.weight.T + self.bias, np.float32)

    def probabilities(self, features: Vectors) -> Vectors:
        """Calibrated probabilities [n, classes] of features [n, d]."""
        logits = self.logits(features) / np.float32(self.temperature)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)

    def verdict(self, features: Vectors) -> Verdict:
        """What it says of one text's features [d]."""
        chances = self.probabilities(features[None])[0]
        order = np.argsort(-chances, kind="stable")
        return Verdict(tuple((self.classes[i], float(chances[i])) for i in order))

    def save(self, folder: Path) -> None:
        """Writes the two files."""
        from safetensors.numpy import save_file

        arrays = {"weight": self.weight, "bias": self.bias, "mean": self.mean, "std": self.std}
        arrays["temperature"] = np.array([self.temperature], np.float32)
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}, folder / HEAD_WEIGHTS)
        write_json(folder / CLASSES, list(self.classes))


def read_head(folder: Path) -> Head:
    """The head in a folder. Raises Refused when it is not one, or not whole; OSError."""
    from safetensors.numpy import load_file

    path = folder / HEAD_WEIGHTS
    tensors = read_header(path)
    check_finite(path, tensors)
    classes = _classes(folder / CLASSES)
    dim = tensors["mean"].shape[0] if "mean" in tensors and tensors["mean"].shape else 0
    expected = {
        "weight": (len(classes), dim), "bias": (len(classes),), "mean": (dim,), "std": (dim,), "temperature": (1,),
    }  # fmt: skip
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise Refused(f"{HEAD_WEIGHTS} does not hold a head of {len(classes)} classes; train it again.")
    arrays = {name: array.astype(np.float32) for name, array in load_file(path).items()}
    temperature = float(arrays.pop("temperature")[0])
    if temperature <= 0 or not (arrays["std"] > 0).all():
        raise Refused(f"{HEAD_WEIGHTS} divides by zero: its std or its temperature is not positive; train it again.")
    return Head(classes, temperature=temperature, **arrays)


def _classes(path: Path) -> tuple[str, ...]:
    if not path.is_file() or path.stat().st_size > MAX_CLASSES_BYTES:
        raise Refused(f"{CLASSES} is missing or larger than {MAX_CLASSES_BYTES:,} bytes; train the head again.")
    try:
        classes: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{CLASSES} is not JSON; train the head again.") from error
    if not isinstance(classes, list) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise Refused(f"{CLASSES} is no list of at least two labels; train the head again.")
    return tuple(classes)


def bare(text: str, instruction: str) -> str:
    """The text that a head reads: without its task's instruction, where a request begins with it."""
    return text.removeprefix(instruction).strip() if instruction else text.strip()


class Heads:
    """Answers with published heads; each is read when it is first asked."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._heads: OrderedDict[Path, Head] = OrderedDict()
        self._lock = threading.Lock()

    def classify(self, folder: Path, card: Mapping[str, Any], text: str) -> Verdict:
        """What the head in `folder` says of `text`. Raises Refused for one made for another embedder. Blocking."""
        head = self._head(folder, card)
        return head.verdict(self._embedder.embed([bare(text, str(card.get("instruction", "")))])[0])

    def _head(self, folder: Path, card: Mapping[str, Any]) -> Head:
        with self._lock:
            if folder not in self._heads:
                self._heads[folder] = self._opened(folder, card)
            self._heads.move_to_end(folder)
            while len(self._heads) > KEPT:
                self._heads.popitem(last=False)
            return self._heads[folder]

    def _opened(self, folder: Path, card: Mapping[str, Any]) -> Head:
        if card.get("embedder") != self._embedder.digest:
            raise Refused("this head was trained on another embedder than the one that serves; train it again.")
        try:
            return read_head(folder)
        except OSError as error:
            raise Refused(f"the head cannot be read ({error.strerror}); check its files.") from error
