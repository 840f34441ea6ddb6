"""`hybrid train`: data in, a checked, versioned, served adapter out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from hybrid import reach
from hybrid.adapters.hotload import worse
from hybrid.adapters.kinds import LORA, check_other
from hybrid.adapters.preflight import check, read_base
from hybrid.adapters.store import AdapterStore
from hybrid.cli.say import bar, data, say
from hybrid.cli.watch import interruptible, reporter
from hybrid.errors import EngineRejected, NotReady, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings, offline_environment, share_cores
from hybrid.state import State
from hybrid.training.recipes import parse_sets
from hybrid.training.run import TrainResult
from hybrid.training.run import train as run_training


def train(
    sources: Annotated[
        list[Path], typer.Argument(metavar="DIR…", help="a task folder or a data file; several are one mixture")
    ],
    name: Annotated[str | None, typer.Option(help="the adapter's name; the folder's by default")] = None,
    method: Annotated[str | None, typer.Option(help="how to adapt the model [lora]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key; repeatable")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="the result as the last line of stdout")] = False,
    progress_json: Annotated[bool, typer.Option("--progress-json", help="progress as JSON lines on stdout")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="do not go on from an interrupted run's checkpoint")] = False,
    tune: Annotated[int, typer.Option(min=0, metavar="N", help="look for a better recipe in N trials first")] = 0,
    growth: Annotated[bool, typer.Option("--growth", help="measure what more data would bring: 10, 30, 100 %")] = False,
) -> None:
    """Trains an adapter on a task folder or data file and publishes it; a running server loads it by itself.

    hybrid train eval/tasks/tickets
    hybrid train ./bank --name bank --set epochs=2 --set rank=16 --json
    hybrid train ./bank --method head

    Ctrl-C saves a checkpoint, and the same command goes on from it; a second Ctrl-C quits at once.
    """
    settings = Settings.load()
    offline_environment()
    share_cores()
    overrides = parse_sets(set_ or []) | ({"method": method} if method else {})
    with bar() as step:
        model = materialise(settings.model, settings.cache, step)
        embedding = materialise(settings.embedder, settings.cache, step)
    store = AdapterStore(settings.rooms, State(settings.rooms.database), model.sha256)
    with reporter(progress_json) as progress, interruptible() as control:
        result = run_training(
            sources,
            settings=settings,
            name=name,
            overrides=overrides,
            progress=progress,
            store=store,
            embedder=Embedder(embedding.path, embedding.name),
            model=model,
            control=control,
            fresh=fresh,
            tune=tune,
            growth=growth,
        )
    if result is None:  # another process of the team publishes
        return
    try:
        reason, code = hand_over(settings, store, result, model), 0
    except (EngineRejected, Refused) as error:
        reason, code = f"refused: {error.message}", 1
    store.refresh()
    promoted = store.alias(result.adapter) == result.version
    if json_:
        told = {"adapter": result.adapter, "version": result.version, "path": str(result.path)}
        data({**told, "metrics": dict(result.metrics), "promoted": promoted})
    say(f"{result.adapter}@{result.version}: dev loss {result.metrics.get('dev_loss')}, {reason}")
    raise typer.Exit(code)


def hand_over(settings: Settings, store: AdapterStore, result: TrainResult, model: ModelFiles) -> str:
    """Gives the version to the running server, or settles it here; says in words what came of it.

    Raises Refused, or EngineRejected with the server's reason.
    """
    server = reach.find(settings.rooms.server_file)
    if server is None:
        return _settle(settings, store, result, model)
    version_id = f"{result.adapter}@{result.version}"
    try:
        asyncio.run(server.post("/v1/load_lora_adapter", {"lora_name": version_id}))
    except NotReady:
        return "published; the server loads it when it is ready"
    except EngineRejected as error:
        if error.status == NotReady.status:
            return "published; the server loads it when its engine is ready"
        raise
    store.refresh()
    return store.resolve(version_id).reason or f"served as {result.adapter!r}"


def _settle(settings: Settings, store: AdapterStore, result: TrainResult, model: ModelFiles) -> str:
    """The alias rule without an engine: preflight stands for all checks, since PEFT has read the adapter back."""
    base = read_base(model.path, model.sha256)
    version = store.resolve(f"{result.adapter}@{result.version}")
    if version.kind != LORA:
        check_other(version.ref.path, version.card, base)
        store.mark(version.id, "candidate", version.serve_with)
        return version.serve_with
    check(result.path, base, settings.engine.max_lora_rank)
    store.mark(version.id, "candidate", "checked by preflight and PEFT; no engine was running")
    live = store.alias(result.adapter)
    if live is not None and (reason := worse(version, store.resolve(f"{result.adapter}@{live}"))):
        return reason
    store.promote(result.adapter, result.version)
    return "served from the next start of `hybrid serve`"
