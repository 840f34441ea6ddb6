"""The file to read first: request → gate → policy → strategy → engine, and back as one stream of events.

Three consumers fold that stream: the server (SSE), the UI (panels), the evaluator (outcomes). A named model bypasses
the gate. What is settled before work starts is the plan (`plan.py`): an answer begun on `@2` ends on `@2`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid import catalog
from hybrid.adapters.heads import Heads, Verdict
from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.kinds import HEAD, LORA
from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.mixes import Mixes
from hybrid.adapters.store import AdapterStore
from hybrid.cascade import cascade
from hybrid.convene import Convener
from hybrid.engine import Engine
from hybrid.errors import BadRequest, HybridError, ModelNotFound, NotFound, NotReady
from hybrid.gate.decide import Decider
from hybrid.gate.enrol import Enrolment
from hybrid.gate.mixing import Mixer
from hybrid.gate.published import FEEDBACK, live_version
from hybrid.journal import Journal
from hybrid.keys import Keys
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.names import Names
from hybrid.plan import Plan, Planner
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.strategies.bound import Bound
from hybrid.strategies.panel import Rater
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.decision import Decision
from hybrid.types.event import Decided, Event, Failed
from hybrid.types.request import Request


class Gateway:
    """One home being served. Built by `hybrid.boot.open_gateway`; every part is passed in."""

    def __init__(
        self,
        settings: Settings,
        *,
        state: State,
        engine: Engine,
        store: AdapterStore,
        loader: HotLoader,
        library: Library,
        shelves: Shelves,
        decider: Decider,
        count_tokens: Callable[[str], int],
        secret: bytes,
        enrolment: Enrolment,
        small: bool,
        rater: Rater | None = None,
    ) -> None:
        self.settings = settings
        self.state = state
        self.engine = engine
        self.store = store
        self.loader = loader
        self.library = library
        self.shelves = shelves
        self.decider = decider
        self.keys = Keys(state)
        mixes = Mixes(
            store,
            loader,
            engine,
            max_rank=settings.engine.max_lora_rank,
            limit=settings.engine.max_mixes,
            in_use=self.in_use,
        )
        self.names = Names(
            engine=engine,
            store=store,
            loader=loader,
            library=library,
            shelves=shelves,
            mixes=mixes,
            panels=settings.moa.panels,
        )
        convener, mixer = Convener(settings.moa, self.names), Mixer(decider, settings.gate)
        self._planner = Planner(self.names, decider, convener, mixer)
        self.journal = Journal(state)
        self._heads = Heads(library.embedder)
        self.count_tokens = count_tokens
        self._small = small
        self._secret = secret
        self._enrolment = enrolment
        self._rater = rater
        self._answering: collections.Counter[str] = collections.Counter()
        self._in_use: collections.Counter[str] = collections.Counter()

    # --- answering -------------------------------------------------------------------------------------------------

    async def answer(self, request: Request) -> AsyncGenerator[Event]:
        """Yields Decided, then what the strategy yields, then Finished or Failed.

        Raises before the first event what can be known before work starts (ModelNotFound, NotReady); a failure after
        it is the last event. Closing the iterator aborts every engine call made for the request.
        """
        with self._counted(request.caller):
            request = self._entitled(request)
            plan = await self._plan(request)
            with self._using(plan.versions.values()):
                async with contextlib.aclosing(self._events(request, plan)) as events:
                    async for event in events:
                        yield event

    @property
    def answering(self) -> int:
        """Requests that are being answered."""
        return self._answering.total()

    def answering_others(self, caller: str) -> int:
        """Requests that are being answered, those of one caller aside."""
        return self._answering.total() - self._answering[caller]

    def _events(self, request: Request, plan: Plan) -> AsyncGenerator[Event]:
        """The answer that was planned; its first event is the decision."""
        tools = self._bind(request, plan.decision.arm, plan)
        record = functools.partial(self.journal.add, caller=request.caller)
        if plan.decision.first:
            return cascade(request, plan, plan.decision.first, tools, enough=self.settings.gate.cascade, record=record)
        return _played(plan, tools, record)

    async def route(self, request: Request) -> Decision:
        """The decision alone, with all that explains it; nothing is generated."""
        asked = dataclasses.replace(request, knobs=dataclasses.replace(request.knobs, explain=True))
        plan = await self._plan(self._entitled(asked))
        self.journal.add(plan.decision, request.caller)
        return plan.decision

    async def _plan(self, request: Request) -> Plan:
        """The plan; of one that searches the decision says when meaning cannot be searched for."""
        plan = await self._planner.plan(request)
        trouble = self.library.trouble if "rag" in plan.decision.arm.strategy else ""
        if not trouble:
            return plan
        decision = dataclasses.replace(plan.decision, reason=f"{plan.decision.reason}; {trouble}")
        return dataclasses.replace(plan, decision=decision)

    def _entitled(self, request: Request) -> Request:
        """The request with what its caller may use at this moment."""
        return dataclasses.replace(request, rights=self.keys.rights(request.caller))

    def _bind(self, request: Request, arm: Arm, plan: Plan) -> Bound:
        """The verbs for one arm of the plan: the one that answers, or one that it asks."""
        version = plan.version(arm)
        return Bound(
            request,
            settings=self.settings,
            engine=self.engine,
            library=self.library,
            shelves=self.shelves.select,
            count_tokens=self.count_tokens,
            adapters={spec: version.ref.engine_name for spec, version in plan.versions.items()},
            instruction=_instruction(version) if plan.by_gate else "",
            top_k=_trained_with(version) or self.settings.retrieval.shown(small=self._small),
            quotes=self.settings.retrieval.quotes(small=self._small),
            cache_salt=self._salt(request.caller),
            member=lambda asked, other: self._bind(asked, other, plan),
            head=self._head(version),
            panel=plan.panel if arm == plan.decision.arm else None,
            rater=self._rater,
        )

    def _head(self, version: AdapterVersion | None) -> Callable[[str], Verdict] | None:
        if version is None or version.kind != HEAD:
            return None
        return functools.partial(self._heads.classify, version.ref.path, version.card)

    def _salt(self, caller: str) -> str:
        """One prefix-cache compartment a tenant: timing must not tell one tenant what another asked."""
        return hmac.new(self._secret, caller.encode(), hashlib.sha256).hexdigest()[:32]

    @contextlib.contextmanager
    def _counted(self, caller: str) -> Iterator[None]:
        self._answering[caller] += 1
        try:
            yield
        finally:
            self._answering[caller] -= 1
            self._answering += collections.Counter()  # those who ask no more are forgotten

    @contextlib.contextmanager
    def _using(self, versions: Iterable[AdapterVersion]) -> Iterator[None]:
        names = collections.Counter(version.ref.engine_name for version in versions)
        self._in_use.update(names)
        try:
            yield
        finally:
            self._in_use -= names  # what is at zero goes

    def in_use(self, engine_name: str) -> int:
        """How many answers are being made with that adapter now."""
        return self._in_use.get(engine_name, 0)

    # --- the other verbs -------------------------------------------------------------------------------------------

    async def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The embedder's unit vectors, [n, d]."""
        return await asyncio.to_thread(self.library.embedder.embed, list(texts))

    def decision(self, decision_id: str, caller: str) -> dict[str, Any]:
        """The record of a decision. Raises NotFound for one that is unknown or another caller's."""
        record = self.journal.get(decision_id, caller)
        if record is None:
            raise NotFound(f"There is no decision {decision_id[:80]!r}; its id is in the header x-hybrid-decision-id.")
        return record

    def feedback(self, decision_id: str, score: float, comment: str, caller: str) -> None:
        """Stores what a person thought of an answer, 0 to 1. Raises NotFound, BadRequest."""
        if not 0 <= score <= 1:
            raise BadRequest("`score` goes from 0 (useless) to 1 (right).", param="score")
        self.decision(decision_id, caller)
        self.journal.flush()
        self.state.add_feedback(decision_id=decision_id, score=score, comment=comment, caller=caller)

    async def load_adapter(self, name: str, path: Path | None) -> AdapterVersion:
        """Takes an adapter through preflight and canary to its alias. Raises Refused with the reason.

        With `path` the folder is copied into the store as a new version; without, `name` is a version (or the newest
        one) that was published already.
        """
        if path is not None:
            version = await asyncio.to_thread(self.store.adopt, name, path, self.loader.inspect)
            return await self.loader.load_now(version.id)
        self.store.refresh()
        spec = name if "@" in name else self._newest(name)
        return await self.loader.load_now(spec)

    def _newest(self, name: str) -> str:
        versions = [v for v in self.store.versions(name) if v.kind == LORA]
        if not versions:
            raise ModelNotFound(f"There is no adapter {name[:80]!r}; train one or give `lora_path`.", param="model")
        return versions[-1].id

    async def unload_adapter(self, name: str) -> None:
        """Retires an adapter: the version named, or the one its alias points to. Its files stay."""
        version = self.store.resolve(name)
        self.store.retire(version.name, version.version)
        await self.loader.settle()

    async def promote_adapter(self, name: str, version: int, revision: int | None = None) -> int:
        """Points `name` at a version once the engine holds it; returns the alias's revision.

        `revision` is the one the caller decided on (default: that of now, before the engine loads). Raises Conflict
        when the alias has moved since, ModelNotFound, Refused, NotReady.
        """
        await asyncio.to_thread(self.store.refresh)
        seen = self.store.revision(name) if revision is None else revision
        await self.loader.load_now(f"{name}@{version}")
        await asyncio.to_thread(self.store.promote, name, version, revision=seen)
        await self.loader.settle()
        return self.store.revision(name)

    async def rollback_adapter(self, name: str, revision: int | None = None) -> tuple[int, int]:
        """Points `name` back at the version before; returns it and the revision. Raises Conflict, ModelNotFound."""
        version = await asyncio.to_thread(self.store.rollback, name, revision=revision)
        await self.loader.settle()
        return version, self.store.revision(name)

    def models(self, caller: str = "local") -> list[JSON]:
        """OpenAI model objects of everything that a caller can ask for."""
        listed = catalog.models(
            self.store, self.library, self.shelves.names(), self.engine.status().model, self.settings.moa.panels
        )
        rights = self.keys.rights(caller)
        return listed if rights.admin else [model for model in listed if self.names.knows(model["id"], rights)]

    def status(self, caller: str = "local") -> JSON:
        """What `/v1/status` tells a caller."""
        ready, phase, _ = self.ready()
        measured, rights = self.state.measurements(), self.keys.rights(caller)
        mine = {name for name in self.store.names() if rights.may(Arm("adapter", (name,)))}
        return {
            "status": "ready" if ready else "not ready",
            "phase": phase,
            "engine": catalog.engine(self.engine.status()),
            "adapters": [
                catalog.adapter(v, self.store.alias(v.name), measured.get(v.id))
                for v in self.store.versions()
                if v.name in mine
            ],
            "aliases": {name: told for name, told in catalog.aliases(self.store).items() if name in mine},
            "corpora": catalog.corpora(self.library, rights),
            "gate": {
                "arms": [str(arm) for arm in self.decider.gate.arms() if rights.may(arm)],
                "version": live_version(self.settings.rooms),
                "feedback": live_version(self.settings.rooms, FEEDBACK),
            },
            "jobs": self.state.jobs(caller=None if rights.admin else caller),
            "versions": catalog.versions(),
        }

    def ready(self) -> tuple[bool, str, str]:
        """Whether an answer would work now; the phase and a detail in words."""
        status = self.engine.status()
        if status.ready and not self._enrolment.warm:
            return False, "warming the gate", "reading adapters and corpora"
        return status.ready, status.phase, status.detail or self.library.trouble

    def require_ready(self) -> None:
        """Raises NotReady with the phase while no answer would work."""
        ok, phase, detail = self.ready()
        if not ok:
            raise NotReady(f"Not ready: {phase}. {detail}".strip() + " Try again shortly; /readyz tells when.")


def _instruction(version: AdapterVersion | None) -> str:
    return str(version.card.get("instruction", "")) if version else ""


def _trained_with(version: AdapterVersion | None) -> int:
    """How many passages stood before each question in the training; 0 where none did, or nobody knows."""
    return int(version.card.get("passages") or 0) if version else 0


async def _played(plan: Plan, tools: Bound, record: Callable[[Decision], None]) -> AsyncGenerator[Event]:
    """Decided, then what the strategy yields, then Finished or Failed."""
    try:
        record(plan.decision)
        yield Decided(plan.decision)
        async with contextlib.aclosing(tools.play(plan.decision.arm)) as events:
            async for event in events:
                yield event
    except HybridError as error:
        yield Failed(error)
