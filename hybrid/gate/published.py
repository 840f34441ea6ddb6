"""Published gates: `adapters/gate/<n>/` holds `gate.safetensors` (the weights of each kind) and `card.json`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from hybrid.errors import Refused
from hybrid.gate.features import COLUMNS
from hybrid.gate.model import Weights
from hybrid.rooms import CARD, Home, publish, sha256_file, write_json
from hybrid.types import Arm

_FILE = "gate.safetensors"


def publish_gate(home: Home, weights: Weights, embedder: str, facts: dict[str, Any] | None = None) -> int:
    """Publishes weights as the next version and returns its number. `embedder` is the digest they were fitted with.

    `facts` go on the card: what it was trained on, what was measured.
    """
    from safetensors.numpy import save_file

    version = max(versions(home), default=0) + 1
    with publish(home.adapters / "gate" / str(version)) as staging:
        save_file({name: np.ascontiguousarray(w) for name, w in weights.by_kind.items()}, staging / _FILE)
        card = {
            "name": "gate",
            "version": version,
            "created": int(time.time()),
            "embedder": embedder,
            "columns": {name: list(columns) for name, columns in COLUMNS.items()},
            "sha256": sha256_file(staging / _FILE),
        }
        write_json(staging / CARD, {**(facts or {}), **card})
    return version


def versions(home: Home) -> list[int]:
    """The published versions, oldest first."""
    folder = home.adapters / "gate"
    return sorted(int(p.parent.name) for p in folder.glob(f"*/{CARD}") if p.parent.name.isdecimal())


def newest_card(home: Home) -> dict[str, Any]:
    """The card of the newest published gate; empty where there is none or it cannot be read."""
    known = versions(home)
    try:
        card = json.loads((home.adapters / "gate" / str(known[-1]) / CARD).read_text(encoding="utf-8")) if known else {}
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def fingerprint(enrolled: Iterable[tuple[Arm, str]]) -> str:
    """What a set of enrolled arms is called: equal where every arm's material is the same."""
    text = json.dumps(sorted((str(arm), mark) for arm, mark in enrolled))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_gate(home: Home, embedder: str, version: int | None = None) -> Weights | None:
    """The weights of a version, or of the newest; None where none is published.

    Raises Refused when the file was changed, or was fitted to other features or another embedder.
    """
    from safetensors.numpy import load_file

    known = versions(home)
    if version is None and not known:
        return None
    number = known[-1] if version is None else version
    folder = home.adapters / "gate" / str(number)
    if number not in known:
        raise Refused(f"gate@{number} is not published; known versions: {known}.", param="gate")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        problem = _problem(card, sha256_file(folder / _FILE), embedder)
        weights = {} if problem else load_file(folder / _FILE)
    except (OSError, ValueError) as error:
        raise Refused(f"gate@{number} cannot be read ({error}); train a new one.", param="gate") from error
    shapes = {name: w.shape for name, w in weights.items()}
    if not problem and shapes != {name: (len(columns),) for name, columns in COLUMNS.items()}:
        problem = "its weights have other shapes than its features"
    if not problem and not all(np.isfinite(w).all() for w in weights.values()):
        problem = "it holds numbers that are not finite"
    if problem:
        raise Refused(f"gate@{number} is refused: {problem}. Train a new one.", param="gate")
    return Weights({name: w.astype(np.float64) for name, w in weights.items()})


def _problem(card: dict[str, Any], sha256: str, embedder: str) -> str:
    if card.get("sha256") != sha256:
        return "its weights are not those that were published"
    if card.get("columns") != {name: list(columns) for name, columns in COLUMNS.items()}:
        return "it was trained on other features than this version computes"
    if card.get("embedder") != embedder:
        return "it was trained with another embedder"
    return ""
