"""What many commands begin with: a model made ready on this disk, while a bar tells how far that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hybrid.cli.say import bar
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, Progress, materialise
from hybrid.settings import Settings, offline_environment


@contextmanager
def ready(settings: Settings, source: str) -> Iterator[tuple[ModelFiles, Progress]]:
    """The files of one of the models that the settings name, and the bar, for what the command does with them.

    Raises SetupError where there is no such model.
    """
    offline_environment()
    with bar() as progress:
        yield materialise(source, settings.cache, progress), progress


def made_ready(settings: Settings, source: str) -> ModelFiles:
    """The files alone; the bar is gone."""
    with ready(settings, source) as (files, _):
        return files


def open_embedder(settings: Settings) -> Embedder:
    """The embedder that the settings name."""
    files = made_ready(settings, settings.embedder)
    return Embedder(files.path, files.name)
