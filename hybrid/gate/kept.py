"""The weights that the arms' own material gave, kept for the next start: fitting them takes seconds.

They are a cache of what is enrolled, not something learned from outcomes: one file a set of arms under `.hybrid/`, and
a file that cannot be read is fitted again.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from hybrid.gate.features import COLUMNS
from hybrid.gate.model import SURE, Weights
from hybrid.rooms import Home
from hybrid.types.arm import Arm

_SURE = "sure"
#: files kept; a home rarely goes back to an older set of arms
_MOST = 8


def fingerprint(enrolled: Iterable[tuple[Arm, str]], embedder: str) -> str:
    """What a set of enrolled arms is called: equal where every arm's material, the embedder and the features are."""
    columns = {name: list(names) for name, names in COLUMNS.items()}
    text = json.dumps([sorted((str(arm), mark) for arm, mark in enrolled), embedder, columns])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def keep(home: Home, name: str, weights: Weights) -> None:
    """Keeps weights under the name of what they were fitted to; the oldest files go."""
    from safetensors.numpy import save_file

    path = _path(home, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{uuid.uuid4().hex}")
    numbers = {kind: np.ascontiguousarray(w) for kind, w in weights.by_kind.items()}
    save_file({**numbers, _SURE: np.array([weights.sure])}, staging)
    os.replace(staging, path)
    for old in sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)[:-_MOST]:
        old.unlink(missing_ok=True)


def kept(home: Home, name: str) -> Weights | None:
    """The weights kept under a name; None where there are none that can be used."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(_path(home, name).read_bytes())
    except (OSError, ValueError, SafetensorError):
        return None
    wanted = {**{kind: (len(names),) for kind, names in COLUMNS.items()}, _SURE: (1,)}
    if {kind: w.shape for kind, w in found.items()} != wanted or not all(np.isfinite(w).all() for w in found.values()):
        return None
    sure = float(found.pop(_SURE)[0])
    return Weights({k: w.astype(np.float64) for k, w in found.items()}, sure) if SURE[0] <= sure <= SURE[1] else None


def _path(home: Home, name: str) -> Path:
    return home.hidden / "cache" / "gate" / f"{name}.safetensors"
