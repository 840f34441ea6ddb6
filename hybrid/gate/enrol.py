"""Keeps the gate's arms equal to what the home offers: live adapters, corpora, and always `prompt`.

A new adapter or corpus is routable the moment it is published, because it brings its own examples or passages and the
weights are shared by all arms of a kind. The weights are then fitted again to the new set, in a second or two.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.errors import HybridError, Refused
from hybrid.gate.features import Vectors
from hybrid.gate.general import general_lines, general_vectors, outside_lines, outside_vectors
from hybrid.gate.model import Gate, Weights
from hybrid.gate.published import fingerprint, load_gate, newest_card, publish_gate
from hybrid.gate.train import train_gate
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.rooms import Home
from hybrid.types import Arm, Passage

log = logging.getLogger("hybrid.gate")
SAMPLE = 4000


class Enrolment:
    """Compares what is enrolled with what is there, and enrols or forgets the difference.

    `warm` is set once the first comparison is done: until then no request should be routed. `measured` gives the
    records of versions that were measured; one with a `reason` not to be used is not enrolled.
    """

    def __init__(
        self,
        home: Home,
        store: AdapterStore,
        shelves: Shelves,
        library: Library,
        cache: Path,
        measured: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
    ) -> None:
        self.gate = Gate()
        self.warm = False
        self.generation = 0
        self._home = home
        self._store = store
        self._shelves = shelves
        self._library = library
        self._cache = cache
        self._measured = measured
        self._seen: dict[Arm, str] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Enrols what is new or changed and forgets what is gone. Blocking; cheap when nothing changed."""
        with self._lock:
            wanted = {**self._adapters(), **self._corpora()}
            changed = {arm: (mark, enrol) for arm, (mark, enrol) in wanted.items() if self._seen.get(arm) != mark}
            gone = [arm for arm in self._seen if arm not in wanted]
            if changed or gone:
                self._apply(changed, gone)
            self.warm = True

    def _apply(self, changed: Mapping[Arm, tuple[str, Callable[[], object]]], gone: list[Arm]) -> None:
        embedder = self._library.embedder
        if not self.generation:
            lines = general_lines()
            self.gate.enrol_general(lines, general_vectors(embedder.embed, embedder.digest, self._cache))
            self.gate.enrol_outside(outside_lines(), outside_vectors(embedder.embed, embedder.digest, self._cache))
            embedder.embed_query(lines[0])  # the first query must not pay for loading
        for arm in gone:
            self.gate.forget(arm)
            del self._seen[arm]
        for arm, (mark, enrol) in changed.items():
            try:
                enrol()
            except HybridError as error:
                # an arm that cannot be enrolled is still served by its name
                log.warning("%s is not routed to: %s", arm, error.message)
            self._seen[arm] = mark
        self.gate.weights = self._fitted()
        self.generation += 1

    def _fitted(self) -> Weights:
        """The weights for what is enrolled: those published for the very same arms, or new ones, published too."""
        embedder = self._library.embedder
        enrolled = fingerprint(self._seen.items())
        try:
            known = load_gate(self._home, embedder.digest)
            if known is not None and newest_card(self._home).get("enrolled") == enrolled:
                return known
        except Refused as refusal:
            log.warning("%s", refusal.message)
        weights = train_gate(self.gate.bank, embedder.embed)
        if self._seen:
            facts = {"enrolled": enrolled, "arms": sorted(map(str, self._seen))}
            publish_gate(self._home, weights, embedder.digest, facts)
        return weights

    def _adapters(self) -> dict[Arm, tuple[str, Callable[[], object]]]:
        """Every live adapter that brought examples and was not measured worse than arms without training."""
        measured = self._measured()
        out: dict[Arm, tuple[str, Callable[[], object]]] = {}
        for name in self._store.names():
            live = self._store.alias(name)
            if live is None:
                continue
            version = self._store.resolve(f"{name}@{live}")
            if measured.get(version.id, {}).get("reason"):
                continue
            if (version.ref.path / "examples.safetensors").exists():
                corpus = version.card.get("corpus")
                arm = Arm("adapter+rag", (name, corpus)) if corpus else Arm("adapter", (name,))
                out[arm] = (version.ref.engine_name, partial(self._enrol_adapter, name, corpus))
        return out

    def _enrol_adapter(self, name: str, corpus: str | None) -> None:
        shelf = self._shelves.get(name)
        self.gate.enrol_adapter(name, shelf.messages, shelf.vectors, shelf.bare, corpus=corpus)

    def _corpora(self) -> dict[Arm, tuple[str, Callable[[], object]]]:
        return {
            Arm("rag", (name,)): (str(self._library.corpus(name).generation), partial(self._enrol_corpus, name))
            for name in self._library.names()
        }

    def _enrol_corpus(self, name: str) -> None:
        passages, vectors = self._library.sample(name, SAMPLE, 0)

        def search(vector: Vectors, k: int) -> tuple[Passage, ...]:
            return self._library.search(name, vector, k)

        self.gate.enrol_corpus(name, passages, vectors, search)
