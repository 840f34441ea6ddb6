"""Outcomes summarised: `report.json` and `report.md`, with n and an interval everywhere, the gate always beside random,
the best single arm, the best arm of each task and the oracle.

Read by people, by the gate's trainer and by the advisor; `outcomes.jsonl` beside it holds the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.evaluation.metrics import Example
from hybrid.evaluation.statistics import Estimate, estimate, holm, mean_of_tasks, paired
from hybrid.rooms import write_json
from hybrid.types import JSON, Arm, Outcome

AUTO = "auto"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Measured:
    """One task with the outcomes of its arms. An arm may have been asked fewer examples than another."""

    name: str
    metric: str
    examples: tuple[Example, ...]
    outcomes: Mapping[str, tuple[Outcome, ...]]

    def scores(self, arm: str) -> dict[str, float]:
        """Example id → score."""
        return {o.id: o.score for o in self.outcomes.get(arm, ())}

    @property
    def fixed(self) -> list[str]:
        """The arms that are not the gate."""
        return [arm for arm in self.outcomes if arm != AUTO]


def family(arm: str, task: str) -> str:
    """The one arm that `arm` is, over all tasks: `few_shot` by a task's own examples, `rag` on its own corpus."""
    if arm == AUTO:
        return AUTO
    parsed = Arm.parse(arm)
    return parsed.strategy if parsed.strategy in ("few_shot", "rag", "head") and parsed.args == (task,) else arm


def build(suite: str, split: str, tasks: Sequence[Measured], *, base_model: str, gate: str) -> JSON:
    """The content of `report.json` (INTERFACES: a report folder)."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "split": split,
        "base_model": base_model,
        "gate": gate,
        "tasks": {task.name: _task(task) for task in tasks},
        "overall": _overall(tasks),
        "router": _router(tasks),
        "comparisons": _comparisons(tasks),
        "notes": {
            "interval": "95 %: Wilson for rates, percentile bootstrap otherwise, by document where examples share one",
            "comparisons": "paired on the examples both arms answered; p_holm is corrected for all rows of this list",
            "overall": "the mean over tasks",
        },
    }


def write(out: Path, report: JSON) -> None:
    """Writes `report.json` and `report.md` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    write_json(out / "report.json", report)


# --- one task ------------------------------------------------------------------------------------------------------


def _task(task: Measured) -> JSON:
    arms = {arm: _arm(task, outcomes) for arm, outcomes in task.outcomes.items() if outcomes}
    return {"metric": task.metric, "n": len(task.examples), "arms": arms}


def _arm(task: Measured, outcomes: Sequence[Outcome]) -> JSON:
    latency = np.array([o.latency_ms for o in outcomes])
    return {
        **_estimate(task, outcomes).wire(),
        "latency_ms": {"p50": round(float(np.percentile(latency, 50)), 1), "p95": _p95(latency)},
        "tokens": {"prompt": _mean(o.prompt_tokens for o in outcomes), "completion": _completion(outcomes)},
        "calls": _mean(o.calls for o in outcomes),
        "errors": sum(o.error is not None for o in outcomes),
    }


def _p95(latency: np.ndarray[Any, Any]) -> float:
    return round(float(np.percentile(latency, 95)), 1)


def _completion(outcomes: Sequence[Outcome]) -> float:
    return _mean(o.completion_tokens for o in outcomes)


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 2)


def _estimate(task: Measured, outcomes: Sequence[Outcome]) -> Estimate:
    documents = {e.id: _document(e) for e in task.examples}
    return estimate([o.score for o in outcomes], [documents.get(o.id, o.id) for o in outcomes])


def _document(example: Example) -> Hashable:
    """What an example shares with others: the document that its answer stands in, or nothing."""
    gold = example.meta.get("gold_passages")
    document = example.meta.get("document") or (str(gold[0]).partition("#")[0] if gold else None)
    return ("document", str(document)) if document else example.id


# --- all tasks -----------------------------------------------------------------------------------------------------


def _families(tasks: Sequence[Measured]) -> dict[str, list[tuple[Measured, str]]]:
    """Each arm that was measured on every task, with what it is called there."""
    found: dict[str, list[tuple[Measured, str]]] = {}
    for task in tasks:
        for arm, outcomes in task.outcomes.items():
            if outcomes:
                found.setdefault(family(arm, task.name), []).append((task, arm))
    return {name: seen for name, seen in found.items() if len(seen) == len(tasks)}


def _overall(tasks: Sequence[Measured]) -> JSON:
    out = {}
    for name, seen in _families(tasks).items():
        one = _estimate(seen[0][0], seen[0][0].outcomes[seen[0][1]]) if len(seen) == 1 else None
        out[name] = (one or mean_of_tasks([list(t.scores(arm).values()) for t, arm in seen])).wire()
    return dict(sorted(out.items(), key=lambda item: -item[1]["score"]))


def _router(tasks: Sequence[Measured]) -> JSON:
    """The gate beside what it could have been. Empty where no arm but `auto` was measured."""
    fixed = {name: seen for name, seen in _families(tasks).items() if name != AUTO}
    with_arms = [task for task in tasks if any(task.outcomes[arm] for arm in task.fixed)]
    if not with_arms or len(with_arms) < len(tasks):
        return {}
    out: JSON = {
        "random": _over(tasks, lambda scores: [float(np.mean(s)) for s in scores]),
        "best_per_task": round(float(np.mean([max(_means(task).values()) for task in tasks])), 6),
        "oracle": _over(tasks, lambda scores: [max(s) for s in scores]),
    }
    if fixed:
        means = {n: float(np.mean([_means(t)[arm] for t, arm in seen])) for n, seen in fixed.items()}
        best = max(means, key=lambda name: means[name])
        out["best_single"] = {"arm": best, "score": round(means[best], 6)}
    if all(task.outcomes.get(AUTO) for task in tasks):
        out["auto"] = round(float(np.mean([np.mean(list(t.scores(AUTO).values())) for t in tasks])), 6)
        out["arm_accuracy"] = _arm_accuracy(tasks)
        if "best_single" in out:
            room = out["oracle"] - out["best_single"]["score"]
            out["regret"] = round(out["oracle"] - out["auto"], 6)
            out["recovered"] = round((out["auto"] - out["best_single"]["score"]) / room, 6) if room > 0 else None
    return out


def _means(task: Measured) -> dict[str, float]:
    return {arm: float(np.mean([o.score for o in task.outcomes[arm]])) for arm in task.fixed if task.outcomes[arm]}


def _over(tasks: Sequence[Measured], summary: Any) -> float:
    """The mean over tasks of a summary of each example's scores over its fixed arms."""
    totals = []
    for task in tasks:
        by_arm = [task.scores(arm) for arm in task.fixed]
        per_example = [[s[e.id] for s in by_arm if e.id in s] for e in task.examples]
        totals.append(float(np.mean(summary([s for s in per_example if s]))))
    return round(float(np.mean(totals)), 6)


def _arm_accuracy(tasks: Sequence[Measured]) -> float:
    """How often the arm that the gate took scored as well as the best one did, the mean over tasks."""
    totals = []
    for task in tasks:
        by_arm = [task.scores(arm) for arm in task.fixed]
        best = {e.id: max((s[e.id] for s in by_arm if e.id in s), default=None) for e in task.examples}
        hits = [s >= b for i, s in task.scores(AUTO).items() if (b := best.get(i)) is not None]
        totals.append(float(np.mean(hits)) if hits else 0.0)
    return round(float(np.mean(totals)), 6)


def _comparisons(tasks: Sequence[Measured]) -> list[JSON]:
    """The gate (the best arm without one) against every other arm, over all tasks and on each."""
    rows = _compared(tasks, {name: dict(_named(seen)) for name, seen in _families(tasks).items()}, {})
    if len(tasks) > 1:
        for task in tasks:
            own = {arm: {task.name: arm} for arm, outcomes in task.outcomes.items() if outcomes}
            rows += _compared([task], own, {"task": task.name})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = round(p, 6)
    return rows


def _named(seen: Sequence[tuple[Measured, str]]) -> list[tuple[str, str]]:
    return [(task.name, arm) for task, arm in seen]


def _compared(tasks: Sequence[Measured], arms: Mapping[str, Mapping[str, str]], more: JSON) -> list[JSON]:
    """Rows of `a` against each other arm; `arms` says what an arm is called on each task."""
    scores = {name: [task.scores(called[task.name]) for task in tasks] for name, called in arms.items()}
    if len(scores) < 2:
        return []
    mean = {name: float(np.mean([np.mean(list(s.values())) for s in seen])) for name, seen in scores.items()}
    a = AUTO if AUTO in scores else max(mean, key=lambda name: mean[name])
    rows = []
    for b in scores:
        pairs = [_common(x, y) for x, y in zip(scores[a], scores[b], strict=True)]
        if b != a and all(left for left, _ in pairs):
            rows.append({**more, "a": a, "b": b, **paired(pairs).wire()})
    return rows


def _common(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[list[float], list[float]]:
    ids = [i for i in a if i in b]
    return [a[i] for i in ids], [b[i] for i in ids]


# --- words ---------------------------------------------------------------------------------------------------------


def markdown(report: JSON) -> str:
    """The report as text with one table a task."""
    head = [f"# {report['suite']}", "", f"Base `{report['base_model']}`, gate `{report['gate'] or 'none'}`, "
            f"split `{report['split']}`. Intervals are 95 %.", ""]  # fmt: skip
    parts = [_table("Overall: the mean over tasks", report["overall"], ("n",))] if report["overall"] else []
    if router := report["router"]:
        rows = [f"| {name} | {_router_cell(value)} |" for name, value in router.items()]
        parts.append("\n".join(["## Gate", "", "| | |", "|---|---|", *rows, ""]))
    for name, task in report["tasks"].items():
        arms = dict(sorted(task["arms"].items(), key=lambda item: -item[1]["score"]))
        title = f"{name} ({task['metric']}, {task['n']} examples)"
        parts.append(_table(title, arms, ("n", "p50 ms", "p95 ms", "prompt", "completion", "calls", "errors")))
    return "\n".join([*head, *parts])


def _router_cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['score']:.3f} ({value['arm']})"
    return "–" if value is None else f"{value:.3f}"


def _table(title: str, arms: Mapping[str, JSON], columns: Sequence[str]) -> str:
    lines = [f"## {title}", "", f"| arm | score | {' | '.join(columns)} |", "|---|---" + "|---:" * len(columns) + "|"]
    for arm, row in arms.items():
        low, high = row["ci95"]
        cells = [str(_cell(row, column)) for column in columns]
        lines.append(f"| {arm} | {row['score']:.3f} [{low:.3f}, {high:.3f}] | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: JSON, column: str) -> Any:
    if column.endswith(" ms"):
        return row["latency_ms"][column.removesuffix(" ms")]
    return row["tokens"][column] if column in ("prompt", "completion") else row[column]
