"""`hybrid bench`: what this machine and this home do, beside what they should."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hybrid import reach
from hybrid.adapters.store import AdapterStore
from hybrid.bench import BENCHMARKS
from hybrid.bench.eval import ARMS
from hybrid.bench.result import Result
from hybrid.bench.routing import Owned
from hybrid.bench.train import RIVALS
from hybrid.bench.vectors import DIM, KINDS, POINTS
from hybrid.cli.ready import ready
from hybrid.cli.say import bar, data, text
from hybrid.errors import BadRequest, NotReady
from hybrid.knowledge.embed import Embedder
from hybrid.rooms import Home
from hybrid.settings import Settings, share_cores
from hybrid.state import State
from hybrid.training.recipes import load_recipe, parse_sets

app = typer.Typer(help="Benchmarks: numbers of this machine and home beside their goals.", no_args_is_help=True)
#: one process cannot ask for more
MAX_RATE = 2_000
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Reader = Annotated[bool, typer.Option("--reader", help="a reader is taught from the task's training questions")]


@app.command("list")
def list_(json_: Json = False) -> None:
    """The benchmarks there are."""
    if json_:
        data({"benchmarks": [{"name": name, "description": b.description} for name, b in BENCHMARKS.items()]})
        return
    for name, benchmark in BENCHMARKS.items():
        text(f"{name:8}  {benchmark.description}")


@app.command("routing", help=BENCHMARKS["routing"].description)
def routing(
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR=ARM",
            help="a task folder and the arms that own it, comma separated; repeatable (default: the tasks of "
            "this home that have an adapter of their name)",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="rows of each task's test split")] = 67,
    bare: Annotated[bool, typer.Option("--bare", help="send the inputs without the task's instruction")] = False,
    json_: Json = False,
) -> None:
    """One question after another, nothing generated."""
    settings = Settings.load()
    server = _server(settings)
    tasks = [Owned.parse(spec) for spec in task or []] or _own_tasks(settings.rooms, _store(settings))
    with bar() as progress:
        run = BENCHMARKS["routing"].measure(server, tasks, limit=limit, bare=bare, progress=progress)
        _show(run, json_)


@app.command("gate", help=BENCHMARKS["gate"].description)
def gate(
    on: Annotated[Path, typer.Option("--on", metavar="REPORT_DIR", help="a report of a test split, with its texts")],
    gate_: Annotated[
        str | None, typer.Option("--gate", metavar="NAME[@V]", help="a taught gate (default: the live one)")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON, with a picture beside it")] = None,
    json_: Json = False,
) -> None:
    """Needs no server and no engine: every arm was measured before, in this home."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (embedding, progress):
        run = BENCHMARKS["gate"].measure(settings, on, embedding=embedding, gate=gate_, out=out, progress=progress)
        _show(run, json_)


@app.command("embed", help=BENCHMARKS["embed"].description)
def embed(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="what `hybrid index` reads; dev.jsonl asks, if there")],
    passages: Annotated[int, typer.Option(min=1, help="passages each embeds")] = 1000,
    questions: Annotated[int, typer.Option(min=1, help="questions each embeds, one by one")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each takes; the intervals are over them")] = 5,
    json_: Json = False,
) -> None:
    """Needs no server. SentenceTransformer.encode, as it comes, reads the same beside ours."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (model, progress):
        run = BENCHMARKS["embed"].measure(
            source, embedding=model, passages=passages, questions=questions, rounds=rounds, progress=progress
        )
        _show(run, json_)


@app.command("retrieval", help=BENCHMARKS["retrieval"].description)
def retrieval(
    task: Annotated[Path, typer.Option(metavar="DIR", help="a task folder whose questions name their passages")],
    split: Annotated[Literal["dev", "test"], typer.Option(help="dev: half teaches, half is measured")] = "dev",
    limit: Annotated[int | None, typer.Option(min=1, help="questions that are measured")] = None,
    corpus: Annotated[str | None, typer.Option(help="a corpus of this home (default: the task's corpus.jsonl)")] = None,
    reader: Reader = False,
    json_: Json = False,
) -> None:
    """Needs no server. The weight and the closer look are learned from dev questions, never from those measured."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (model, progress):
        run = BENCHMARKS["retrieval"].measure(
            settings, task, embedding=model, split=split, limit=limit, corpus=corpus, reader=reader, progress=progress
        )
        _show(run, json_)


@app.command("answerable", help=BENCHMARKS["answerable"].description)
def answerable(
    task: Annotated[Path, typer.Option(metavar="DIR", help="a task folder with a corpus.jsonl and questions of it")],
    limit: Annotated[int | None, typer.Option(min=1, help="test questions that are asked (default: all)")] = None,
    reader: Reader = False,
    json_: Json = False,
) -> None:
    """Needs no server. What tells is learned from dev questions, never from those measured."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (model, progress):
        run = BENCHMARKS["answerable"].measure(
            settings, task, embedding=model, limit=limit, reader=reader, progress=progress
        )
        _show(run, json_)


@app.command("hotload", help=BENCHMARKS["hotload"].description)
def hotload(
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME[@V]", help="what is copied (default: the newest)")
    ] = None,
    streams: Annotated[int, typer.Option(min=0, help="streams that run meanwhile")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="how many copies are published, one after another")] = 3,
    json_: Json = False,
) -> None:
    """Half of the streams ask the base model, half the adapter that is copied."""
    settings = Settings.load()
    server, store = _server(settings), _store(settings)
    with bar() as progress:
        measure = BENCHMARKS["hotload"].measure
        _show(measure(server, store, adapter=adapter, streams=streams, repeat=repeat, progress=progress), json_)


@app.command("eval", help=BENCHMARKS["eval"].description)
def evaluate(
    task: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="a task folder; repeatable (default: the quickstart's two)")
    ] = None,
    arms: Annotated[str, typer.Option(help="which arms, comma separated")] = ",".join(ARMS),
    limit: Annotated[int, typer.Option(min=1, help="rows of each task in a round")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each side takes; the intervals are over them")] = 6,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where eval.json and eval.png are written")] = None,
    json_: Json = False,
) -> None:
    """Needs no running server: it starts an engine in a temporary home. No prompt comes twice."""
    settings = Settings.load()
    wanted = [name.strip() for name in arms.split(",") if name.strip()]
    with bar() as progress:
        run = BENCHMARKS["eval"].measure(
            settings, task or [], arms=wanted, limit=limit, rounds=rounds, out=out, progress=progress
        )
        _show(run, json_)


@app.command("gateway", help=BENCHMARKS["gateway"].description)
def gateway(
    litellm: Annotated[
        Path | None,
        typer.Option(metavar="BIN", help="the bin folder of an environment with LiteLLM, asked beside ours"),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="streams that run at once")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of each")] = 64,
    rates: Annotated[str, typer.Option(help="requests a second, comma separated")] = "50,100,200",
    seconds: Annotated[float, typer.Option(min=0.1, help="how long each rate is kept in a round")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each side takes; the intervals are over them")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where gateway.json and gateway.png are written")
    ] = None,
    json_: Json = False,
) -> None:
    """Needs no running server: engines, gateways and the load are started for it, all on this machine."""
    asked = _rates(rates)
    with bar() as progress:
        run = BENCHMARKS["gateway"].measure(
            Settings.load(), litellm=litellm, streams=streams, tokens=tokens, rates=asked, seconds=seconds,
            rounds=rounds, out=out, progress=progress,
        )  # fmt: skip
        _show(run, json_)


@app.command("lora", help=BENCHMARKS["lora"].description)
def lora(
    rounds: Annotated[int, typer.Option(min=1, help="turns of each start that count; the intervals are over all")] = 4,
    starts: Annotated[int, typer.Option(min=1, help="how often each engine is started")] = 2,
    rank: Annotated[int, typer.Option(min=1, max=512, help="of the random adapters")] = 16,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where lora.json and lora.png are written")] = None,
    json_: Json = False,
) -> None:
    """Needs no running server: it starts two kinds of engine in turn, in temporary homes."""
    settings = Settings.load()
    with bar() as progress:
        measure = BENCHMARKS["lora"].measure
        _show(measure(settings, rounds=rounds, starts=starts, rank=rank, out=out, progress=progress), json_)


@app.command("memory", help=BENCHMARKS["memory"].description)
def memory(
    requests: Annotated[int, typer.Option(min=20, help="how many are sent while adapters change places")] = 10_000,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where memory.json and a picture are written")] = None,
    json_: Json = False,
) -> None:
    """Needs no running server: it starts its own in a temporary home, with 32 random adapters."""
    with bar() as progress:
        _show(BENCHMARKS["memory"].measure(Settings.load(), requests=requests, out=out, progress=progress), json_)


@app.command("overload", help=BENCHMARKS["overload"].description)
def overload(
    seconds: Annotated[float, typer.Option(min=1, help="how long the flood lasts, and the quiet before it")] = 60,
    json_: Json = False,
) -> None:
    """Needs no running server: it starts its own with the scripted engine, in a temporary home."""
    with bar() as progress:
        _show(BENCHMARKS["overload"].measure(Settings.load(), seconds=seconds, progress=progress), json_)


@app.command("search", help=BENCHMARKS["search"].description)
def search(
    scale: Annotated[int, typer.Option(min=100, help="passages of the synthetic corpus")] = 100_000,
    documents: Annotated[int, typer.Option(min=3, help="documents of which one changes")] = 1_000,
    questions: Annotated[int, typer.Option(min=2, help="questions each way is asked")] = 300,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where search.json and a picture are written")] = None,
    json_: Json = False,
) -> None:
    """Needs no server: it makes a corpus of words and vectors that nobody wrote, in a temporary home."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (model, progress):
        run = BENCHMARKS["search"].measure(
            settings,
            embedding=model,
            scale=scale,
            documents=documents,
            questions=questions,
            out=out,
            progress=progress,
        )
        _show(run, json_)


@app.command("vectors", help=BENCHMARKS["vectors"].description)
def vectors(
    points: Annotated[str, typer.Option(help="how many vectors, comma separated")] = ",".join(map(str, POINTS)),
    kinds: Annotated[str, typer.Option(help="which kinds of index, comma separated")] = ",".join(KINDS),
    dim: Annotated[int, typer.Option(min=8, help="numbers in a vector")] = DIM,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where vectors.json and its picture go")] = None,
    json_: Json = False,
) -> None:
    """Needs no server and no model; a million vectors take 5 GB of memory and, as a graph, many minutes."""
    try:
        counts = [int(count) for count in points.split(",")]
    except ValueError:
        raise BadRequest("--points are whole numbers, comma separated, such as 10000,100000.", param="points") from None
    wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()]
    with bar() as progress:
        run = BENCHMARKS["vectors"].measure(points=counts, kinds=wanted, dim=dim, out=out, progress=progress)
        _show(run, json_)


@app.command("startup", help=BENCHMARKS["startup"].description)
def startup(
    repeat: Annotated[int, typer.Option(min=1, help="starts in one home; the goal is for those after the first")] = 2,
    ui: Annotated[bool, typer.Option("--ui/--no-ui", help="with the chat page, or the API alone")] = True,
    json_: Json = False,
) -> None:
    """Needs no running server: it starts its own in a temporary home."""
    with bar() as progress:
        _show(BENCHMARKS["startup"].measure(Settings.load(), repeat=repeat, ui=ui, progress=progress), json_)


@app.command("train", help=BENCHMARKS["train"].description)
def train(
    source: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="a task folder or a data file (default: the tickets task)")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="prompt and answer tokens each learns, warm-up left out")] = 20_000,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each takes; the intervals are over them")] = 6,
    rivals: Annotated[str, typer.Option(help="who runs beside ours, comma separated")] = ",".join(RIVALS),
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key, for all of them; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where train.json and train.png are written")] = None,
    json_: Json = False,
) -> None:
    """Needs no server. All learn the same rows from the same first weights, taking turns."""
    settings = Settings.load()
    share_cores()
    recipe = load_recipe(None, parse_sets(set_ or []))
    against = [name.strip() for name in rivals.split(",") if name.strip()]
    with ready(settings, settings.model) as (model, progress):
        run = BENCHMARKS["train"].measure(
            source, model=model, recipe=recipe, tokens=tokens, rounds=rounds, rivals=against, out=out, progress=progress
        )
        _show(run, json_)


@app.command("survive", help=BENCHMARKS["survive"].description)
def survive(
    source: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="a task folder or a data file (default: the tickets task)")
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="how often the run is killed")] = 10,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="a recipe key; repeatable")
    ] = None,
    json_: Json = False,
) -> None:
    """Needs no server: it trains in temporary homes."""
    sets = set_ or []
    parse_sets(sets)
    with bar() as progress:
        run = BENCHMARKS["survive"].measure(source, settings=Settings.load(), sets=sets, kills=kills, progress=progress)
        _show(run, json_)


@app.command("ingest", help=BENCHMARKS["ingest"].description)
def ingest(
    kills: Annotated[int, typer.Option(min=1, help="how often the writer is killed")] = 100,
    seed: Annotated[int, typer.Option(help="the moments it is killed at")] = 0,
    json_: Json = False,
) -> None:
    """Needs no server: it writes to a corpus of its own."""
    settings = Settings.load()
    with ready(settings, settings.embedder) as (model, progress):
        embedder = Embedder(model.path, model.name)
        _show(BENCHMARKS["ingest"].measure(embedder, kills=kills, seed=seed, progress=progress), json_)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",") if rate.strip()]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= MAX_RATE for rate in rates):
        raise BadRequest(
            f"{text[:80]!r} is no list of rates from 0 to {MAX_RATE:,} a second; write 50,100.", param="rates"
        )
    return rates


def _show(run: Coroutine[Any, Any, Result], json_: bool) -> None:
    result = asyncio.run(run)
    if json_:
        data(result.wire())
    else:
        text(result.table())


def _server(settings: Settings) -> reach.Server:
    server = reach.find(settings.rooms.server_file)
    if server is None:
        raise NotReady("No server runs in this home; start one with `hybrid serve`, and repeat when it is ready.")
    return server


def _store(settings: Settings) -> AdapterStore:
    return AdapterStore(settings.rooms, State(settings.rooms.database))


def _own_tasks(home: Home, store: AdapterStore) -> list[Owned]:
    folders = [home.tasks / name for name in store.names() if (home.tasks / name / "test.jsonl").is_file()]
    if not folders:
        raise BadRequest("No task of this home has an adapter of its name; say which to route: --task DIR=ARM.")
    return [Owned(folder, frozenset([f"adapter:{folder.name}"])) for folder in folders]
