"""Finding again what was trained already: by the recipe, the rows, and what the version stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles
from hybrid.training.data import Dataset
from hybrid.training.recipes import Recipe


def made(
    store: AdapterStore, name: str, recipe: Recipe, data: Callable[[], Dataset], model: ModelFiles, embedder: Embedder
) -> Iterator[AdapterVersion]:
    """The versions of a name that this recipe made of these training rows, the newest first; none that is retired.

    They stand on this base, or where they need none (a head) on this embedder's features. `data` is called only when
    a recipe fits.
    """
    wanted = recipe.model_dump(mode="json")
    for version in reversed(store.versions(name)):
        card = version.card
        if version.state == "retired" or card.get("recipe") != wanted:
            continue
        if card.get("base_sha256"):
            stands = card["base_sha256"] == model.sha256
        else:
            stands = card.get("embedder") == embedder.digest
        if stands and card.get("data", {}).get("train_sha256") == data().train_sha256:
            yield version
