"""What an adapter is worth, measured on its own dev split while the server is idle, and kept as its record.

Beside its score and those of the arms that need no training: what it forgot (general questions, other adapters' dev
splits, before and after), how far it fits its training rows better than others, and whether it repeats some labels
more than its training rows did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybrid import evaluation
from hybrid.adapters.listing import AdapterVersion
from hybrid.errors import DataError, HybridError
from hybrid.evaluation.asking import GatewayAsker, Heard, Offer
from hybrid.evaluation.metrics import METRICS, Example, Metric, contains
from hybrid.evaluation.runner import Ledger, jobs_for, run, sample, token_limit
from hybrid.evaluation.statistics import estimate, total_variation
from hybrid.evaluation.tasks import DevSplit, Task, read_examples
from hybrid.gateway import Gateway
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

log = logging.getLogger("hybrid.lifecycle")

DEV = "dev.jsonl"
LIMIT, OTHERS_LIMIT = 64, 16
_GENERAL = Path(evaluation.__file__).with_name("general.jsonl")
_GENERAL_TOKENS = 48
_INFLIGHT = 8  # a batch worth computing, and small enough for a person's request beside it
_EVERY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The record of one version. `arms` maps each arm to `{"score", "ci95", "n"}`; `own` is the adapter's.

    `forgetting` maps `general` and every other adapter to `{"before", "after", "n"}`: the base's score and this
    adapter's. `gap` is dev loss less training loss, in nats a token. `skew` holds total variation distances from the
    labels of the training rows, 0 to 1: of the adapter's answers, and of the right answers to the same questions.
    """

    name: str
    version: int
    own: str = ""
    metric: str = ""
    arms: Mapping[str, JSON] = field(default_factory=dict)
    forgetting: Mapping[str, JSON] = field(default_factory=dict)
    gap: float | None = None
    skew: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    at: float = 0.0

    def record(self) -> JSON:
        """As it is stored and shown; `reason` says why `auto` leaves the version alone, if it does."""
        return {**asdict(self), "reason": usable(self)}


def usable(measurement: Measurement) -> str:
    """Why `auto` must not use the version: its interval lies below the best untrained arm. "" when it may."""
    own = measurement.arms.get(measurement.own)
    rivals = {arm: row["score"] for arm, row in measurement.arms.items() if arm != measurement.own}
    if own is None or not rivals:
        return ""
    best = max(rivals, key=lambda arm: float(rivals[arm]))
    low, high = own["ci95"]
    if high >= rivals[best]:
        return ""
    kind = best.partition(":")[0]
    return (
        f"its dev interval [{low:.2f}, {high:.2f}] lies below the best of its untrained arms ({kind} "
        f"{rivals[best]:.2f}); it answers when it is named"
    )


async def measure(gateway: Gateway, version: AdapterVersion, limit: int = LIMIT) -> Measurement:
    """Measures a version that can be served, through the gateway, giving way to everybody else.

    Answers are kept in `.hybrid/measured`, so a measurement that was cut short goes on. Raises DataError for a version
    without dev examples.
    """
    asker = _Polite(gateway)
    offer = await asker.offer()
    ledger = Ledger(gateway.settings.rooms.hidden / "measured")
    try:
        desk = _Desk(gateway, asker, offer, ledger)
        split = await asyncio.to_thread(own_dev, version)
        own = _own_arm(version, offer)
        rivals = [f"few_shot:{version.name}", f"rag:{version.card.get('corpus')}"]
        arms = [own, "prompt", *(arm for arm in rivals if arm in offer.models)]
        asked = await desk.ask(split, arms, limit)
        return Measurement(
            name=version.name,
            version=version.version,
            own=own,
            metric=split.task.metric,
            arms={arm: estimate([o.score for o in found]).wire() for arm, found in asked.items()},
            forgetting=await _forgetting(desk, version),
            gap=_gap(version.card.get("metrics", {})),
            skew=await asyncio.to_thread(_skew, version, split, asked[own]),
            at=round(time.time(), 1),
        )
    finally:
        ledger.close()


class _Polite(GatewayAsker):
    """Asks only while nobody else does."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(gateway, str(gateway.settings.model))
        self._mine = 0

    async def ask(self, arm: str, message: str, sampling: Mapping[str, Any]) -> Heard:
        while self._gateway.answering > self._mine:  # noqa: ASYNC110  the gateway counts, it announces nothing
            await asyncio.sleep(0.1)
        self._mine += 1
        try:
            return await super().ask(arm, message, sampling)
        finally:
            self._mine -= 1


@dataclass(frozen=True, slots=True)
class _Desk:
    """What asking needs, together."""

    gateway: Gateway
    asker: _Polite
    offer: Offer
    ledger: Ledger

    async def ask(
        self, split: DevSplit, arms: Sequence[str], limit: int | None, score: Metric | None = None, room: int = 0
    ) -> dict[str, list[Outcome]]:
        """The outcomes of each arm on a sample of a split."""
        room = room or await asyncio.to_thread(token_limit, [split], self.gateway.count_tokens)
        kept = sample(split.examples, limit)
        jobs = [j for arm in arms for j in jobs_for(split.task, kept, arm, self.offer, room, score)]
        found: dict[str, list[Outcome]] = {}
        for outcome in await run(self.asker, jobs, self.ledger, inflight=_INFLIGHT):
            found.setdefault(outcome.arm, []).append(outcome)
        return found


def _own_arm(version: AdapterVersion, offer: Offer) -> str:
    corpus = version.card.get("corpus")
    return f"adapter+rag:{version.id}:{corpus}" if corpus in offer.corpora else f"adapter:{version.id}"


def own_dev(version: AdapterVersion) -> DevSplit:
    """The dev examples that the trainer put into the version's folder. Raises DataError."""
    card, path = version.card, version.ref.path / DEV
    if not path.is_file():
        raise DataError(f"{version.id} brought no {DEV}; adapters trained here do.")
    metric = card.get("metric") if card.get("metric") in METRICS else "token_f1"
    task = Task(version.name, str(metric), str(card.get("instruction") or ""), folder=version.ref.path)
    return DevSplit(task, tuple(read_examples(path, task)))


async def _forgetting(desk: _Desk, version: AdapterVersion) -> dict[str, JSON]:
    """What the base and the adapter score where the adapter was not trained."""
    arm = f"adapter:{version.id}"
    task = Task("general", "token_f1", folder=_GENERAL.parent)
    general = DevSplit(task, tuple(read_examples(_GENERAL, task)))
    asked = await desk.ask(general, ["prompt", arm], None, contains, _GENERAL_TOKENS)
    out = {"general": _before_after(asked, arm)}
    store = desk.gateway.store
    for name in store.names():
        live = store.alias(name)
        if live is None or name == version.name:
            continue
        with contextlib.suppress(DataError):
            other = await asyncio.to_thread(own_dev, store.resolve(f"{name}@{live}"))
            out[name] = _before_after(await desk.ask(other, ["prompt", arm], OTHERS_LIMIT), arm)
    return out


def _before_after(asked: Mapping[str, Sequence[Outcome]], arm: str) -> JSON:
    before, after = (estimate([o.score for o in asked[a]]).wire() for a in ("prompt", arm))
    return {"before": before["score"], "after": after["score"], "after_ci95": after["ci95"], "n": after["n"]}


def _gap(metrics: Mapping[str, Any]) -> float | None:
    losses = (metrics.get("dev_loss"), metrics.get("train_loss"))
    return round(losses[0] - losses[1], 4) if all(isinstance(x, int | float) for x in losses) else None  # type: ignore[operator]


def _skew(version: AdapterVersion, split: DevSplit, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """How far the adapter's labels are from those of its training rows; nothing for open tasks."""
    trained = _references(version.ref.path / "examples.jsonl")
    labels = {_label(x) for x in version.card.get("labels") or ()} or set(trained)
    if len(labels) * 2 > sum(trained.values()):  # most answers occur once: no labels
        return {}
    right: dict[str, Example] = {e.id: e for e in split.examples}
    said = Counter(_label(o.answer) for o in outcomes)
    due = Counter(_label(right[o.id].reference) for o in outcomes)
    return {"answers": round(total_variation(said, trained), 4), "right": round(total_variation(due, trained), 4)}


def _references(path: Path) -> Counter[str]:
    if not path.is_file():
        return Counter()
    with path.open(encoding="utf-8") as file:
        return Counter(_label(json.loads(line)["reference"]) for line in file if line.strip())


def _label(text: Any) -> str:
    return str(text).strip().casefold()


class Measuring:
    """Measures every live version that has no record yet, one after the other, whenever the server is idle."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def run(self) -> None:
        """Looks forever. A version that cannot be measured gets a record that says why."""
        while True:
            version = await asyncio.to_thread(self.waiting) if self._idle() else None
            if version is None:
                await asyncio.sleep(_EVERY_S)
                continue
            measurement = await self._measured(version)
            if measurement:
                await asyncio.to_thread(self._gateway.state.put_measurement, version.id, measurement.record())

    def _idle(self) -> bool:
        return self._gateway.ready()[0] and not self._gateway.answering

    def waiting(self) -> AdapterVersion | None:
        """A live version without a record; None where all have one."""
        store, known = self._gateway.store, self._gateway.state.measurements()
        for name in store.names():
            live = store.alias(name)
            if live is not None and f"{name}@{live}" not in known:
                return store.resolve(f"{name}@{live}")
        return None

    async def _measured(self, version: AdapterVersion) -> Measurement | None:
        """The measurement; None when the engine went away meanwhile, so that it is tried again."""
        try:
            return await measure(self._gateway, version)
        except DataError as error:
            return Measurement(name=version.name, version=version.version, error=error.message, at=time.time())
        except (HybridError, OSError) as error:
            log.warning("%s is measured later: %s", version.id, error)
            await asyncio.sleep(30 * _EVERY_S)
            return None
