"""Whether answers say more than the passages they were shown, over a task: the shares of `knowledge.support`."""

from __future__ import annotations

from hybrid.evaluation.measured import Measured
from hybrid.evaluation.statistics import estimate
from hybrid.knowledge.support import KINDS
from hybrid.types import JSON


def groundedness(task: Measured) -> JSON:
    """arm → kind → the mean supported share with its interval, for arms that were shown passages."""
    out: JSON = {}
    for arm in task.arms:
        kinds = {kind: [o.grounded[kind] for o in task.outcomes[arm] if kind in o.grounded] for kind in KINDS}
        found = {kind: estimate(shares).wire() for kind, shares in kinds.items() if shares}
        if found:
            out[arm] = found
    return out
