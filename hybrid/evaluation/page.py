"""`report.html`: one file that opens anywhere, with its pictures inside and nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.evaluation.measured import family
from hybrid.evaluation.plots import growth_plot, pareto_plot, reliability_plot
from hybrid.evaluation.words import judged_rows, summary
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

#: (task, example id) → its `input` and `reference`
Questions = Mapping[tuple[str, str], Mapping[str, str]]


def html(report: JSON, outcomes: Sequence[Outcome] = (), questions: Questions | None = None) -> str:
    """The page of a report. Without `questions` it holds no text of the data: ids, scores and pictures alone."""
    return _render(
        "report.html.j2",
        **_pictures(report),
        summary=summary(report),
        costs=report.get("costs") or {},
        training=report.get("training") or {},
        records=report.get("records") or {},
        judge=report.get("judge") or {},
        judged=judged_rows(report.get("judge") or {}),
        worst=_worst(report, outcomes, questions),
        texts=questions is not None,
    )


def board(report: JSON) -> str:
    """The tables and pictures of a report alone, for a page of others: everything in it is escaped.

    It goes into an element of the class `hy-board`, and takes the colours of Gradio's theme.
    """
    return _render("board.html.j2", **_pictures(report))


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("hybrid.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template(template).render(**values)


def _pictures(report: JSON) -> JSON:
    """What both pages draw."""
    return {
        "report": report,
        "board": _board(report),
        "heat": _heat(report),
        "plots": _plots(report),
        "wins": {a: (report.get("wins") or {}).get(a, {}) for a in report["overall"]},
        "calibration": report.get("calibration") or {},
    }


def _board(report: JSON) -> list[JSON]:
    """The leaderboard: over all tasks, or of the only task, with what an answer costs."""
    costs = report.get("costs") or {}
    return [{"arm": arm, **row, "cost": costs.get(arm)} for arm, row in report["overall"].items()]


def _heat(report: JSON) -> JSON:
    """Arms down, tasks across; those asked most first, then the best."""
    rows: dict[str, dict[str, JSON]] = {}
    for task, measured in report["tasks"].items():
        for arm, row in measured["arms"].items():
            rows.setdefault(family(arm, task), {})[task] = row
    best = {task: max((row["score"] for row in t["arms"].values()), default=0) for task, t in report["tasks"].items()}
    ordered = sorted(rows, key=lambda arm: (-len(rows[arm]), -sum(r["score"] for r in rows[arm].values())))
    return {"tasks": list(report["tasks"]), "rows": {arm: rows[arm] for arm in ordered}, "best": best}


def _plots(report: JSON) -> dict[str, Any]:
    """Name → picture, for what there is to draw."""
    from markupsafe import Markup

    costs, calibration = report.get("costs") or {}, report.get("calibration") or {}
    drawn = {
        "tokens": pareto_plot(costs, "tokens", "tokens read and written for an answer") if costs else "",
        "latency": pareto_plot(costs, "latency_ms", "ms until half of the answers were there") if costs else "",
        "reliability": reliability_plot(calibration) if calibration else "",
        "growth": growth_plot(report.get("training") or {}),
    }
    return {name: Markup(svg) for name, svg in drawn.items()}  # noqa: S704  our own drawing


def _worst(report: JSON, outcomes: Sequence[Outcome], questions: Questions | None) -> JSON:
    """task → arm → its worst examples, with what was asked and said where texts are shown."""
    found = {(o.task, o.arm, o.id): o for o in outcomes}
    return {
        task: {
            arm: [_entry(found[task, arm, i], questions) for i in ids if (task, arm, i) in found]
            for arm, ids in measured.get("worst", {}).items()
            if ids
        }
        for task, measured in report["tasks"].items()
    }


def _entry(outcome: Outcome, questions: Questions | None) -> JSON:
    asked = None if questions is None else questions.get((outcome.task, outcome.id), {})
    error = outcome.error and (outcome.error if asked is not None else outcome.error.partition(":")[0])
    return {
        "id": outcome.id,
        "score": outcome.score,
        "chosen": outcome.chosen,
        "error": error,
        "input": (asked or {}).get("input", ""),
        "reference": (asked or {}).get("reference", ""),
        "answer": outcome.answer if asked is not None else "",
    }
