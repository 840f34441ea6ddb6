"""`hybrid train`: data in, a checked, versioned, served adapter out."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from hybrid import reach
from hybrid.adapters.hotload import worse
from hybrid.adapters.preflight import check, read_base
from hybrid.adapters.store import AdapterStore
from hybrid.cli.say import bar, data, say, words
from hybrid.errors import EngineRejected, NotReady, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings, offline_environment, share_cores
from hybrid.state import State
from hybrid.training.control import Control, Wanted
from hybrid.training.recipes import parse_sets
from hybrid.training.run import TrainResult
from hybrid.training.run import train as run_training


def train(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="a task folder or a data file")],
    name: Annotated[str | None, typer.Option(help="the adapter's name; the folder's by default")] = None,
    method: Annotated[str | None, typer.Option(help="how to adapt the model [lora]")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key; repeatable")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="the result as the last line of stdout")] = False,
    progress_json: Annotated[bool, typer.Option("--progress-json", help="progress as JSON lines on stdout")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="do not go on from an interrupted run's checkpoint")] = False,
) -> None:
    """Trains an adapter on a task folder or data file and publishes it; a running server loads it by itself.

    hybrid train eval/tasks/tickets
    hybrid train ./bank --name bank --set epochs=2 --set rank=16 --json

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
    with _reporter(progress_json) as progress, _interruptible() as control:
        result = run_training(
            source,
            settings=settings,
            name=name,
            overrides=overrides,
            progress=progress,
            store=store,
            embedder=Embedder(embedding.path, embedding.name),
            model=model,
            control=control,
            fresh=fresh,
        )
    if result is None:  # another process of the team publishes
        return
    try:
        reason, code = _hand_over(settings, store, result, model), 0
    except (EngineRejected, Refused) as error:
        reason, code = f"refused: {error.message}", 1
    store.refresh()
    promoted = store.alias(result.adapter) == result.version
    if json_:
        told = {"adapter": result.adapter, "version": result.version, "path": str(result.path)}
        data({**told, "metrics": dict(result.metrics), "promoted": promoted})
    say(f"{result.adapter}@{result.version}: dev loss {result.metrics['dev_loss']}, {reason}")
    raise typer.Exit(code)


def _hand_over(settings: Settings, store: AdapterStore, result: TrainResult, model: ModelFiles) -> str:
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
    check(result.path, read_base(model.path, model.sha256), settings.engine.max_lora_rank)
    version = store.resolve(f"{result.adapter}@{result.version}")
    store.mark(version.id, "candidate", "checked by preflight and PEFT; no engine was running")
    live = store.alias(result.adapter)
    if live is not None and (reason := worse(version, store.resolve(f"{result.adapter}@{live}"))):
        return reason
    store.promote(result.adapter, result.version)
    return "served from the next start of `hybrid serve`"


class _Interrupts:
    """Pauses the run at the first signal."""

    def __init__(self) -> None:
        self._wanted: Wanted = "run"

    def wanted(self) -> Wanted:
        return self._wanted

    def __call__(self, _signal: int, _frame: Any) -> None:
        if self._wanted == "pause":
            raise KeyboardInterrupt
        self._wanted = "pause"
        say("Saving a checkpoint; press Ctrl-C again to quit at once.")


@contextmanager
def _interruptible() -> Iterator[Control]:
    interrupts = _Interrupts()
    before = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reporter(as_json: bool) -> Iterator[Callable[..., None]]:
    """A progress callback: JSON lines on stdout, a bar on a terminal, a line now and then elsewhere."""
    if as_json:
        yield lambda **told: data(told)
        return
    if not words.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
    with Progress(*columns, console=words, transient=True) as progress:
        task = progress.add_task("", total=None)

        def update(**told: Any) -> None:
            if "step" in told:
                progress.update(task, completed=told["step"], total=told["steps"], description=_sentence(told))

        yield update


def _lines(every: int = 10) -> Callable[..., None]:
    def update(**told: Any) -> None:
        if "step" in told and (told["step"] % every == 0 or told["step"] == told["steps"]):
            say(f"step {told['step']}/{told['steps']}  {_sentence(told)}")

    return update


def _sentence(told: dict[str, Any]) -> str:
    dev = f"  dev {told['dev_loss']:.3f}" if "dev_loss" in told else ""
    return f"loss {told['loss']:.3f}{dev}  {told['tokens_per_s']:.0f} tokens/s  {told['eta_s']:.0f} s left"
