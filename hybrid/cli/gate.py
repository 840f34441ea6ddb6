"""`hybrid gate`: teaches the gate from outcomes, shows what it learned, and says what it would have scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hybrid.cli.ready import open_embedder
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import BadRequest, NotFound
from hybrid.gate import published
from hybrid.gate.front import areas, front
from hybrid.gate.outcomes import read_outcomes
from hybrid.gate.routed import chosen, judge, slack_of
from hybrid.gate.teach import score_for, teach
from hybrid.gate.vectors import embedded
from hybrid.settings import Settings
from hybrid.types import JSON

app = typer.Typer(help="The gate that outcomes taught: train, show, eval, promote, rollback.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]


@app.command("train")
def train(
    from_: Annotated[list[Path], typer.Option("--from", metavar="PATH", help="a report folder, or a .jsonl or .csv")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH…", help="more of them")] = None,
    name: Annotated[str, typer.Option(help="`gate` is the one that serves")] = published.GATE,
    seed: Annotated[int, typer.Option(help="the draw of the folds")] = 0,
    json_: Json = False,
) -> None:
    """Teaches a gate with measured outcomes and publishes it.

    hybrid gate train --from eval/reports/dev
    """
    sources = [*from_, *(more or ())]
    table = read_outcomes(sources, teach=True)
    say(f"{len(table)} queries, {len(table.arms)} arms: {', '.join(table.arms)}")
    settings = Settings.load()
    embedder = open_embedder(settings)
    with bar() as progress:
        made = teach(
            settings.rooms, table, embedder.embed_queries, embedder.query_digest, settings.cache,
            name=name, seed=seed, progress=progress, facts={"from": [str(path.resolve()) for path in sources]},
        )  # fmt: skip
    if json_:
        metrics = made.card["kinds"][made.card["model"]]
        row = {"name": name, "version": made.version, "path": str(made.path), "kind": made.card["model"]}
        data({**row, "metrics": metrics, "promoted": made.promoted, "reason": made.reason})
        return
    text(_table(made.card))
    taken = f"{name}@{made.version} answers for {name}." if made.promoted else f"It was not promoted: {made.reason}."
    say(f"Published {name}@{made.version} ({made.card['model']}). {taken}")


@app.command("show")
def show(name: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")] = published.GATE, json_: Json = False) -> None:
    """What a gate learned: each kind on held-out rows, its calibration, and what giving away quality saves."""
    home = Settings.load().rooms
    wanted, version = _which(name)
    number = version or published.live_version(home, wanted)
    if number is None:
        raise NotFound(f"No gate {wanted[:80]!r} was taught yet; `hybrid gate train --from REPORT` teaches one.")
    card = published.learned_card(home, wanted, number)
    live = published.live_version(home, wanted)
    if json_:
        data({**card, "live": live == number, "versions": published.learned_versions(home, wanted)})
        return
    text(f"{wanted}@{number}  {card['model']}  {'live' if live == number else 'not live'}  {card['reason']}".rstrip())
    if wanted == published.FEEDBACK:
        text(f"{card['n']} rewards moved {', '.join(card['arms'])}; {card['holdout']['words']}")
        return
    text(_table(card))
    text(f"calibration error {card['calibration']['ece_before']} before, {card['calibration']['ece_after']} after")
    for slack, score, cost in card["front"]:
        text(f"giving away up to {slack:<5g} scores {score:.4f} and costs {_cost(cost)}")
    if aiq := card.get("aiq"):
        text(_areas(aiq))


@app.command("eval")
def evaluate(
    on: Annotated[list[Path], typer.Option("--on", metavar="PATH", help="a report folder, or a .jsonl or .csv")],
    more: Annotated[list[Path] | None, typer.Argument(metavar="PATH…", help="more of them")] = None,
    gate: Annotated[str, typer.Option("--gate", metavar="NAME[@VERSION]")] = published.GATE,
    quality_cost: Annotated[float, typer.Option(min=0, max=1, help="0 cheapest … 1 best")] = 1.0,
    curve: Annotated[bool, typer.Option("--front", help="the score and the cost at every slack, too")] = False,
    json_: Json = False,
) -> None:
    """What a gate would have scored on measured outcomes, beside random, the best single arm and the oracle.

    hybrid gate eval --gate gate@2 --on eval/reports/test
    """
    table = read_outcomes([*on, *(more or ())], teach=False)
    settings = Settings.load()
    embedder = open_embedder(settings)
    wanted, version = _which(gate)
    found = published.load_learned(settings.rooms, wanted, version, embedder.query_digest)
    if found is None:
        raise NotFound(f"No gate {wanted[:80]!r} was taught yet; `hybrid gate train --from REPORT` teaches one.")
    with bar() as progress:
        vectors = embedded(table.queries, embedder.embed_queries, embedder.query_digest, settings.cache, progress)
    score, cost = score_for(found[0], table, vectors)
    row = judge(table, chosen(table, score, cost, slack_of(quality_cost))).wire()
    if curve:
        rows = front(table, score, cost)
        row |= {"front": rows, "aiq": areas(table, rows)}
    if json_:
        data(row)
        return
    for key, value in row.items():
        text(f"{key}: {value}")


@app.command("promote")
def promote(name: Annotated[str, typer.Argument(metavar="NAME@VERSION")], json_: Json = False) -> None:
    """Lets the bare name mean a version."""
    wanted, version = _which(name)
    if version is None:
        raise BadRequest(f"Say which version: {wanted}@VERSION; `hybrid gate show {wanted} --json` lists them.")
    published.promote(Settings.load().rooms, wanted, version)
    _told(json_, wanted, version, "answers for")


@app.command("rollback")
def rollback(name: Annotated[str, typer.Argument(metavar="NAME")] = published.GATE, json_: Json = False) -> None:
    """Lets the bare name mean the version that it meant before."""
    _told(json_, name, published.rollback(Settings.load().rooms, name), "is back as")


def _which(spec: str) -> tuple[str, int | None]:
    """(name, version or None) of NAME or NAME@VERSION. Raises BadRequest."""
    name, at, number = spec.partition("@")
    if at and not (number.isascii() and number.isdecimal()):
        raise BadRequest(f"{spec[:80]!r} is no gate; write NAME or NAME@VERSION, like gate@2.", param="gate")
    return name, int(number) if at else None


def _table(card: JSON) -> str:
    """Each kind on rows held out, as lines."""
    head = f"{'kind':<8} {'auto':>7} {'random':>7} {'best single':>11} {'oracle':>7} {'recovered':>9} {'cost':>10}"
    return "\n".join([head, *(_row(kind, row, kind == card["model"]) for kind, row in card["kinds"].items())])


def _row(kind: str, row: JSON, taken: bool) -> str:
    recovered = "-" if row["recovered"] is None else f"{row['recovered']:.3f}"
    numbers = f"{row['auto']:7.4f} {row['random']:7.4f} {row['best_single']['score']:11.4f} {row['oracle']:7.4f}"
    cost = _cost(row["cost"]["auto"])
    return f"{kind:<8} {numbers} {recovered:>9} {cost:>10}{'  ← taken' if taken else ''}"


def _areas(aiq: JSON) -> str:
    return f"area under that front {aiq['auto']:.4f}, under the arms taken singly {aiq['singles']:.4f} (AIQ)"


def _cost(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _told(json_: bool, name: str, version: int, verb: str) -> None:
    if json_:
        data({"name": name, "version": version})
    else:
        say(f"{name}@{version} {verb} {name}.")
