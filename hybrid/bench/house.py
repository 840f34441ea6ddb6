"""A home's gate as it serves, without an engine: the very decider, asked in bulk, and gates with something left out."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.adapters.store import AdapterStore
from hybrid.boot import example_folders
from hybrid.errors import BadRequest
from hybrid.gate.decide import Decider
from hybrid.gate.enrol import Enrolment
from hybrid.gate.features import Vectors
from hybrid.gate.model import Gate
from hybrid.gate.policy import Policy
from hybrid.gate.published import GATE, load_learned, serving_version
from hybrid.gate.taught import Taught
from hybrid.gate.train import train_gate
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.decision import Decision
from hybrid.types.request import Knobs, Message, Request

#: strategies that are made for some requests only
NARROW = frozenset(["adapter", "adapter+rag", "few_shot", "head", "mix", "rag"])
#: a late decision must be seen as late, not be replaced
_PATIENCE_MS = 60_000.0


def own(task: str, arm: Arm, tasks: Mapping[str, str]) -> bool:
    """`House.own`, where `tasks` say what each adapter was trained on."""
    if arm.strategy not in NARROW:
        return False
    names = [name.partition("@")[0] for name in arm.adapters or arm.args]
    return task in (names if arm.strategy == "rag" else [tasks.get(name, name) for name in names])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and what it took in milliseconds. `stranger` (0 to 1): how much the request looked like nobody's.

    `embedded`: words alone did not tell. `turned_away`: it went to `prompt` for looking like that, and not because
    outcomes said that `prompt` answers it best.
    """

    decision: Decision
    ms: float
    stranger: float
    embedded: bool
    turned_away: bool

    @property
    def arm(self) -> Arm:
        return self.decision.arm


class CountingEmbedder(Embedder):
    """Counts the single texts that it embeds, and those of them that it had embedded before; what it remembers is in
    neither."""

    embedded = 0
    again = 0

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name)
        self._seen: set[str] = set()

    def _embed_query(self, text: str) -> Vectors:
        self.embedded += 1
        self.again += text in self._seen
        self._seen.add(text)
        return super()._embed_query(text)


@dataclass(frozen=True, slots=True)
class House:
    """One home, open for as long as `open_house` lasts. `gate` is the one that serves; `tasks` say what each adapter
    was trained on."""

    settings: Settings
    gate: Gate
    embedder: CountingEmbedder
    library: Library
    shelves: Shelves
    tasks: Mapping[str, str]

    def own(self, task: str, arm: Arm) -> bool:
        """Whether a narrow arm is made of a task's own data, or of the corpus that is named after it."""
        return own(task, arm, self.tasks)

    async def decide(self, query: str, gate: Gate | None = None, quality_cost: float | None = None) -> Decision:
        """What `auto` would take, however long it needs."""
        return await self._decider(gate).decide(_request(query, quality_cost))

    async def arms(
        self, queries: Sequence[str], gate: Gate | None = None, quality_cost: float | None = None
    ) -> list[Arm]:
        """The arms taken for requests, one after another."""
        decider = self._decider(gate)
        return [(await decider.decide(_request(query, quality_cost))).arm for query in queries]

    async def judge(self, queries: Sequence[str]) -> list[Verdict]:
        """Decisions with their times, one after another, nothing else being done in between."""
        decider, timed = self._decider(None), []
        for query in queries:
            request, before = _request(query, None), self.embedder.embedded
            began = time.perf_counter()
            decision = await decider.decide(request)
            timed.append((decision, (time.perf_counter() - began) * 1000, self.embedder.embedded > before))
        return [self._verdict(query, *one) for query, one in zip(queries, timed, strict=True)]

    def _verdict(self, query: str, decision: Decision, ms: float, embedded: bool) -> Verdict:
        scores = self.gate.score(query, self.embedder.embed_query(query))
        general = scores.by_arm[PROMPT]
        stranger = general if scores.stranger is None else scores.stranger
        nobodys = decision.fallback is not None or 2 * stranger >= general
        return Verdict(decision, ms, stranger, embedded, decision.arm == PROMPT and nobodys)

    def _decider(self, gate: Gate | None) -> Decider:
        patient = self.settings.gate.model_copy(update={"deadline_ms": _PATIENCE_MS})
        return Decider(gate or self.gate, Policy(patient), self.library, patient)

    def without(self, arms: Iterable[Arm], taught: Taught | None) -> Gate:
        """The gate fitted anew without some arms and owners, taught by something else."""
        gate = Gate(self.gate.weights, self.gate.pieces)
        gate.bank, gate.taught = self.gate.bank, taught
        for arm in arms:
            gate.forget(arm)
        gate.weights = train_gate(gate.bank, self.embedder.embed_queries)
        return gate


@contextlib.asynccontextmanager
async def open_house(settings: Settings, embedding: ModelFiles, gate: str | None) -> AsyncIterator[House]:
    """The home with everything enrolled, as a server has it once it is warm. `gate` names another taught gate than the
    live one. Raises NotFound and Refused for that, BadRequest in a home that has no arm but `prompt`."""
    home = settings.rooms
    version = None if gate is None else serving_version(gate)
    state = State(home.database)
    embedder = CountingEmbedder(embedding.path, embedding.name)
    library = Library(home, embedder, settings.retrieval)
    try:
        store = AdapterStore(home, state)
        shelves = Shelves(lambda: example_folders(home, store), embedder, home.hidden / "cache")
        enrolment = Enrolment(home, store, shelves, library, settings.cache, state.measurements, version)
        if version is not None:
            load_learned(home, GATE, version, embedder.query_digest)  # refused here, where a server would do without
        await asyncio.to_thread(enrolment.refresh)
        if len(enrolment.gate.arms()) < 2:
            raise BadRequest("This home has no arm but `prompt`, so there is nothing to route: train an adapter first.")
        yield House(settings, enrolment.gate, embedder, library, shelves, _tasks(store))
    finally:
        library.close()
        state.close()


def _tasks(store: AdapterStore) -> dict[str, str]:
    """What the live version of each adapter was trained on, as its card tells."""
    live = {name: store.alias(name) for name in store.names()}
    cards = {name: store.resolve(f"{name}@{number}").card for name, number in live.items() if number is not None}
    return {name: str(card.get("task") or name) for name, card in cards.items()}


def _request(query: str, quality_cost: float | None) -> Request:
    return Request(id="bench", messages=(Message("user", query),), knobs=Knobs(quality_cost=quality_cost))
