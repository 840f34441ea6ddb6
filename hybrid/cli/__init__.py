"""The command line: each command is a parse and one call. Data goes to stdout, words to stderr."""

from __future__ import annotations

import sys

import typer

from hybrid.cli import (
    adapters,
    advise,
    ask,
    bench,
    corpora,
    data,
    doctor,
    drift,
    gate,
    index,
    jobs,
    keys,
    loop,
    report,
    serve,
    tasks,
    train,
)
from hybrid.cli.say import complain
from hybrid.errors import HybridError

app = typer.Typer(
    name="hybrid",
    help="Prompt, retrieve, fine-tune, or several together: measured on your own tasks, served by one endpoint.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("ask")(ask.ask)
app.command("train")(train.train)
app.command("advise")(advise.advise)
app.command("advise-prepare", hidden=True)(advise.prepare_)
app.command("loop")(loop.loop)
app.command("report")(report.report)
app.command("index")(index.index)
app.command("search")(index.search)
app.command("doctor")(doctor.doctor)
app.add_typer(drift.app, name="eval")
app.add_typer(adapters.app, name="adapters")
gate.app.command("replay")(loop.replay)
app.add_typer(gate.app, name="gate")
app.add_typer(jobs.app, name="jobs")
app.add_typer(corpora.app, name="corpora")
app.add_typer(keys.app, name="keys")
app.add_typer(tasks.app, name="tasks")
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


def main() -> None:
    """The console script. Exit codes: 0 ok, 1 failed, 2 usage, 3 not ready, 130 interrupted."""
    try:
        code = app(standalone_mode=False)
    except HybridError as error:
        complain(error.message)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        complain("Interrupted.")
        code = 130
    except typer.TyperException as error:  # typer's own, since it no longer raises click's
        show = getattr(error, "show", None)
        show() if show else complain(str(error))
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
