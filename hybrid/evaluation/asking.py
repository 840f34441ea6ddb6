"""Whom the evaluator asks: a gateway in this process, or the server that runs in this home. Either way the answer is
made by the code that serves.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from hybrid.adapters.kinds import HEAD
from hybrid.errors import EngineError, EngineRejected, HybridError
from hybrid.evaluation.tasks import Task
from hybrid.gateway import Gateway
from hybrid.reach import answer as read_answer
from hybrid.rooms import sha256_file
from hybrid.settings import Settings
from hybrid.types import JSON
from hybrid.types.answer import fold
from hybrid.types.arm import Arm
from hybrid.types.event import Event, Usage
from hybrid.types.request import Message, Request

CALLER = "evaluation"
#: the header by which the owner of a home says that a request measures and is nobody's own
PURPOSE = "x-hybrid-purpose"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What came back for one question.

    `chosen` is the arm that answered, by a decision of that `confidence`; `shown` holds the texts of its `passages`,
    and `quoted` is how `text` ends where one of them follows the model's own words;
    `error` is `code: message` or None.
    """

    text: str = ""
    quoted: str = ""
    usage: Usage = field(default_factory=Usage)
    chosen: str = ""
    adapter: str | None = None
    confidence: float | None = None
    passages: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    error: str | None = None
    retry_after: float | None = None
    latency_ms: float = 0.0


class Asker(Protocol):
    """Someone who answers."""

    async def ask(self, arm: str, message: str, sampling: Mapping[str, Any]) -> Heard:
        """One answer. Errors are heard, never raised."""
        ...

    async def offer(self) -> Offer:
        """What can be asked for now."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """The models that can be asked for, and the facts by which one state of a home differs from another.

    `status` is what `/v1/status` returns; `settings` are those that change answers, by what reads them.
    """

    models: tuple[str, ...]
    status: JSON
    settings: JSON
    base: str

    @property
    def adapters(self) -> dict[str, JSON]:
        """Every version by `name@version`, and those that a bare name means by it."""
        found: dict[str, JSON] = {}
        for row in self.status["adapters"]:
            found[f"{row['name']}@{row['version']}"] = row
            if row["alias"]:
                found[row["name"]] = row
        return found

    @property
    def corpora(self) -> dict[str, JSON]:
        """The corpora by name; how much room one takes on disk says nothing of what it holds."""
        return {row["name"]: {k: v for k, v in row.items() if k != "bytes"} for row in self.status["corpora"]}

    def digest(self, arm: str, task: Task) -> str:
        """Names everything that this arm's answers to this task rest on, besides the question and the decoding."""
        parsed = None if arm == "auto" else Arm.parse(arm)
        strategy = parsed.strategy if parsed else "auto"
        panels = ("moa",) if parsed and parsed.confers else ()
        reads = (*_READS.get(strategy, _ROUTED), *panels)
        facts: list[Any] = [self.base, {name: self.settings[name] for name in reads}]
        if strategy in ("adapter", "adapter+rag") and parsed and parsed.adapter:
            facts.append(_identity(self.adapters.get(parsed.adapter)))
        if strategy in ("rag", "adapter+rag") and parsed:
            named = parsed.args[1:] if parsed.adapter else parsed.args
            facts.append([self.corpora.get(n) for n in named] or list(self.corpora.values()))
        if strategy == "few_shot":
            train = task.folder / "train.jsonl"
            facts.append(sha256_file(train) if train.is_file() else "")
            facts += [_identity(self.adapters.get(n)) for n in (parsed.args if parsed else ())]
        if strategy == "head" and parsed:
            heads = [r for r in self.status["adapters"] if r["kind"] == HEAD and r["name"] == parsed.args[0]]
            facts += [_identity(row) for row in heads]
        if strategy not in _READS:
            facts += [[_routed(row) for row in self.status["adapters"]], list(self.corpora.values())]
            facts += [self.settings["explore"]] if self.settings.get("explore") else []
            if (said := self.status["gate"].get("feedback")) is not None:
                facts += [said, self.settings["adjust_within"]]
            facts += [self.status["gate"].get("version"), [m for m in self.models if m.startswith("few_shot:")]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _identity(row: JSON | None) -> list[Any]:
    return [row["name"], row["version"], row["card"].get("sha256", "")] if row else []


def _routed(row: JSON) -> list[Any]:
    """What of a version decides whether the gate may choose it."""
    reason = (row.get("measured") or {}).get("reason", "")
    return [*_identity(row), row["alias"], row["state"] in ("rejected", "retired"), bool(reason)]


#: the settings of the gate that matter only where it explores or feedback taught it
_OF_USE = ("explore", "adjust_within")
#: the settings that the answers of whatever asks the gate depend on
_ROUTED = ("system_prompt", "few_shot_k", "retrieval", "gate")
#: strategy → the settings that its answers depend on, where it does not ask the gate
_READS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "prompt": ("system_prompt",),
    "adapter": (),
    "head": (),
    "few_shot": ("few_shot_k",),
    "rag": ("retrieval",),
    "adapter+rag": ("retrieval",),
}


def shown_settings(settings: Settings) -> JSON:
    """The settings that change answers, by what reads them; deadlines and the gate's log do not."""
    return {
        "system_prompt": settings.system_prompt,
        "few_shot_k": settings.gate.few_shot_k,
        "retrieval": settings.retrieval.model_dump(mode="json", exclude={"vector_engine"}),
        "gate": settings.gate.model_dump(mode="json", exclude={"deadline_ms", "log_vectors", *_OF_USE}),
        **{name: getattr(settings.gate, name) for name in _OF_USE},
        "moa": settings.moa.model_dump(mode="json", exclude={"deadline_s", "max_calls", "max_tokens"}),
    }


@dataclass(frozen=True, slots=True)
class Remembered:
    """Nobody to ask: for runs whose every outcome is kept already."""

    known: Offer

    async def offer(self) -> Offer:
        """What would be on offer."""
        return self.known

    async def ask(self, arm: str, message: str, sampling: Mapping[str, Any]) -> Heard:
        """An error: there is no engine."""
        return Heard(error=f"not_ready: nothing was started that could answer as {arm}")


class GatewayAsker:
    """Asks a gateway of this process. `base` names the base model's weights."""

    def __init__(self, gateway: Gateway, base: str) -> None:
        self._gateway = gateway
        self._base = base

    async def offer(self) -> Offer:
        """The gateway's models and status."""
        models = tuple(str(model["id"]) for model in self._gateway.models())
        return Offer(models, self._gateway.status(), shown_settings(self._gateway.settings), self._base)

    async def ask(self, arm: str, message: str, sampling: Mapping[str, Any]) -> Heard:
        """One answer through `Gateway.answer`, not streamed."""
        began = time.perf_counter()
        request = Request(
            id=f"eval-{uuid.uuid4().hex[:12]}",
            model=arm,
            messages=(Message("user", message),),
            sampling=sampling,
            caller=CALLER,
        )
        try:
            events: list[Event] = [event async for event in self._gateway.answer(request)]
        except HybridError as error:
            return _failed(error, began)
        answer = fold(events)
        if isinstance(answer.error, HybridError):
            return _failed(answer.error, began)
        return Heard(
            text=answer.text,
            quoted=answer.quoted,
            usage=answer.usage,
            chosen=str(answer.decision.arm) if answer.decision else "",
            adapter=answer.decision.adapter if answer.decision else None,
            confidence=answer.decision.confidence if answer.decision else None,
            passages=tuple(p.id for p in answer.passages),
            shown=() if answer.refused else tuple(f"{p.title}\n{p.text}" for p in answer.passages),
            latency_ms=_since(began),
        )


class ServerAsker:
    """Asks the server of this home over HTTP; `settings` as in `Offer`."""

    def __init__(self, session: aiohttp.ClientSession, settings: JSON, base: str) -> None:
        self._session = session
        self._settings = settings
        self._base = base

    async def offer(self) -> Offer:
        """The server's models and status. Raises EngineRejected, NotReady."""
        async with self._session.get("/v1/models") as models, self._session.get("/v1/status") as status:
            listed = await read_answer(models)
            names = tuple(str(model["id"]) for model in listed["data"])
            return Offer(names, await read_answer(status), self._settings, self._base)

    async def ask(self, arm: str, message: str, sampling: Mapping[str, Any]) -> Heard:
        """One chat completion."""
        began = time.perf_counter()
        body = {"model": arm, "messages": [{"role": "user", "content": message}], "hybrid": {"explain": True}}
        try:
            path, headers = "/v1/chat/completions", {PURPOSE: CALLER}
            async with self._session.post(path, json={**body, **sampling}, headers=headers) as response:
                told = await read_answer(response)
        except HybridError as error:
            status = getattr(error, "status", 500)
            return _failed(error, began, retry_after=2.0 if status in (429, 502, 503, 504) else None)
        why, usage = told["hybrid"], told.get("usage") or {}
        return Heard(
            text=told["choices"][0]["message"]["content"] or "",
            quoted=(why.get("quoted") or {}).get("text", ""),
            usage=Usage(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), why["calls"] or 0),
            chosen=why["arm"],
            adapter=why.get("adapter"),
            confidence=why.get("confidence"),
            passages=tuple(p["filename"] for p in why.get("passages", ())),
            shown=() if why.get("refused") else tuple(f"{p['title']}\n{p['quote']}" for p in why.get("passages", ())),
            latency_ms=_since(began),
        )


def _failed(error: HybridError, began: float, retry_after: float | None = None) -> Heard:
    wait = retry_after if retry_after is not None else error.retry_after
    if isinstance(error, EngineError) and not isinstance(error, EngineRejected):
        wait = 1.0  # it broke off; the next one may do
    return Heard(error=f"{error.code}: {error.message}", retry_after=wait, latency_ms=_since(began))


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)


#: strategies that cannot be asked without a name
_NAMED = ("adapter", "adapter+rag", "head")


def default_arms(task: Task, offer: Offer) -> list[str]:
    """The arms that apply to a task: everything offered, few-shot by its own examples, heads and mixed arms where they
    fit."""
    cards = offer.adapters
    arms = ["prompt"]
    for model in offer.models:
        strategy, _, rest = model.partition(":")
        named = rest.split(":")
        if strategy == "few_shot":
            arms += [model] if rest == task.name else []
        elif strategy == "adapter+rag":
            card = cards.get(named[0], {}).get("card", {})
            fits = card.get("corpus") == named[-1] or (card.get("task") == task.name == named[-1])
            arms += [model] if fits else []
        elif strategy == "head":
            # it says its labels and nothing else: elsewhere it is never right, but a check of form may let it pass
            arms += [model] if task.name in (named[0], cards.get(named[0], {}).get("card", {}).get("task")) else []
        elif strategy in ("rag", "mix", "moa", "self_moa"):
            arms.append(model)
        elif model in cards and "@" not in model:
            arms.append(f"adapter:{model}")
    return [*dict.fromkeys(arms), "auto"]


def chosen_arms(wanted: Sequence[str], task: Task, offer: Offer) -> list[str]:
    """The arms that a person asked for: `adapter`, `few_shot`, … alone mean those of that kind that apply, which may be
    none."""
    if not wanted:
        return default_arms(task, offer)
    every = default_arms(task, offer)
    arms: list[str] = []
    for name in wanted:
        name = name.removeprefix("hybrid/")
        of_kind = [arm for arm in every if arm.partition(":")[0] == name]
        arms += of_kind if of_kind or name in _NAMED else [spelled(name)]
    return list(dict.fromkeys(arms))


def spelled(model: str) -> str:
    """A model name as an arm: `bank` is `adapter:bank`."""
    if model == "auto":
        return model
    try:
        return str(Arm.parse(model))
    except ValueError:
        return f"adapter:{model}"
