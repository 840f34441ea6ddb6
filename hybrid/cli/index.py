"""`hybrid index` and `hybrid search`: documents in, passages out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.cli.ready import open_embedder
from hybrid.cli.say import bar, data, say, text
from hybrid.errors import DataError
from hybrid.knowledge.search import Library
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.types.passage import Passage


def open_library(settings: Settings) -> Library:
    """The corpora of a home, with the embedder that its settings name."""
    return Library(settings.rooms, open_embedder(settings), settings.retrieval)


def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="documents, or a folder with a corpus.jsonl")],
    name: Annotated[str | None, typer.Option(help="the corpus's name; the folder's by default")] = None,
    rebuild: Annotated[bool, typer.Option(help="embed everything again, as after a change of embedder")] = False,
    json_: Annotated[bool, typer.Option("--json", help="the report as JSON on stdout")] = False,
) -> None:
    """Ingests documents into a corpus, incrementally; a running server sees the new passages by itself.

    hybrid index ./handbook --name handbook
    """
    if not folder.exists():
        raise DataError(f"{folder} does not exist; give a folder of documents or one that holds a corpus.jsonl.")
    settings = Settings.load()
    corpus = check_name(name or folder.resolve().name, "corpus")
    library = open_library(settings)
    with bar() as progress:
        report = library.ingest(corpus, folder, progress=progress, rebuild=rebuild)
    if json_:
        data(report.wire())
    else:
        say(str(report))


def search(
    corpus: Annotated[str, typer.Argument(help="the corpus to search")],
    query: Annotated[str, typer.Argument(help="what to look for")],
    k: Annotated[int, typer.Option(min=1, max=100, help="how many passages")] = 5,
    json_: Annotated[bool, typer.Option("--json", help='{"hits": [...]} on stdout')] = False,
) -> None:
    """The passages nearest to a query.

    hybrid search handbook "how is an adapter loaded" --k 3
    """
    library = open_library(Settings.load())
    hits = library.search(corpus, query, k, every_id=True)
    if library.trouble:
        say(library.trouble)
    if json_:
        rows = [
            {"id": h.id, "title": h.title, "text": h.text, "score": round(h.score, 4)}
            | {"scores": h.scores.wire() if h.scores else None, "alike": h.alike}
            for h in hits
        ]
        data({"hits": rows})
        return
    for hit in hits:
        more = f"  (and {hit.alike} almost the same)" if hit.alike else ""
        text(f"{_scores(hit)}  {hit.id}  {hit.title}{more}\n       {hit.text[:300]}")


def _scores(hit: Passage) -> str:
    """What each stage made of a passage, the cosine first."""
    others = [] if hit.scores is None else [f"{k} {v}" for k, v in hit.scores.wire().items() if v and k != "dense"]
    return "  ".join([f"{hit.score:.3f}", *others])
