"""Recent traffic from the decision log beside what every adapter, corpus and the gate were made from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hybrid.adapters.store import AdapterStore
from hybrid.evaluation.asking import CALLER
from hybrid.evaluation.drift import Asked, Drift, Known, drift
from hybrid.gate.general import general_lines, general_vectors
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import TENSORS, Shelf
from hybrid.knowledge.search import Library
from hybrid.models import materialise
from hybrid.settings import Settings, offline_environment
from hybrid.state import State
from hybrid.types.arm import PROMPT

DAY_S = 86400.0
#: passages of a corpus that stand for it
PASSAGES = 2000


def measure_drift(settings: Settings, days: float, now: float | None = None) -> Drift:
    """Compares the last `days` with the days before them and with the training rows.

    Requests of evaluations are left out, and so are those that named their model: nobody routed them. Raises SetupError
    without the embedder.
    """
    offline_environment()
    until = time.time() if now is None else now
    state = State(settings.rooms.database)
    found = materialise(settings.embedder, settings.cache)
    embedder = Embedder(found.path, found.name)
    known = {
        **_adapters(settings, state, embedder),
        **_corpora(settings, embedder),
        str(PROMPT): _general(settings, embedder),
    }
    arms = {_adapter_of(arm): arm for arm in known if _adapter_of(arm)}
    window, start = days * DAY_S, until - days * DAY_S
    recent = _asked(state.traffic(start, until, CALLER), embedder.dim, arms)
    before = _asked(state.traffic(start - window, start, CALLER), embedder.dim, arms)
    return drift(recent, before, known)


def _asked(rows: Iterable[Mapping[str, Any]], dim: int, arms: Mapping[str, str]) -> list[Asked]:
    """The requests whose vectors this embedder can have made; `arms` is what an adapter's arm is called now."""
    found = []
    for row in rows:
        vector = np.frombuffer(row["vector"], np.float16).astype(np.float32)
        if vector.shape == (dim,):
            arm = arms.get(_adapter_of(row["arm"]), row["arm"])
            found.append(Asked(row["id"], arm, vector / (np.linalg.norm(vector) or 1.0), row["score"]))
    return found


def _adapter_of(arm: str) -> str:
    """The adapter of `adapter:NAME` or `adapter+rag:NAME:CORPUS`, or ""."""
    strategy, _, rest = arm.partition(":")
    return rest.split(":")[0].partition("@")[0] if strategy in ("adapter", "adapter+rag") else ""


def _adapters(settings: Settings, state: State, embedder: Embedder) -> dict[str, Known]:
    """The training rows of every live adapter, as they are asked with their instruction and without."""
    store = AdapterStore(settings.rooms, state)
    out = {}
    for name in store.names():
        live = store.alias(name)
        if live is None:
            continue
        folder = store.resolve(f"{name}@{live}").ref.path
        if (folder / TENSORS).is_file():
            shelf = Shelf.open(folder, embedder, settings.rooms.hidden / "cache")
            out[f"adapter:{name}"] = Known((shelf.vectors, shelf.bare))
    return out


def _corpora(settings: Settings, embedder: Embedder) -> dict[str, Known]:
    library = Library(settings.rooms, embedder, settings.retrieval)
    try:
        return {f"rag:{name}": Known((library.vectors(name, PASSAGES),), learned=False) for name in library.names()}
    finally:
        library.close()


def _general(settings: Settings, embedder: Embedder) -> Known:
    lines = general_vectors(embedder.embed_queries, embedder.query_digest, settings.cache)
    return Known((lines[: len(general_lines())],), learned=False)
