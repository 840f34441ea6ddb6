"""What a training method gets and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.training.data import Dataset
from hybrid.training.loop import Watch
from hybrid.training.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """One run: what to learn from, how, from which base model, and who watches.

    `embedder` is the one of the retriever, for methods that learn on its features. `name` is the adapter's, `sources`
    where the data came from; `folder` is the run's own, kept until the run ends well; `start` the version folder of the
    adapter to start from, if one was named.
    """

    data: Dataset
    recipe: Recipe
    model: ModelFiles
    watch: Watch
    embedder: Embedder
    settings: Settings = field(default_factory=Settings.load)
    name: str = ""
    sources: Sequence[Path] = ()
    folder: Path | None = None
    start: Path | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained method, not yet on disk.

    `curve` holds `{"step", "loss", "dev_loss"}` of every dev measurement. `save(folder)` writes the artefact and
    returns what the card adds (the canary's recording, the weight file's name); it is called once. `kind` says what
    the artefact is ("lora", "head", "weights", "peft", "prompt") and `serve_with` how one that is no LoRA is served.
    """

    metrics: dict[str, Any]
    curve: Sequence[Mapping[str, float]]
    save: Callable[[Path], dict[str, Any]]
    kind: str = "lora"
    serve_with: str = ""


Method = Callable[[Job], Fitted]
