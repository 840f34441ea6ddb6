"""Keeps the gate's arms equal to what the home offers: live adapters, corpora, always `prompt`, and every other arm
that the live taught gate knows and the home can serve.

A new adapter or corpus is routable the moment it is published, because it brings its own examples or passages and the
weights are shared by all arms of a kind. The weights are then fitted again to the new set, in a second or two.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.errors import HybridError, ModelNotFound
from hybrid.gate.features import Vectors
from hybrid.gate.general import general_lines, general_vectors, outside_lines, outside_vectors
from hybrid.gate.kept import fingerprint, keep, kept
from hybrid.gate.learned import Learned
from hybrid.gate.model import Gate, Weights
from hybrid.gate.published import FEEDBACK, live_version, load_bandit, load_learned
from hybrid.gate.taught import Taught, task_owner
from hybrid.gate.train import train_gate
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.rooms import Home
from hybrid.types.arm import Arm
from hybrid.types.passage import Passage

log = logging.getLogger("hybrid.gate")
SAMPLE = 4000


class Enrolment:
    """Compares what is enrolled with what is there, and enrols or forgets the difference.

    `warm` is set once the first comparison is done: until then no request should be routed. `measured` gives the
    records of versions that were measured; one with a `reason` not to be used is not enrolled.
    `pinned` is a version of the taught gate to use in place of the live one, `candidate` one that is not published.
    """

    def __init__(
        self,
        home: Home,
        store: AdapterStore,
        shelves: Shelves,
        library: Library,
        cache: Path,
        measured: Callable[[], Mapping[str, Mapping[str, Any]]] = dict,
        pinned: int | None = None,
        candidate: Learned | None = None,
    ) -> None:
        self.gate = Gate(pieces=library.embedder.count_tokens)
        #: where changes are made; the gate that serves gets the result once it is warm
        self._next = Gate(pieces=library.embedder.count_tokens)
        self.warm = False
        self.generation = 0
        self._home = home
        self._store = store
        self._shelves = shelves
        self._library = library
        self._cache = cache
        self._measured = measured
        self._pinned = pinned
        self._seen: dict[Arm, str] = {}
        self._candidate = candidate
        self._learned: Learned | None = None
        self._version: int | None = None
        self._feedback: int | None = None
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Enrols what is new or changed and forgets what is gone. Blocking; cheap when nothing changed."""
        with self._lock:
            live = self._live()
            adapters = self._adapters(live)
            taught = self._taught(adapters, live)
            wanted = {**adapters, **self._corpora(), **self._tasks(adapters)}
            changed = {arm: (mark, enrol) for arm, (mark, enrol) in wanted.items() if self._seen.get(arm) != mark}
            gone = [arm for arm in self._seen if arm not in wanted]
            if changed or gone:
                self._apply(changed, gone)
            self.gate.taught = taught
            self._take_feedback()
            self.warm = True

    def _apply(self, changed: Mapping[Arm, tuple[str, Callable[[], object]]], gone: list[Arm]) -> None:
        embedder = self._library.embedder
        if not self.generation:
            lines = general_lines()
            self._next.enrol_general(lines, general_vectors(embedder.embed_queries, embedder.query_digest, self._cache))
            self._next.enrol_outside(
                outside_lines(), outside_vectors(embedder.embed_queries, embedder.query_digest, self._cache)
            )
        for arm in gone:
            self._next.forget(arm)
            del self._seen[arm]
        for arm, (mark, enrol) in changed.items():
            try:
                enrol()
            except HybridError as error:
                # an arm that cannot be enrolled is still served by its name
                log.warning("%s is not routed to: %s", arm, error.message)
            self._seen[arm] = mark
        self._warm()
        self.gate.bank = self._next.bank
        self.gate.weights = self._fitted()
        self.generation += 1

    def _warm(self) -> None:
        """Scores a request by what comes next: whoever asks first must not pay for what is made when it is needed."""
        line, embedder = general_lines()[0], self._library.embedder
        embedder.count_tokens([line])
        self._next.glance(line, 1.0)
        with contextlib.suppress(HybridError):  # a corpus that cannot be searched is told of where it is asked
            self._next.score(line, embedder.embed_query(line))

    def _fitted(self) -> Weights:
        """The weights for what is enrolled: those kept for the very same arms, or new ones, kept too."""
        embedder = self._library.embedder
        name = fingerprint(self._seen.items(), embedder.query_digest)
        known = kept(self._home, name)
        if known is None:
            known = train_gate(self._next.bank, embedder.embed_queries)
            if self._seen:
                keep(self._home, name, known)
        return known

    # --- what outcomes taught ----------------------------------------------------------------------------------------

    def _taught(self, adapters: Mapping[Arm, object], live: Mapping[str, AdapterVersion]) -> Taught | None:
        """The live taught gate, as far as its arms are on offer now; None where there is none that can be used."""
        version = live_version(self._home) if self._pinned is None else self._pinned
        if self._candidate is not None:  # a number of its own: what it enrols is told apart from that of versions
            version = -1 - int(self._candidate.taught.sum() % 2**31)
        if version != self._version:
            self._version, self._learned = version, self._load(version)
        if self._learned is None:
            return None
        groups = self._learned.memory.groups
        own = {arm: self._task_of(arm) for arm in adapters} | {Arm("rag", (n,)): n for n in self._library.names()}
        at_home = {arm: task for arm, task in own.items() if task in groups}
        return Taught.of(self._learned, frozenset(self._offered(live)), at_home, self._made_for(live), version or 0)

    def _made_for(self, live: Mapping[str, AdapterVersion]) -> dict[str, str]:
        """By name, the task that each adapter and head was trained on, as its card tells."""
        cards = {name: version.card for name, version in live.items()}
        for name in self._store.names():
            with contextlib.suppress(ModelNotFound):
                cards.setdefault(name, self._store.head(name).card)
        return {name: str(card.get("task") or name) for name, card in cards.items()}

    def _load(self, version: int | None) -> Learned | None:
        if self._candidate is not None:
            return self._candidate
        try:
            found = load_learned(self._home, version=version, embedder=self._library.embedder.query_digest)
        except HybridError as error:
            log.warning("the gate is not used: %s", error.message)
            return None
        return found[0] if found else None

    def _take_feedback(self) -> None:
        """Lets what feedback taught adjust the scores, in the version that is live."""
        version = live_version(self._home, FEEDBACK)
        if version == self._feedback:
            return
        self._feedback = version
        try:
            self.gate.bandit = load_bandit(self._home, self._library.embedder.query_digest)
        except HybridError as error:
            log.warning("feedback is not used: %s", error.message)
            self.gate.bandit = None

    def _offered(self, live: Iterable[str]) -> Iterator[Arm]:
        """Every arm that the gate may choose if outcomes speak for it. What was measured worse is left out."""
        corpora = self._library.names()
        yield from (Arm("rag", (name,)) for name in corpora)
        yield from (Arm("few_shot", (name,)) for name in self._shelves.names())
        for name in live:
            yield Arm("adapter", (name,))
            yield from (Arm("adapter+rag", (name, corpus)) for corpus in corpora)
        for name in self._store.names():
            with contextlib.suppress(ModelNotFound):
                yield Arm("head", (self._store.head(name).name,))
        yield from (Arm("self_moa"), Arm("moa"))

    def _tasks(self, adapters: Iterable[Arm]) -> dict[Arm, tuple[str, Callable[[], object]]]:
        """The measured tasks that no live adapter stands for, each known by the requests that were measured."""
        if self._learned is None:
            return {}
        own = {self._task_of(arm) for arm in adapters}
        return {
            task_owner(group): (f"gate@{self._version}", partial(self._enrol_task, self._learned, place, group))
            for place, group in enumerate(self._learned.memory.groups)
            if group and group not in own
        }

    def _enrol_task(self, learned: Learned, place: int, group: str) -> None:
        rows = np.flatnonzero(learned.memory.group == place)
        self._next.enrol_task(group, [learned.memory.texts[i] for i in rows], learned.memory.vectors[rows])

    def _task_of(self, arm: Arm) -> str:
        """The task that an adapter was trained on, as its card tells."""
        name = arm.args[0]
        live = self._store.alias(name)
        card = self._store.resolve(f"{name}@{live}").card if live is not None else {}
        return str(card.get("task") or name)

    # --- what brings its own material --------------------------------------------------------------------------------

    def _adapters(self, live: Mapping[str, AdapterVersion]) -> dict[Arm, tuple[str, Callable[[], object]]]:
        """The arm of every live adapter that brought examples."""
        out: dict[Arm, tuple[str, Callable[[], object]]] = {}
        for name, version in live.items():
            if (version.ref.path / "examples.safetensors").exists():
                corpus = version.card.get("corpus")
                arm = Arm("adapter+rag", (name, corpus)) if corpus else Arm("adapter", (name,))
                out[arm] = (version.ref.engine_name, partial(self._enrol_adapter, name, corpus))
        return out

    def _live(self) -> dict[str, AdapterVersion]:
        """What the alias of every adapter means, those that were measured worse than arms without training aside."""
        measured = self._measured()
        named = {name: self._store.alias(name) for name in self._store.names()}
        found = {name: self._store.resolve(f"{name}@{live}") for name, live in named.items() if live is not None}
        return {name: v for name, v in found.items() if not measured.get(v.id, {}).get("reason")}

    def _enrol_adapter(self, name: str, corpus: str | None) -> None:
        shelf = self._shelves.get(name)
        self._next.enrol_adapter(name, shelf.messages, shelf.vectors, shelf.bare, corpus=corpus)

    def _corpora(self) -> dict[Arm, tuple[str, Callable[[], object]]]:
        return {
            Arm("rag", (name,)): (str(self._library.corpus(name).generation), partial(self._enrol_corpus, name))
            for name in self._library.names()
        }

    def _enrol_corpus(self, name: str) -> None:
        passages, vectors = self._library.sample(name, SAMPLE, 0)

        def search(vector: Vectors, k: int) -> tuple[Passage, ...]:
            return self._library.search(name, vector, k)

        self._next.enrol_corpus(name, passages, vectors, search)
