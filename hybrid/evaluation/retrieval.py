"""How good the search was, apart from what a model made of it: whether the passages shown hold the answer's own."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hybrid.evaluation.measured import Measured
from hybrid.types import JSON

CUT = 10


def retrieval(task: Measured) -> JSON:
    """arm → `{"n", "shown", "recall@1", …, "recall@<shown>", "mrr", "ndcg@10"}` for arms that searched.

    Over the examples that name their `gold_passages`; a piece `D#k` of a passage `D` counts as it. `shown` is the most
    passages any answer saw: what was not shown was not found.
    """
    gold = {e.id: [str(g) for g in e.meta["gold_passages"]] for e in task.examples if e.meta.get("gold_passages")}
    out: JSON = {}
    for arm in task.arms:
        found = [(gold[o.id], o.passages) for o in task.outcomes[arm] if o.id in gold and o.error is None]
        if any(passages for _, passages in found):
            out[arm] = _measures(found)
    return out


def _measures(found: Sequence[tuple[list[str], tuple[str, ...]]]) -> JSON:
    shown = max(len(passages) for _, passages in found)
    at = sorted({k for k in (1, 3, 5, CUT) if k < shown} | {shown})
    return {
        "n": len(found),
        "shown": shown,
        **{f"recall@{k}": round(fmean(_recall(gold, passages[:k]) for gold, passages in found), 6) for k in at},
        "mrr": round(fmean(_reciprocal(gold, passages) for gold, passages in found), 6),
        f"ndcg@{CUT}": round(fmean(ndcg(gold, passages) for gold, passages in found), 6),
    }


def _is(passage: str, gold: str) -> bool:
    return passage == gold or passage.startswith(gold + "#")


def _recall(gold: Sequence[str], passages: Sequence[str]) -> float:
    return fmean(any(_is(p, g) for p in passages) for g in gold)


def _reciprocal(gold: Sequence[str], passages: Sequence[str]) -> float:
    ranks = (rank for rank, p in enumerate(passages, 1) if any(_is(p, g) for g in gold))
    return 1 / next(ranks, float("inf"))


def ndcg(gold: Sequence[str], passages: Sequence[str]) -> float:
    """nDCG@10 (Järvelin & Kekäläinen 2002) by scikit-learn: 1 when the gold passages come first."""
    from sklearn.metrics import ndcg_score

    left = list(gold)
    gains: list[float] = []
    for passage in passages[:CUT]:
        hit = next((g for g in left if _is(passage, g)), None)
        gains.append(float(hit is not None))
        left = [g for g in left if g != hit]
    ranked = [*gains, *[0.0] * (CUT - len(gains)), *[1.0] * len(left)]  # what was not shown stands below the cut
    scores: list[Any] = [list(range(len(ranked), 0, -1))]
    return float(ndcg_score([ranked], scores, k=CUT)) if any(ranked) else 0.0
