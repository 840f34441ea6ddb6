"""A report in words: the sentences that begin it, and `report.md` with one table a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybrid.evaluation.measured import AUTO
from hybrid.types import JSON

_LISTED = 4
#: strategies as they are read, simple ones first
_ORDER = ("base", "prompt", "few_shot", "head", "rag", "adapter", "adapter+rag", "mix", "self_moa", "moa")


def summary(report: JSON) -> list[str]:
    """What the report says, in a few sentences: who wins and how surely, the gate, errors."""
    return [*_winner(report), *_gate(report["router"]), *_errors(report)]


def _winner(report: JSON) -> Iterator[str]:
    won = report.get("winner") or {}
    if not won:
        yield "No arm was measured on every task, so there is no winner over all of them."
        return
    row = report["overall"][won["arm"]]
    low, high = row["ci95"]
    scored = f"{row['score']:.3f} (95 % interval {low:.3f} to {high:.3f}, n = {row['n']})"
    level, beaten = won["level_with"], won["beats"]
    if not won["second"]:
        yield f"{won['arm']} is the only arm: {scored}."
    elif not level:
        yield f"{won['arm']} wins: {scored}, better than each of the other {len(beaten)} (p ≤ {_p(won['p_holm'])})."
    else:
        yield (
            f"No clear winner: {won['arm']} scores highest, {scored}, and there is no significant difference from "
            f"{_listed(level)}; it is better than {_listed(beaten) if beaten else 'none'}."
        )
        yield f"A difference from {won['second']['b']} below {won['second']['detectable']:.3f} is too small for this n."


def _p(value: float) -> str:
    return "0.001" if value < 0.001 else f"{value:.3f}"


def _listed(arms: Sequence[str]) -> str:
    more = len(arms) - _LISTED
    return ", ".join(arms[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _gate(router: JSON) -> Iterator[str]:
    if AUTO not in router:
        return
    text = f"The gate scores {router['auto']:.3f}; choosing at random {router['random']:.3f}"
    if "best_single" in router:
        text += f", the best single arm ({router['best_single']['arm']}) {router['best_single']['score']:.3f}"
    text += f", the oracle {router['oracle']:.3f}: a regret of {router['regret']:.3f}"
    recovered = router.get("recovered")
    yield text + (f", and {recovered:.0%} of what a perfect gate would add." if recovered is not None else ".")


def _errors(report: JSON) -> Iterator[str]:
    rows = [row for task in report["tasks"].values() for row in task["arms"].values()]
    errors, n = sum(row["errors"] for row in rows), sum(row["n"] for row in rows)
    if errors:
        yield f"{errors} of {n} answers failed; they score 0."
    elif n:
        yield f"None of {n} answers failed: at 95 %, fewer than {min(1.0, 3 / n):.2%} do (rule of three)."


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(report: JSON) -> str:
    """The report as text."""
    head = [f"# {report['suite']}", "", f"Base `{report['base_model']}`, gate `{report['gate'] or 'none'}`, "
            f"split `{report['split']}`. Intervals are 95 %.", "", *summary(report), ""]  # fmt: skip
    parts = [glance(report)]
    parts += [_table("Overall: the mean over tasks", report["overall"], ("n",))] if report["overall"] else []
    if router := report["router"]:
        parts.append(_rows("Gate", ("", ""), [(name, _router_cell(value)) for name, value in router.items()]))
    parts += [*_compared(report), *_judged(report.get("judge") or {})]
    for name, task in report["tasks"].items():
        arms = dict(sorted(task["arms"].items(), key=lambda item: -item[1]["score"]))
        title = f"{name} ({task['metric']}, {task['n']} examples)"
        parts.append(_table(title, arms, ("n", "p50 ms", "p95 ms", "prompt", "completion", "calls", "errors")))
        parts += _apart(task)
    return "\n".join([*head, *parts])


def glance(report: JSON) -> str:
    """Tasks by strategies: the score of each strategy's best arm on a task, the highest of a task in bold."""
    best = {name: _best_of_each(task["arms"]) for name, task in report["tasks"].items()}
    strategies = list(dict.fromkeys(s for found in best.values() for s in found))
    strategies.sort(key=lambda name: (name == AUTO, _ORDER.index(name) if name in _ORDER else len(_ORDER)))
    rows = [
        (f"{name} ({report['tasks'][name]['metric']})", *(_scored(found, strategy) for strategy in strategies))
        for name, found in best.items()
    ]
    return _rows("At a glance: each strategy's best arm", ("task", *strategies), rows)


def _best_of_each(arms: Mapping[str, JSON]) -> dict[str, float]:
    found: dict[str, float] = {}
    for arm, row in arms.items():
        strategy = arm.partition(":")[0]
        found[strategy] = max(row["score"], found.get(strategy, 0.0))
    return found


def _scored(found: Mapping[str, float], strategy: str) -> str:
    if strategy not in found:
        return "–"
    score = f"{found[strategy]:.2f}"
    return f"**{score}**" if found[strategy] == max(found.values()) else score


def _router_cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['score']:.3f} ({value['arm']})"
    return "–" if value is None else f"{value:.3f}"


def _compared(report: JSON) -> Iterator[str]:
    rows = [
        (row["a"], row["b"], _interval(row, "diff"), f"{row['p_holm']:.4f}", f"{row['detectable']:.3f}", row["verdict"])
        for row in report["comparisons"]
        if "task" not in row
    ]
    if rows:
        columns = ("a", "b", "a − b", "p (Holm)", "detectable", "verdict")
        yield _rows("Paired differences, the same examples", columns, rows)


def _judged(judge: JSON) -> Iterator[str]:
    if judge:
        rows = [(task, arm, _interval(r, "score"), r["errors"]) for task, arm, r in judged_rows(judge)]
        title = f"Judged by {judge['model']} ({judge['mode']}): a model's opinion, apart from every score above"
        yield _rows(title, ("task", "arm", "score", "errors"), rows)


def judged_rows(judge: JSON) -> list[tuple[str, str, JSON]]:
    """(task, arm, its judged score) of every arm that was judged."""
    return [(task, arm, row) for task, arms in judge.get("tasks", {}).items() for arm, row in arms.items()]


def _apart(task: JSON) -> Iterator[str]:
    """Retrieval and groundedness, apart from answer quality."""
    for arm, row in task.get("retrieval", {}).items():
        facts = ", ".join(f"{key} {value}" for key, value in row.items())
        yield f"Retrieval of {arm}: {facts}.\n"
    for arm, kinds in task.get("grounded", {}).items():
        facts = ", ".join(f"{kind} {_interval(row, 'score')}" for kind, row in kinds.items())
        yield f"Supported by the passages shown (lexical), {arm}: {facts}.\n"


def _interval(row: Mapping[str, Any], key: str) -> str:
    low, high = row["ci95"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"


def _rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([*lines, ""])


def _table(title: str, arms: Mapping[str, JSON], columns: Sequence[str]) -> str:
    rows = [(arm, _interval(row, "score"), *(_cell(row, column) for column in columns)) for arm, row in arms.items()]
    return _rows(title, ("arm", "score", *columns), rows)


def _cell(row: JSON, column: str) -> Any:
    if column.endswith(" ms"):
        return row["latency_ms"][column.removesuffix(" ms")]
    return row["tokens"][column] if column in ("prompt", "completion") else row[column]
