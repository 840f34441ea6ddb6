"""A report folder on disk: `report.json`, `report.md`, `report.html`, `outcomes.jsonl`, and `examples.jsonl` with what
was asked. Without texts the folder holds ids, scores and pictures alone and may be shown to anybody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.evaluation.measured import Measured
from hybrid.evaluation.page import html
from hybrid.evaluation.runner import EARLIER, OUTCOMES, outcome_of, write_outcomes
from hybrid.evaluation.words import markdown
from hybrid.rooms import write_json, write_rows
from hybrid.types import JSON
from hybrid.types.outcome import Outcome

REPORT = "report.json"
EXAMPLES = "examples.jsonl"


def write(out: Path, report: JSON, tasks: Sequence[Measured] = (), *, texts: bool = True) -> None:
    """Writes all files of a report but `outcomes.jsonl`, which the run wrote.

    Without `texts` answers, questions and the words of errors are taken out of what lies there, too.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"task": task.name, "id": e.id, "instruction": task.instruction, "input": e.input, "reference": e.reference}
        for task in tasks
        for e in task.examples
    ]
    if texts and rows:
        write_rows(out / EXAMPLES, rows)
    write_json(out / REPORT, report)
    render(out, texts=texts)


def render(out: Path, *, texts: bool = True) -> JSON:
    """Writes `report.md` and `report.html` again from the numbers that a folder holds, and returns those.

    Without `texts` its texts are removed for good. Raises DataError for a folder without a report.
    """
    report = read(out)
    if not texts:
        for name in (OUTCOMES, EARLIER):
            if (out / name).is_file():
                write_outcomes(out / name, [_bare(row) for row in _rows(out / name)])
        (out / EXAMPLES).unlink(missing_ok=True)
    questions = {(row["task"], row["id"]): row for row in _rows(out / EXAMPLES)}
    page = html(report, outcomes(out), questions or None)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    (out / "report.html").write_text(page, encoding="utf-8")
    return report


def read(out: Path) -> JSON:
    """The numbers of a report folder. Raises DataError where there are none."""
    try:
        report: JSON = json.loads((out / REPORT).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{out} holds no {REPORT} that can be read; `hybrid eval … --out {out}` writes one.") from error
    return report


def outcomes(out: Path) -> list[Outcome]:
    """The rows of `outcomes.jsonl`."""
    return [outcome_of(row) for row in _rows(out / OUTCOMES)]


def examples(out: Path) -> list[JSON]:
    """`{"task", "id", "instruction", "input", "reference"}` of every example asked; [] in a folder without texts."""
    return list(_rows(out / EXAMPLES))


def _rows(path: Path) -> Iterator[JSON]:
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            yield from [json.loads(line) for line in file if line.strip()]


def _bare(row: Mapping[str, Any]) -> JSON:
    """An outcome without the words of anybody; an error keeps its code."""
    error = row.get("error")
    return {**row, "answer": "", "error": error and str(error).partition(":")[0]}
