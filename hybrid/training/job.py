"""What a training method gets and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.models import ModelFiles
from hybrid.training.data import Dataset
from hybrid.training.loop import Progress
from hybrid.training.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """One run: what to learn from, how, and from which base model."""

    data: Dataset
    recipe: Recipe
    model: ModelFiles
    progress: Progress


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained method, not yet on disk.

    `curve` holds `{"step", "loss", "dev_loss"}` of every dev measurement. `save(folder)` writes a PEFT folder and
    returns what the card adds (the canary's recording); it is called once.
    """

    metrics: dict[str, Any]
    curve: Sequence[Mapping[str, float]]
    save: Callable[[Path], dict[str, Any]]


Method = Callable[[Job], Fitted]
