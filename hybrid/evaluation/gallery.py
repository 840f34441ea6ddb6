"""The reports of a home: which there are, and one example of a report with every arm's answer side by side."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean, pvariance

from hybrid.errors import BadRequest, NotFound
from hybrid.evaluation import folder
from hybrid.evaluation.measured import AUTO
from hybrid.evaluation.words import summary
from hybrid.rooms import Home
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_SHOWN = 200


def check_report_name(name: str) -> str:
    """`name` itself when it can be a report's folder. Raises BadRequest when it cannot."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise BadRequest(
            f"{name[:80]!r} cannot name a report: use letters, digits, '.', '_' or '-', 80 at most, without '..'.",
            param="name",
        )
    return name


def find_report(home: Home, name: str) -> Path:
    """The folder of a report. Raises NotFound, BadRequest for what can be none."""
    out = home.reports / check_report_name(name)
    if not (out / folder.REPORT).is_file():
        raise NotFound(f"There is no report {name!r}; GET /v1/reports lists them.", param="name")
    return out


def list_reports(home: Home) -> list[JSON]:
    """`{"name", "at", "suite", "split", "tasks", "arms", "winner", "verdict"}` of each, newest first.

    `at` is in seconds since 1970. Folders that hold no report, or half of one, are passed over.
    """
    found = []
    for path in home.reports.glob(f"*/{folder.REPORT}"):
        try:
            check_report_name(path.parent.name)
            found.append(_listed(path))
        except (BadRequest, OSError, KeyError):
            continue
    return sorted(found, key=lambda row: -float(row["at"]))


def _listed(path: Path) -> JSON:
    report = folder.read(path.parent)
    return {
        "name": path.parent.name,
        "at": path.stat().st_mtime,
        "suite": report["suite"],
        "split": report["split"],
        "tasks": {task: row["n"] for task, row in report["tasks"].items()},
        "arms": len({arm for task in report["tasks"].values() for arm in task["arms"]}),
        "winner": (report.get("winner") or {}).get("arm"),
        "verdict": next(iter(summary(report)), ""),
    }


def list_examples(out: Path, task: str) -> list[JSON]:
    """`{"id", "input", "scores", "mean", "disagreement"}` of each example of a task, in the order they were asked.

    `scores` maps each arm to its score; `disagreement` is their variance, that of the gate aside (it answers as one of
    the others). `input` is the question's beginning, "" in a report without texts. Raises NotFound for another task.
    """
    questions = {row["id"]: str(row["input"]) for row in folder.examples(out) if row["task"] == task}
    asked: dict[str, dict[str, float]] = {}
    for outcome in _outcomes(out, task):
        asked.setdefault(outcome.id, {})[outcome.arm] = outcome.score
    order = {name: i for i, name in enumerate(questions)}
    return [
        {
            "id": name,
            "input": questions.get(name, "")[:_SHOWN],
            "scores": scores,
            "mean": round(fmean(scores.values()), 6),
            "disagreement": round(pvariance([s for arm, s in scores.items() if arm != AUTO] or [0.0]), 6),
        }
        for name, scores in sorted(asked.items(), key=lambda item: order.get(item[0], len(order)))
    ]


def read_example(out: Path, task: str, name: str) -> JSON:
    """`{"task", "id", "instruction", "input", "reference", "texts", "answers"}` of one example.

    `answers` has one `{"arm", "score", "answer", "error", "chosen", "tokens", "latency_ms", "passages"}` an arm, best
    first; `texts` is false in a report without texts. Raises NotFound.
    """
    answers = [_answer(outcome) for outcome in _outcomes(out, task) if outcome.id == name]
    if not answers:
        raise NotFound(f"{task} has no example {name[:80]!r} in this report.", param="id")
    questions = folder.examples(out)
    asked = next((row for row in questions if (row["task"], row["id"]) == (task, name)), {})
    return {
        "task": task,
        "id": name,
        **{key: asked.get(key, "") for key in ("instruction", "input", "reference")},
        "texts": bool(questions),
        "answers": sorted(answers, key=lambda row: -float(row["score"])),
    }


def _outcomes(out: Path, task: str) -> list[Outcome]:
    found = [outcome for outcome in folder.outcomes(out) if outcome.task == task]
    if not found:
        raise NotFound(f"This report has no task {task[:80]!r}.", param="task")
    return found


def _answer(outcome: Outcome) -> JSON:
    return {
        "arm": outcome.arm,
        "score": outcome.score,
        "answer": outcome.answer,
        "error": outcome.error,
        "chosen": outcome.chosen if outcome.arm == AUTO else None,
        "tokens": {"prompt": outcome.prompt_tokens, "completion": outcome.completion_tokens},
        "latency_ms": outcome.latency_ms,
        "passages": list(outcome.passages),
    }
