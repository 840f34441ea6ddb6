"""`hybrid data`: what stands before training. Look at rows, split them, label more of them, make more of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.cli.ready import made_ready, open_embedder
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Embedder
from hybrid.settings import Settings
from hybrid.training.check import Checked
from hybrid.training.check import check as check_source
from hybrid.training.choose import choose, simulate
from hybrid.training.data import DEV_SHARE, Splits, read_splits
from hybrid.training.endpoint import Endpoint
from hybrid.training.grow import Grown
from hybrid.training.grow import grow as grow_rows
from hybrid.training.lengths import open_tokenizer
from hybrid.training.pool import read_pool
from hybrid.training.pseudo import Labelled, answered, before_and_after, label_by_endpoint, label_by_head
from hybrid.training.recipes import RECIPE_FILE, load_recipe
from hybrid.training.splits import is_closed
from hybrid.training.write import write_rows, write_splits

app = typer.Typer(help="Check, split, label and grow training data.", no_args_is_help=True)

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="a task folder, a data file, or documents")]
PoolFile = Annotated[Path | None, typer.Option("--pool", metavar="FILE", help="unlabelled rows: .jsonl, .json or .txt")]
Group = Annotated[str, typer.Option(help='the key of `meta` whose rows belong together [task.json\'s, or "group"]')]
Seed = Annotated[int, typer.Option(min=0, help="of every draw")]
Url = Annotated[str | None, typer.Option("--endpoint", metavar="URL", help="OpenAI-compatible, ends in /v1")]
Model = Annotated[str | None, typer.Option(help="the model to ask there")]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="where the new rows go; must not exist")]
Measure = Annotated[bool, typer.Option(help="train a head with and without the new rows and compare on dev")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]


@app.command("check")
def check(
    source: Source,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="where pictures are written")] = None,
    tokens: Annotated[bool, typer.Option(help="count tokens with the base model's tokenizer")] = True,
    group: Group = "",
    json_: Json = False,
) -> None:
    """Says what training would make of the data: complaints, counts, lengths, balance. Exit 1 where it would refuse.

    hybrid data check ./tickets --out ./report
    """
    settings = Settings.load()
    tokenizer = open_tokenizer(made_ready(settings, settings.model)) if tokens else None
    recipe = load_recipe(settings.rooms.adapters / source.stem / RECIPE_FILE, {})
    found = check_source(source, tokenizer=tokenizer, limit=recipe.max_length, seed=recipe.seed, group=group)
    pictures = [str(path) for path in found.draw(out)] if out else []
    if json_:
        data({**found.wire(), "pictures": pictures})
    else:
        _describe(found, pictures)
    raise typer.Exit(0 if found.ok else 1)


@app.command("split")
def split(
    source: Source,
    out: Annotated[Path, typer.Option(metavar="DIR", help="the new task folder; must not exist")],
    dev: Annotated[float, typer.Option(help="share of the rows, where there is no dev split")] = DEV_SHARE,
    test: Annotated[float, typer.Option(help="share of the rows, where there is no test split")] = DEV_SHARE,
    group: Group = "",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Writes a task folder with disjoint splits: labels in their shares, groups together, duplicates and leaks out.

    hybrid data split rows.jsonl --out ./tickets
    """
    done = write_splits(source, out, dev=dev, test=test, seed=seed, group=group)
    sizes = {name: len(getattr(done, name)) for name in ("train", "dev", "test")}
    if json_:
        data({"out": str(out), "rows": sizes, "counts": done.counts.wire()})
        return
    for line in (*done.counts.complaints, *done.counts.removed):
        say(f"left out: {line}")
    say(f"{out}: " + ", ".join(f"{n} {name}" for name, n in sizes.items()))


@app.command("next")
def next_(
    source: Source,
    pool: PoolFile = None,
    n: Annotated[int, typer.Option("-n", min=1, help="how many rows")] = 20,
    simulated: Annotated[bool, typer.Option("--simulate", help="choosing against chance on this data's rows")] = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """The unlabelled rows most worth labelling next, by how unsure a head is and how unlike they are.

    hybrid data next ./tickets --pool inbox.jsonl -n 50
    """
    splits = read_splits(source, seed=seed)
    texts, given = answered(splits.train)
    answers = given if is_closed(splits.train, splits.labels) else None
    if simulated:
        dev_texts, dev_answers = answered(splits.dev)
        vectors, dev = _vectors(open_embedder(Settings.load()), texts, dev_texts)
        _show_simulation(simulate(vectors, answers, dev, dev_answers, seed=seed), answers is not None, json_)
        return
    if pool is None:
        raise BadRequest("Name the unlabelled rows with --pool FILE, or ask for --simulate.")
    found = read_pool(pool, splits)
    train, candidates = _vectors(open_embedder(Settings.load()), texts, [row.text for row in found.rows])
    rows = [
        {
            "id": found.rows[choice.position].id,
            "input": found.rows[choice.position].text,
            "uncertainty": round(choice.uncertainty, 4),
            "distance": round(choice.distance, 4),
        }
        for choice in choose(train, answers, candidates, n)
    ]
    if json_:
        data({"rows": rows, "pool": len(found.rows), "known": found.known})
        return
    for row in rows:
        text(f"{row['uncertainty']:.3f}  {row['distance']:.3f}  {row['id']}  {str(row['input'])[:200]}")


@app.command("label")
def label(
    source: Source,
    out: OutFile,
    pool: PoolFile = None,
    above: Annotated[float, typer.Option(min=0, max=1, help="the confidence from which an answer is kept")] = 0.9,
    endpoint: Url = None,
    model: Model = None,
    measure: Measure = True,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Pseudo-labels: a head's answers to unlabelled rows, or an endpoint's, kept where they are confident.

    hybrid data label ./tickets --pool inbox.jsonl --out more.jsonl
    hybrid data label ./tickets --pool inbox.jsonl --out more.jsonl --endpoint http://127.0.0.1:8000/v1 --model auto
    """
    if pool is None:
        raise BadRequest("Name the unlabelled rows with --pool FILE.")
    splits = read_splits(source, seed=seed)
    rows = read_pool(pool, splits)
    if endpoint:
        done = asyncio.run(_labelled(splits, rows, above, endpoint, _named(model)))
        embedder = open_embedder(Settings.load()) if measure else None
    else:
        embedder = open_embedder(Settings.load())
        done = label_by_head(splits, rows, above, embedder)
    write_rows(out, done.rows)
    told = {"out": str(out), "rows": len(done.rows), "unsure": done.unsure, "unlisted": done.unlisted}
    told |= {"known": rows.known, "dev_share": done.dev_share, "dev_accuracy": done.dev_accuracy}
    _finish(told, splits, done.rows, embedder if measure else None, json_)


@app.command("grow")
def grow(
    source: Source,
    out: OutFile,
    endpoint: Url = None,
    model: Model = None,
    n: Annotated[int, typer.Option("-n", min=1, help="how many rows")] = 100,
    measure: Measure = True,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Synthetic rows: other wordings of training inputs, marked as such, new to train, dev and test.

    hybrid data grow ./tickets --endpoint http://127.0.0.1:8000/v1 --model base -n 200 --out grown.jsonl
    """
    if not endpoint:
        raise BadRequest("Name an endpoint, for example --endpoint http://127.0.0.1:8000/v1 --model base.")
    splits = read_splits(source, seed=seed)
    done = asyncio.run(_grown(splits, n, endpoint, _named(model), seed))
    write_rows(out, done.rows)
    told = {"out": str(out), "rows": len(done.rows), "asked": done.asked, "repeated": done.repeated}
    _finish(told, splits, done.rows, open_embedder(Settings.load()) if measure else None, json_)


async def _labelled(splits: Splits, rows: Any, above: float, url: str, model: str) -> Labelled:
    async with Endpoint(url, model) as endpoint:
        return await label_by_endpoint(splits, rows, above, endpoint)


async def _grown(splits: Splits, n: int, url: str, model: str, seed: int) -> Grown:
    async with Endpoint(url, model) as endpoint:
        return await grow_rows(splits, n, endpoint, seed=seed)


def _named(model: str | None) -> str:
    if not model:
        raise BadRequest("Name the model to ask with --model.")
    return model


def _finish(
    told: dict[str, Any], splits: Splits, rows: Sequence[dict[str, Any]], embedder: Embedder | None, json_: bool
) -> None:
    """Says what was written and, with an embedder, what it is worth."""
    measured = before_and_after(splits, rows, embedder) if embedder else None
    if json_:
        data({**told, "measured": measured})
        return
    say(", ".join(f"{name} {value}" for name, value in told.items() if value is not None))
    if measured:
        say(f"dev accuracy of a head: {measured['before']:.3f} without the new rows, {measured['after']:.3f} with them")
    elif embedder:
        say("Not measured: no new rows, or open answers, which no head can give. Train with and without the new rows.")


def _show_simulation(rows: list[dict[str, Any]], closed: bool, json_: bool) -> None:
    measure = "dev accuracy" if closed else "mean cosine of dev rows to the nearest labelled row"
    if json_:
        data({"measure": measure, "budgets": rows})
        return
    text(f"labelled  chosen  random  gain    ({measure})")
    for row in rows:
        text(f"{row['labelled']:8}  {row['chosen']:.4f}  {row['random']:.4f}  {row['gain']:+.4f}")


def _describe(found: Checked, pictures: Sequence[str]) -> None:
    wire = found.wire()
    for line in (*wire["complaints"], *wire["removed"]):
        say(line)
    for name in ("rows", "counts", "tokens"):
        if wire[name]:
            text(f"{name:8}  " + ", ".join(f"{key} {value}" for key, value in wire[name].items()))
    for name, about in wire["balance"].items():
        if about:
            text(f"{name:8}  " + ", ".join(f"{key} {value}" for key, value in about.items()))
    for path in pictures:
        text(f"picture   {path}")
    say(f"{wire['name']}: {wire['kind']} data, " + ("ready for training" if found.ok else "not ready for training"))


def _vectors(embedder: Embedder, *lots: Sequence[str]) -> list[Any]:
    """The vectors of each lot, told on a bar."""
    with bar() as progress:
        return [embedder.embed(lot, lambda done, total: progress("embedding", done, total)) for lot in lots]
