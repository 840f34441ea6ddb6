"""Outcomes summarised: what `report.json` holds, with n and an interval everywhere, and the gate always beside random,
the best single arm, the best arm of each task and the oracle.

Read by people, by the gate's trainer and by the advisor; `outcomes.jsonl` beside it holds the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from hybrid.evaluation.calibration import calibration
from hybrid.evaluation.comparing import comparisons, overall, router, winner, wins
from hybrid.evaluation.costs import costs, latency, pareto, records, training
from hybrid.evaluation.grounded import groundedness
from hybrid.evaluation.measured import Measured
from hybrid.evaluation.retrieval import retrieval
from hybrid.evaluation.statistics import rule_of_three
from hybrid.types import JSON
from hybrid.types.arm import Arm

SCHEMA = 1
#: examples of each arm that are shown to be read
WORST = 3

NOTES = {
    "interval": "95 %: Wilson for rates, percentile bootstrap otherwise, by document where examples share one",
    "comparisons": "paired on the examples both arms answered: McNemar for one task of rates, paired bootstrap "
    "otherwise, by document where examples share one; p_holm is corrected (Holm 1979) for all rows of its list",
    "detectable": "the smallest true difference that a sample like this finds in 80 of 100 cases, before correction",
    "overall": "the mean over tasks",
    "errors_below": "rule of three: no error in n answers leaves rates up to 3/n possible at 95 %",
    "regret": "oracle - auto",
    "recovered": "(auto - best_single) / (oracle - best_single)",
    "grounded": "lexical: the share of an answer's content words, numbers and names, those of the question aside, "
    "that the passages shown hold, and of its sentences that one of them holds",
    "calibration": "the gate is right where the arm it took scored as well as the best arm on that example",
}


def build(
    suite: str,
    split: str,
    tasks: Sequence[Measured],
    *,
    base_model: str,
    gate: str,
    adapters: Mapping[str, JSON] | None = None,
) -> JSON:
    """The content of `report.json` (INTERFACES: a report folder).

    `adapters` are the rows of the status by every name that an arm may use; those that answered are told of.
    """
    used = _used(tasks, adapters or {})
    return {
        "schema": SCHEMA,
        "suite": suite,
        "split": split,
        "base_model": base_model,
        "gate": gate,
        "tasks": {task.name: _task(task) for task in tasks},
        "overall": overall(tasks),
        "winner": winner(tasks),
        "router": router(tasks),
        "calibration": calibration(tasks),
        "comparisons": comparisons(tasks),
        "wins": wins(tasks),
        "costs": costs(tasks),
        "training": training(used),
        "records": records(used),
        "notes": dict(NOTES),
    }


def _used(tasks: Sequence[Measured], adapters: Mapping[str, JSON]) -> dict[str, JSON]:
    """The versions that answered or that an arm names, by `name@version`."""
    arms = {arm for task in tasks for arm in task.fixed}
    named = {Arm.parse(arm).adapter for arm in arms} | {Arm.parse(arm).args[0] for arm in arms if _headed(arm)}
    named |= {o.adapter for task in tasks for rows in task.outcomes.values() for o in rows}
    rows = [adapters[name] for name in named if name is not None and name in adapters]
    return {f"{row['name']}@{row['version']}": row for row in sorted(rows, key=lambda r: (r["name"], r["version"]))}


def _headed(arm: str) -> bool:
    parsed = Arm.parse(arm)
    return parsed.strategy == "head" and bool(parsed.args)


def _task(task: Measured) -> JSON:
    arms = {arm: _arm(task, arm) for arm in task.arms}
    tokens = {arm: (sum(row["tokens"].values()), row["score"]) for arm, row in arms.items()}
    return {
        "metric": task.metric,
        "n": len(task.examples),
        "documents": len(set(task.documents.values())),
        "arms": arms,
        "pareto": pareto(tokens),
        "retrieval": retrieval(task),
        "grounded": groundedness(task),
        "worst": {arm: _worst(task, arm) for arm in task.arms},
    }


def _arm(task: Measured, arm: str) -> JSON:
    outcomes = task.outcomes[arm]
    errors = sum(o.error is not None for o in outcomes)
    return {
        **task.estimate(arm).wire(),
        "latency_ms": latency(outcomes),
        "tokens": {
            "prompt": round(fmean(o.prompt_tokens for o in outcomes), 2),
            "completion": round(fmean(o.completion_tokens for o in outcomes), 2),
        },
        "calls": round(fmean(o.calls for o in outcomes), 2),
        "errors": errors,
        **({} if errors else {"errors_below": round(rule_of_three(len(outcomes)), 4)}),
    }


def _worst(task: Measured, arm: str) -> list[str]:
    """The ids of an arm's lowest scores short of 1: first those that another arm answered better."""
    best: dict[str, float] = {}
    for other in task.fixed:
        for name, score in task.scores(other).items():
            best[name] = max(score, best.get(name, 0.0))
    scores = task.scores(arm)
    ranked = sorted(scores, key=lambda name: (scores[name], -best.get(name, 0.0), name))
    return [name for name in ranked if scores[name] < 1][:WORST]
