"""`hybrid adapters merge`: several adapters made one, published like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.adapters.mix import parse_weights
from hybrid.adapters.store import AdapterStore
from hybrid.cli.ready import made_ready
from hybrid.cli.say import data, say
from hybrid.cli.train import hand_over
from hybrid.errors import EngineRejected, Refused
from hybrid.settings import Settings, share_cores
from hybrid.state import State
from hybrid.training.merge import Merge
from hybrid.training.merge import merge as run_merge


def merge(
    weights: Annotated[list[str], typer.Argument(metavar="NAME=WEIGHT…", help="the adapters, each with its weight")],
    name: Annotated[str, typer.Option(help="what the merged adapter is called")],
    method: Annotated[
        str, typer.Option(help="cat, learned, linear, svd, ties, dare_ties, … (docs/methods.md)")
    ] = "cat",
    density: Annotated[float, typer.Option(help="the share of entries that ties, dare and pruning keep")] = 0.5,
    rank: Annotated[int, typer.Option(min=0, help="the rank of an svd method; 0 is the largest of the members'")] = 0,
    task: Annotated[Path | None, typer.Option(help="a task folder to measure on; `learned` learns there")] = None,
    json_: Annotated[bool, typer.Option("--json", help="the result as the last line of stdout")] = False,
) -> None:
    """Makes one adapter of several and publishes it; a running server loads it by itself.

    hybrid adapters merge bank=0.7 voice=0.3 --name both
    hybrid adapters merge bank=1 voice=1 --name both --method ties --density 0.3
    """
    settings = Settings.load()
    order = Merge(
        name=name, weights=parse_weights(",".join(weights)), method=method, density=density, rank=rank, task=task
    )
    share_cores()
    model = made_ready(settings, settings.model)
    store = AdapterStore(settings.rooms, State(settings.rooms.database), model.sha256)
    result = run_merge(order, store=store, model=model, max_rank=settings.engine.max_lora_rank)
    try:
        reason, code = hand_over(settings, store, result, model), 0
    except (EngineRejected, Refused) as error:
        reason, code = f"refused: {error.message}", 1
    store.refresh()
    made = store.resolve(f"{result.adapter}@{result.version}").card["merge"]
    if json_:
        told = {"adapter": result.adapter, "version": result.version, "path": str(result.path)}
        promoted = store.alias(result.adapter) == result.version
        data({**told, "metrics": dict(result.metrics), "merge": made, "promoted": promoted})
    say(f"{result.adapter}@{result.version}: {made['relative_error']:.1%} off the exact sum, {reason}")
    raise typer.Exit(code)
