"""`hybrid report`: a report folder written again, without its texts, or with a judge's opinion."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, get_args

import typer

from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.evaluation import folder
from hybrid.evaluation.judge import Judge, Mode, cases_of, judged
from hybrid.evaluation.words import markdown
from hybrid.types import JSON


def report(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="a report folder")],
    texts: Annotated[
        bool, typer.Option("--texts/--no-texts", help="without: its texts are removed for good; ids and scores stay")
    ] = True,
    judge: Annotated[str, typer.Option(metavar="URL", help="OpenAI-compatible, ends in /v1: let a model judge")] = "",
    judge_model: Annotated[str, typer.Option(metavar="M", help="the model that judges")] = "",
    mode: Annotated[str, typer.Option(help="rubric (1 to 10) or pairs (both orders)")] = "rubric",
    against: Annotated[str, typer.Option(metavar="ARM", help="what pairs are compared with")] = "prompt",
    limit: Annotated[int, typer.Option(min=0, help="judged answers of each arm on each task; 0 takes all")] = 20,
    json_: Annotated[bool, typer.Option("--json", help="report.json as the last line of stdout")] = False,
) -> None:
    """Writes report.md and report.html of a report folder again.

    hybrid report eval/reports/mine --no-texts
    hybrid report eval/reports/mine --judge http://127.0.0.1:8000/v1 --judge-model base --mode pairs
    """
    if judge:
        asyncio.run(_judge(out, judge, judge_model, mode, against, limit or None))
    written = folder.render(out, texts=texts)
    if json_:
        data(written)
    else:
        text(markdown(written))
        say(f"The report is in {out}.")


async def _judge(out: Path, url: str, model: str, mode: str, against: str, limit: int | None) -> None:
    """Adds the opinion to `report.json`. Raises BadRequest, DataError."""
    chosen = _mode(mode)
    if not model:
        raise BadRequest("Name the model that judges with --judge-model.", param="judge_model")
    against = against if chosen == "pairs" else ""
    cases = cases_of(folder.outcomes(out), folder.examples(out), chosen, against, limit)
    numbers: JSON = folder.read(out)
    with bar() as progress:
        async with Judge(url, model) as judge:
            numbers["judge"] = await judged(judge, cases, chosen, against, lambda d, n: progress("judging", d, n))
    folder.write(out, numbers)


def _mode(name: str) -> Mode:
    for mode in get_args(Mode):
        if mode == name:
            return mode  # type: ignore[no-any-return]
    raise BadRequest("--mode is rubric or pairs.", param="mode")
