"""Keeps the gate's arms equal to what the home offers: live adapters, corpora, and always `prompt`.

A new adapter or corpus is routable the moment it is published: it brings its own examples or passages.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.gate.model import Gate
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.types import Arm

log = logging.getLogger("hybrid.gate")


class Enrolment:
    """Compares what is enrolled with what is there, and enrols or forgets the difference."""

    def __init__(self, store: AdapterStore, shelves: Shelves, library: Library, cache: Path) -> None:
        self.gate = Gate()
        self.warm = False
        self._store = store
        self._shelves = shelves
        self._library = library
        self._cache = cache
        self._seen: dict[Arm, Any] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Enrols what is new or changed and forgets what is gone. Blocking; does nothing when nothing changed."""
        with self._lock:
            wanted = {**self._corpora(), **self._adapters()}
            if wanted != self._seen:
                self._apply(wanted)
            self.warm = True
