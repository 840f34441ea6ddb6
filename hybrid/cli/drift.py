"""`hybrid eval drift`: is what is asked still what was trained for? And the group that makes room for the word."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hybrid.cli.eval import evaluate
from hybrid.cli.say import data, text
from hybrid.evaluation.drift import words
from hybrid.lifecycle.drift import measure_drift
from hybrid.settings import Settings

DRIFT, SUITE = "drift", "suite"


class _WordOrSuite(TyperGroup):
    """`eval drift …` is a command of its own; whatever else follows `eval` is what `evaluate` takes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == [DRIFT] else [SUITE, *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == SUITE else name), command, rest


app = typer.Typer(
    cls=_WordOrSuite,
    add_completion=False,
    help="Scores every arm on held-out tasks; `eval drift` looks at recent traffic instead.",
)


def drift(
    days: Annotated[
        float, typer.Option(min=0.01, metavar="N", help="the window, and the one it is compared with")
    ] = 7.0,
    json_: Annotated[bool, typer.Option("--json", help="one JSON object on stdout")] = False,
) -> None:
    """Compares recent routed requests with what each adapter and the gate were made from, and says what to retrain.

    hybrid eval drift --days 7
    """
    found = measure_drift(Settings.load(), days)
    if json_:
        data(found.wire())
    else:
        text(words(found, days))


app.command(SUITE, hidden=True)(evaluate)
app.command(DRIFT)(drift)
