"""Every shelf of training examples of a home, by name: those that adapters were trained on, and those of task folders.

An adapter's examples win over a task folder of the same name, because they are what was really learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybrid.errors import ModelNotFound
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf


class Shelves:
    """Shelves of one home; each is read when first asked for and kept. `folders` says where they are now."""

    def __init__(self, folders: Callable[[], Mapping[str, Path]], embedder: Embedder, cache: Path) -> None:
        self._folders = folders
        self._embedder = embedder
        self._cache = cache
        self._loaded: dict[Path, Shelf] = {}
        self._lent: dict[str, Path] = {}

    def lend(self, name: str, folder: Path) -> None:
        """Adds the task folder `folder`, which may lie anywhere, under `name` while this process lives."""
        self._lent[name] = folder

    def names(self) -> list[str]:
        """The tasks that have examples."""
        return sorted(self._known())

    def _known(self) -> Mapping[str, Path]:
        return {**self._folders(), **self._lent}

    def get(self, name: str) -> Shelf:
        """The shelf of a task. Raises ModelNotFound naming those that exist."""
        folder = self._known().get(name)
        if folder is None:
            known = ", ".join(self.names()) or "none yet: train an adapter or put a task into eval/tasks/"
            raise ModelNotFound(f"There are no examples of a task named {name[:80]!r}. Known: {known}.", param="model")
        if folder not in self._loaded:
            self._loaded[folder] = Shelf.open(folder, self._embedder, self._cache)
        return self._loaded[folder]

    def select(self, name: str | None) -> Sequence[Shelf]:
        """The shelf named, or all of them."""
        return [self.get(name)] if name else [self.get(n) for n in self.names()]
