"""What a home has to offer, told from its folders and its database: the same as the gateway's own list, without an
engine. A run that has every outcome already is recognised by it, and a plan is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hybrid import catalog
from hybrid.adapters.store import AdapterStore
from hybrid.boot import example_folders
from hybrid.evaluation.asking import Offer, shown_settings
from hybrid.gate.published import FEEDBACK, live_version
from hybrid.knowledge.search import Library
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.types import JSON


def home_offer(
    settings: Settings, model: ModelFiles, state: State, library: Library, lent: Mapping[str, Path]
) -> Offer:
    """The offer of a gateway over this home. `lent` are the task folders that few-shot prompts may draw on."""
    store = AdapterStore(settings.rooms, state, model.sha256)
    shelves = sorted({**example_folders(settings.rooms, store), **lent})
    offered = catalog.models(store, library, shelves, model.name, settings.moa.panels)
    models = tuple(str(entry["id"]) for entry in offered)
    measured = state.measurements()
    status: JSON = {
        "engine": {"model": model.name},
        "adapters": [catalog.adapter(v, store.alias(v.name), measured.get(v.id)) for v in store.versions()],
        "corpora": catalog.corpora(library),
        "gate": {"version": live_version(settings.rooms), "feedback": live_version(settings.rooms, FEEDBACK)},
    }
    return Offer(models, status, shown_settings(settings), model.sha256)


def with_planned(offer: Offer, adapters: Mapping[str, JSON], heads: Sequence[str], corpora: Sequence[str]) -> Offer:
    """The offer once these exist too: adapters by name with what their cards would say, heads, corpora."""
    names = [*dict.fromkeys([*offer.corpora, *corpora])]
    models = [*offer.models, *(f"rag:{name}" for name in corpora)]
    for adapter in [*dict.fromkeys([*(n for n in offer.adapters if "@" not in n), *adapters])]:
        models += [adapter, *(f"adapter+rag:{adapter}:{corpus}" for corpus in names)]
    models += [f"head:{name}" for name in heads]
    rows = [_row(name, card) for name, card in adapters.items() if name not in offer.adapters]
    made = [{"name": name} for name in corpora if name not in offer.corpora]
    status = {
        **offer.status,
        "adapters": [*offer.status["adapters"], *rows],
        "corpora": [*offer.status["corpora"], *made],
    }
    return replace(offer, models=tuple(dict.fromkeys(models)), status=status)


def _row(name: str, card: JSON) -> JSON:
    return {"name": name, "version": 0, "kind": "lora", "alias": True, "state": "live", "card": card}
