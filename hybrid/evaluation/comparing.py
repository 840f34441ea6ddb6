"""Arms against one another: the gate beside random, the best single arm, the best of each task and the oracle; paired
tests on the same examples; who wins, and how surely.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import fmean

from hybrid.evaluation.measured import AUTO, Measured, families
from hybrid.evaluation.statistics import CONFIDENCE, holm, mean_of_tasks, paired
from hybrid.types import JSON

NO_DIFFERENCE = "no significant difference"

Named = Mapping[str, str]  # task → what an arm is called there


def overall(tasks: Sequence[Measured]) -> JSON:
    """The mean over tasks of each arm that was measured on all of them, best first."""
    out = {}
    for name, seen in families(tasks).items():
        scores = [list(task.scores(arm).values()) for task, arm in seen]
        documents = [[task.documents.get(i, i) for i in task.scores(arm)] for task, arm in seen]
        out[name] = mean_of_tasks(scores, documents).wire()
    return dict(sorted(out.items(), key=lambda item: -item[1]["score"]))


# --- the gate ------------------------------------------------------------------------------------------------------


def router(tasks: Sequence[Measured]) -> JSON:
    """The gate beside what it could have been. Empty where no arm but `auto` was measured."""
    if not tasks or not all(task.fixed for task in tasks):
        return {}
    fixed = {name: seen for name, seen in families(tasks).items() if name != AUTO}
    out: JSON = {
        "random": _over(tasks, fmean),
        "best_per_task": round(fmean(max(task.mean(arm) for arm in task.fixed) for task in tasks), 6),
        "oracle": _over(tasks, max),
    }
    if fixed:
        means = {name: fmean(task.mean(arm) for task, arm in seen) for name, seen in fixed.items()}
        best = max(means, key=lambda name: means[name])
        out["best_single"] = {"arm": best, "score": round(means[best], 6)}
    if all(AUTO in task.arms for task in tasks):
        out["auto"] = round(fmean(task.mean(AUTO) for task in tasks), 6)
        out["arm_accuracy"] = round(fmean(_arm_accuracy(task) for task in tasks), 6)
        out["regret"] = round(out["oracle"] - out["auto"], 6)
        if fixed:
            room = out["oracle"] - out["best_single"]["score"]
            out["recovered"] = round((out["auto"] - out["best_single"]["score"]) / room, 6) if room > 0 else None
    return out


def by_example(task: Measured) -> dict[str, dict[str, float]]:
    """Example id → the score of each fixed arm that was asked it."""
    found: dict[str, dict[str, float]] = {}
    for arm in task.fixed:
        for name, score in task.scores(arm).items():
            found.setdefault(name, {})[arm] = score
    return found


def _over(tasks: Sequence[Measured], summary: Callable[[list[float]], float]) -> float:
    """The mean over tasks of a summary of each example's scores over its fixed arms."""
    totals = [fmean(summary(list(scores.values())) for scores in by_example(task).values()) for task in tasks]
    return round(fmean(totals), 6)


def _arm_accuracy(task: Measured) -> float:
    """How often the arm that the gate took scored as well as the best one did."""
    best = {name: max(scores.values()) for name, scores in by_example(task).items()}
    hits = [score >= best[name] for name, score in task.scores(AUTO).items() if name in best]
    return fmean(hits) if hits else 0.0


# --- paired tests --------------------------------------------------------------------------------------------------


def comparisons(tasks: Sequence[Measured]) -> list[JSON]:
    """The gate (the best arm without one) against every other arm, over all tasks and on each."""
    rows = _against(tasks, _over_all(tasks), {})
    if len(tasks) > 1:
        for task in tasks:
            rows += _against([task], {arm: {task.name: arm} for arm in task.arms}, {"task": task.name})
    return _corrected(rows)


def winner(tasks: Sequence[Measured]) -> JSON:
    """The arm that scores highest over all tasks, beside every other one: whom it beats, and whom it does not.

    Corrected for that many comparisons; that the winner was picked by the same scores is not. {} without arms.
    """
    arms = _over_all(tasks)
    if not arms:
        return {}
    means = _means(tasks, arms)
    best = max(means, key=lambda name: (means[name], name != AUTO))
    rows = _corrected(_rows(tasks, arms, best, {}))
    second = max(rows, key=lambda row: means[row["b"]], default=None)
    return {
        "arm": best,
        "score": round(means[best], 6),
        "beats": [row["b"] for row in rows if row["verdict"] == _better(best, row["b"])],
        "level_with": [row["b"] for row in rows if row["verdict"] != _better(best, row["b"])],
        "second": second,
        "p_holm": max((row["p_holm"] for row in rows), default=None),
    }


def wins(tasks: Sequence[Measured]) -> JSON:
    """a → b → `{"win", "tie", "loss"}`: the share of shared examples on which a scores above, as, or below b."""
    arms = _over_all(tasks)
    return {a: {b: _shares(tasks, arms[a], arms[b]) for b in arms if b != a} for a in arms}


def _shares(tasks: Sequence[Measured], a: Named, b: Named) -> JSON:
    pairs = [pair for task in tasks for pair in zip(*_common(task, a, b)[:2], strict=True)]
    n = max(1, len(pairs))
    won, lost = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
    return {
        "win": round(won / n, 4), "tie": round((len(pairs) - won - lost) / n, 4),
        "loss": round(lost / n, 4), "n": len(pairs),
    }  # fmt: skip


def _over_all(tasks: Sequence[Measured]) -> dict[str, Named]:
    return {name: {task.name: arm for task, arm in seen} for name, seen in families(tasks).items()}


def _means(tasks: Sequence[Measured], arms: Mapping[str, Named]) -> dict[str, float]:
    return {name: fmean(task.mean(called[task.name]) for task in tasks) for name, called in arms.items()}


def _against(tasks: Sequence[Measured], arms: Mapping[str, Named], more: JSON) -> list[JSON]:
    """Rows of the gate, or the best arm, against each other arm."""
    means = _means(tasks, arms)
    if len(means) < 2:
        return []
    return _rows(tasks, arms, AUTO if AUTO in means else max(means, key=lambda name: means[name]), more)


def _rows(tasks: Sequence[Measured], arms: Mapping[str, Named], a: str, more: JSON) -> list[JSON]:
    """Rows of `a` against each other arm; one that shares no example with it on some task has none."""
    rows = []
    for b in arms:
        found = [_common(task, arms[a], arms[b]) for task in tasks]
        if b != a and all(left for left, _, _ in found):
            difference = paired([(left, right) for left, right, _ in found], [shared for _, _, shared in found])
            rows.append({**more, "a": a, "b": b, **difference.wire()})
    return rows


def _common(task: Measured, a: Named, b: Named) -> tuple[list[float], list[float], list[Hashable]]:
    """The scores of two arms on the examples both answered, and what those share with one another."""
    left, right, documents = task.scores(a[task.name]), task.scores(b[task.name]), task.documents
    ids = [name for name in left if name in right]
    return [left[i] for i in ids], [right[i] for i in ids], [documents.get(i, i) for i in ids]


def _corrected(rows: list[JSON]) -> list[JSON]:
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = round(p, 6)
        row["verdict"] = _verdict(row)
    return rows


def _verdict(row: JSON) -> str:
    if row["p_holm"] >= 1 - CONFIDENCE:
        return NO_DIFFERENCE
    return _better(row["a"], row["b"]) if row["diff"] > 0 else _better(row["b"], row["a"])


def _better(a: str, b: str) -> str:
    return f"{a} is better than {b}"
