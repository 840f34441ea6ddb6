"""What a run found, as the report reads it: tasks with the outcomes of their arms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from hybrid.evaluation.metrics import Example
from hybrid.evaluation.statistics import Estimate, estimate
from hybrid.types.arm import Arm
from hybrid.types.outcome import Outcome

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Measured:
    """One task with the outcomes of its arms. An arm may have been asked fewer examples than another."""

    name: str
    metric: str
    examples: tuple[Example, ...]
    outcomes: Mapping[str, tuple[Outcome, ...]]
    instruction: str = ""

    def scores(self, arm: str) -> dict[str, float]:
        """Example id → score."""
        return {o.id: o.score for o in self.outcomes.get(arm, ())}

    def mean(self, arm: str) -> float:
        """The mean score of an arm that was asked."""
        return fmean(self.scores(arm).values())

    @property
    def arms(self) -> list[str]:
        """The arms that were asked anything."""
        return [arm for arm, outcomes in self.outcomes.items() if outcomes]

    @property
    def fixed(self) -> list[str]:
        """The arms that are not the gate."""
        return [arm for arm in self.arms if arm != AUTO]

    @property
    def documents(self) -> dict[str, Hashable]:
        """Example id → what it shares with others: the document that its answer stands in, its group, or nothing."""
        return {e.id: _document(e) for e in self.examples}

    def estimate(self, arm: str) -> Estimate:
        """The mean score of an arm with its interval."""
        documents, scores = self.documents, self.scores(arm)
        return estimate(list(scores.values()), [documents.get(i, i) for i in scores])


def _document(example: Example) -> Hashable:
    meta = example.meta
    gold = meta.get("gold_passages")
    document = meta.get("document") or meta.get("group") or (str(gold[0]).partition("#")[0] if gold else None)
    return ("document", str(document)) if document else example.id


def family(arm: str, task: str) -> str:
    """The one arm that `arm` is, over all tasks: `few_shot` by a task's own examples, `rag` on its own corpus."""
    if arm == AUTO:
        return AUTO
    parsed = Arm.parse(arm)
    return parsed.strategy if parsed.strategy in ("few_shot", "rag", "head") and parsed.args == (task,) else arm


def families(tasks: Sequence[Measured]) -> dict[str, list[tuple[Measured, str]]]:
    """Each arm that was measured on every task, with what it is called there."""
    found: dict[str, list[tuple[Measured, str]]] = {}
    for task in tasks:
        for arm in task.arms:
            found.setdefault(family(arm, task.name), []).append((task, arm))
    return {name: seen for name, seen in found.items() if len(seen) == len(tasks)}
