"""What a suite would do, before it does it: adapters to train, questions to ask, and about how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.adapters.store import AdapterStore
from hybrid.evaluation.asking import Offer
from hybrid.evaluation.inventory import with_planned
from hybrid.evaluation.plan import START_S, Part, parts
from hybrid.evaluation.runner import Ledger
from hybrid.evaluation.suite import Subject, Suite, questions
from hybrid.knowledge.search import Library
from hybrid.lifecycle.suite_adapters import minutes, missing, missing_corpora, orders
from hybrid.models import ModelFiles, is_small
from hybrid.settings import Settings
from hybrid.types import JSON

#: passages that are cut, embedded and written in a minute on two cores
PASSAGES_PER_MINUTE = 4000.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Minutes by adapter and by corpus, and the parts of what is asked."""

    suite: str
    corpora: dict[str, float]
    adapters: dict[str, float]
    parts: tuple[Part, ...]

    @property
    def training(self) -> float:
        """Minutes of training in all."""
        return sum(self.adapters.values())

    @property
    def minutes(self) -> float:
        """Minutes in all, the engine's start among them where anything is asked."""
        asking = sum(part.minutes for part in self.parts)
        return self.training + sum(self.corpora.values()) + asking + (START_S / 60 if asking else 0.0)

    def wire(self) -> JSON:
        """As `--json` shows it."""
        return {
            "suite": self.suite,
            "corpora": {name: round(value, 1) for name, value in self.corpora.items()},
            "adapters": {name: round(value, 1) for name, value in self.adapters.items()},
            "parts": [part.wire() for part in self.parts],
            "questions": sum(part.questions for part in self.parts),
            "open": sum(part.open for part in self.parts),
            "minutes": round(self.minutes, 1),
        }

    def __str__(self) -> str:
        made = [*((f"index {name}", m) for name, m in self.corpora.items())]
        made += [(f"train {name}", m) for name, m in self.adapters.items()]
        lines = [f"{what:<40} {took:6.1f} min" for what, took in made]
        for part in self.parts:
            tokens = f"{part.prompt:,} + {part.answer:,} tokens"
            lines.append(f"{f'ask {part.kind}: {part.open} of {part.questions}':<40} {part.minutes:6.1f} min  {tokens}")
        return "\n".join([*lines, f"{'in all, about':<40} {self.minutes:6.1f} min"])


def planned(
    suite: Suite,
    found: Sequence[Subject],
    offer: Offer,
    out: Path,
    settings: Settings,
    model: ModelFiles,
    store: AdapterStore,
    library: Library,
    count: Callable[[str], int],
) -> Plan:
    """The plan of a suite for a home as it is. Raises what a run would raise before it asks."""
    corpora = missing_corpora(suite, found, settings, library)
    todo = missing(orders(suite, settings), store, model, library.embedder)
    cards = {
        o.name: {"task": o.task.name, **({"corpus": o.name} if o.recipe.method == "raft" else {})}
        for o in todo
        if not o.is_head
    }
    whole = with_planned(offer, cards, [o.name for o in todo if o.is_head], [task.name for task in corpora])
    jobs = questions(suite, found, whole)
    shown = settings.retrieval.shown(small=is_small(model))
    return Plan(
        suite=suite.name,
        corpora={task.name: _passages(task.folder) / PASSAGES_PER_MINUTE for task in corpora},
        adapters={f"{o.name} ({o.recipe.method})": minutes(o, count, shown) for o in todo},
        parts=tuple(parts(jobs, whole, Ledger(out), count, settings)),
    )


def _passages(folder: Path) -> int:
    with (folder / "corpus.jsonl").open("rb") as file:
        return sum(1 for _ in file)
