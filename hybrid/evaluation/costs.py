"""What an answer costs beside how good it is, and what it took to train for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hybrid.evaluation.measured import Measured, families
from hybrid.types import JSON
from hybrid.types.outcome import Outcome


def latency(outcomes: Sequence[Outcome]) -> JSON:
    """Half and 95 % of the answers came within so many ms."""
    times = [o.latency_ms for o in outcomes]
    return {"p50": round(float(np.percentile(times, 50)), 1), "p95": round(float(np.percentile(times, 95)), 1)}


def costs(tasks: Sequence[Measured]) -> JSON:
    """What an answer of each arm costs, the mean over tasks: tokens read and written, engine calls, ms.

    `pareto` marks the arms that no other arm beats in score without costing more tokens; `fast` the same for the p50.
    """
    out: JSON = {}
    for name, seen in families(tasks).items():
        rows = [task.outcomes[arm] for task, arm in seen]
        timed = [latency(row) for row in rows]
        out[name] = {
            "score": round(fmean(task.mean(arm) for task, arm in seen), 6),
            "tokens": {
                "prompt": _mean(fmean(o.prompt_tokens for o in row) for row in rows),
                "completion": _mean(fmean(o.completion_tokens for o in row) for row in rows),
            },
            "calls": _mean(fmean(o.calls for o in row) for row in rows),
            "latency_ms": {key: _mean(row[key] for row in timed) for key in ("p50", "p95")},
        }
    cheap = pareto({name: (sum(row["tokens"].values()), row["score"]) for name, row in out.items()})
    fast = pareto({name: (row["latency_ms"]["p50"], row["score"]) for name, row in out.items()})
    return {name: {**row, "pareto": name in cheap, "fast": name in fast} for name, row in out.items()}


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of (cost, quality) that none other dominates: cheaper or as cheap, as good or better, and not equal.

    Cheapest first.
    """
    front = [
        name
        for name, (cost, quality) in points.items()
        if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())
    ]
    return sorted(front, key=lambda name: points[name])


def training(adapters: Mapping[str, JSON]) -> JSON:
    """What each version (`name@version` → its row of the status) took to train, as its card says."""
    return {name: _trained(row) for name, row in adapters.items()}


def _trained(row: JSON) -> JSON:
    metrics, card = row.get("metrics") or {}, row.get("card") or {}
    seconds = metrics.get("seconds")
    return {
        "method": card.get("method"),
        "minutes": round(seconds / 60, 2) if isinstance(seconds, int | float) else None,
        "peak_memory_mb": metrics.get("peak_memory_mb"),
        "rows": metrics.get("train_rows") or card.get("examples"),
        "tokens": metrics.get("tokens"),
        "trained_parameters": metrics.get("trained_parameters"),
        "growth": card.get("growth"),
    }


def records(adapters: Mapping[str, JSON]) -> JSON:
    """What each version forgot, over-fits and repeats, as it was measured when it was published."""
    kept = ("forgetting", "skew", "gap")
    found = {name: row.get("measured") or {} for name, row in adapters.items()}
    return {name: {key: row.get(key) for key in kept} for name, row in found.items() if row.get("forgetting")}


def _mean(values: Iterable[Any]) -> float:
    return round(fmean(values), 2)
