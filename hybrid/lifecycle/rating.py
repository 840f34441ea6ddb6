"""Answers rated by published reward models in the process that serves: a model is opened when it is first asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from hybrid.errors import Refused
from hybrid.models import materialise
from hybrid.settings import Settings
from hybrid.training.reward import Scorer
from hybrid.types.request import Message


class Raters:
    """A home's `Rater`, on the home's base model. The one asked last stays open, beside the engine: as much memory as
    the base takes. One rating at a time; blocking."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._open: tuple[Path, Scorer] | None = None

    def __call__(self, folder: Path, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """How good each answer is to the reward model in a version's folder.

        Raises Refused for one of another base, or one that cannot be read or computed here.
        """
        with self._lock:
            try:
                return self._scorer(folder).scores(messages, answers)
            except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
                raise Refused(f"{folder.parent.name}/{folder.name} cannot rate answers here ({error}).") from error

    def _scorer(self, folder: Path) -> Scorer:
        if self._open is None or self._open[0] != folder:
            self._open = None  # the last one's memory first
            self._open = folder, Scorer.open(folder, materialise(self._settings.model, self._settings.cache))
        return self._open[1]
