"""Whether the gate knows when it is right: its confidence beside how often the arm it took was as good as any
(reliability diagrams: DeGroot & Fienberg 1983; expected calibration error: Naeini et al. 2015).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from hybrid.evaluation.comparing import by_example
from hybrid.evaluation.measured import AUTO, Measured
from hybrid.evaluation.statistics import estimate
from hybrid.types import JSON

BINS = 10


def calibration(tasks: Sequence[Measured]) -> JSON:
    """`{"n", "ece", "confidence", "right", "bins": [{"low", "high", "confidence", "right", "ci95", "n"}]}`.

    The gate is right where the arm it took scored as well as the best one on that example. Ten bins of equal width;
    `ece` is the mean distance of confidence from being right, each bin weighted by its answers. {} where the gate did
    not choose, or its confidence was not kept.
    """
    seen = [pair for task in tasks for pair in _told(task)]
    if not seen:
        return {}
    bins = [row for i in range(BINS) if (row := _bin(seen, i))]
    return {
        "n": len(seen),
        "ece": round(sum(b["n"] * abs(b["confidence"] - b["right"]) for b in bins) / len(seen), 6),
        "confidence": round(fmean(confidence for confidence, _ in seen), 6),
        "right": round(fmean(right for _, right in seen), 6),
        "bins": bins,
    }


def _told(task: Measured) -> list[tuple[float, float]]:
    """(confidence, 1 where the arm taken was as good as any) of every answer of the gate."""
    best = {name: max(scores.values()) for name, scores in by_example(task).items()}
    return [
        (o.confidence, float(o.score >= best[o.id]))
        for o in task.outcomes.get(AUTO, ())
        if o.confidence is not None and o.id in best
    ]


def _bin(seen: Sequence[tuple[float, float]], i: int) -> JSON:
    inside = [(c, right) for c, right in seen if min(int(c * BINS), BINS - 1) == i]
    if not inside:
        return {}
    found = estimate([right for _, right in inside])
    return {
        "low": i / BINS,
        "high": (i + 1) / BINS,
        "confidence": round(fmean(c for c, _ in inside), 6),
        "right": round(found.score, 6),
        "ci95": [round(found.low, 6), round(found.high, 6)],
        "n": found.n,
    }
