"""Our own lists of requests in several languages, embedded once and cached: general ones, and ones from outside."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from hybrid.gate.features import Embed, Vectors


@lru_cache(maxsize=2)
def _lines(name: str) -> tuple[str, ...]:
    text = files("hybrid.gate").joinpath(name).read_text(encoding="utf-8")
    stripped = (line.strip().replace("\\n", "\n") for line in text.splitlines())
    return tuple(line for line in stripped if line and not line.startswith("#"))


def general_lines() -> tuple[str, ...]:
    """What `prompt` is for: small talk and everyday requests, one a line of `general.txt`."""
    return _lines("general.txt")


def outside_lines() -> tuple[str, ...]:
    """Requests of many trades and forms that no arm may claim without looking alike, one a line of `strangers.txt`.

    The gate learns from them where its arms end (outlier exposure, Hendrycks et al. 2019, arXiv 1812.04606).
    """
    return _lines("strangers.txt")


def general_vectors(embed: Embed, embedder: str, cache: Path) -> Vectors:
    """The unit vectors [n, d] of the general lines."""
    return _cached(general_lines(), embed, embedder, cache)


def outside_vectors(embed: Embed, embedder: str, cache: Path) -> Vectors:
    """The unit vectors [n, d] of the lines from outside."""
    return _cached(outside_lines(), embed, embedder, cache)


def _cached(lines: Sequence[str], embed: Embed, embedder: str, cache: Path) -> Vectors:
    """Kept under `cache`, by the embedder's digest and the lines themselves."""
    key = hashlib.sha256("\n".join((embedder, *lines)).encode()).hexdigest()[:24]
    path = cache / "gate" / f"{key}.npy"
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        kept = None
    if isinstance(kept, np.ndarray) and kept.ndim == 2 and len(kept) == len(lines) and kept.dtype == np.float32:
        return kept
    vectors = np.ascontiguousarray(embed(lines), dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{uuid.uuid4().hex}.npy")
    np.save(staging, vectors, allow_pickle=False)
    os.replace(staging, path)
    return vectors
