"""Every shelf of training examples of a home, by name: what adapters were trained on, and task folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybrid.errors import ModelNotFound
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf, rows_file
from hybrid.types.arm import Arm
from hybrid.types.rights import Rights


class Shelves:
    """Shelves of one home; each is read when first asked for and kept until its rows change. `folders` says where
    they are now."""

    def __init__(self, folders: Callable[[], Mapping[str, Path]], embedder: Embedder, cache: Path) -> None:
        self._folders = folders
        self._embedder = embedder
        self._cache = cache
        self._loaded: dict[Path, tuple[int, Shelf]] = {}

    def names(self) -> list[str]:
        """The tasks that have examples."""
        return sorted(self._folders())

    def get(self, name: str) -> Shelf:
        """The shelf of a task. Raises ModelNotFound naming those that exist, DataError."""
        folder = self._folders().get(name)
        if folder is None:
            known = ", ".join(self.names()) or "none yet: train an adapter or put a task into eval/tasks/"
            raise ModelNotFound(f"There are no examples of a task named {name[:80]!r}. Known: {known}.", param="model")
        written = _written(folder)
        kept = self._loaded.get(folder)
        if kept is None or kept[0] != written:
            kept = self._loaded[folder] = (written, Shelf.open(folder, self._embedder, self._cache))
        return kept[1]

    def select(self, name: str | None, rights: Rights) -> Sequence[Shelf]:
        """The shelf named, or all of those that a caller may use."""
        if name:
            return [self.get(name)]
        return [self.get(n) for n in self.names() if rights.may(Arm("few_shot", (n,)))]


def _written(folder: Path) -> int:
    """When the rows of a shelf were written, in nanoseconds; 0 where there are none."""
    try:
        return rows_file(folder).stat().st_mtime_ns
    except FileNotFoundError:
        return 0  # opening the shelf will say so
