"""`hybrid corpora`: what was indexed, as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybrid.cli.index import open_library
from hybrid.cli.say import bar, data, say, text
from hybrid.lifecycle.attachments import Attachments
from hybrid.lifecycle.corpora import Corpora
from hybrid.lifecycle.teach_reader import reader_for
from hybrid.lifecycle.tune_search import dev_examples, learn
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.types import JSON
from hybrid.types.rights import Rights

app = typer.Typer(help="The corpora of this home.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout")]
Name = Annotated[str, typer.Argument(help="the corpus")]
OWNER = Rights()


def _attachments() -> Attachments:
    settings = Settings.load()
    state = State(settings.rooms.database)
    return Attachments(state, Corpora(settings.rooms, state, open_library(settings)))


def _told(corpora: Corpora, row: JSON) -> JSON:
    info = corpora.info(row)
    counts = {key: getattr(info, key) for key in ("documents", "passages", "bytes", "stage")} if info else {}
    facts = {key: row[key] for key in ("name", "id", "owner", "groups", "created")}
    nothing = {"documents": 0, "passages": 0, "bytes": 0, "stage": "meaning"}
    return {**facts, **nothing, **counts, "engine": corpora.library.engine}


@app.command("list")
def list_(json_: Json = False) -> None:
    """Every corpus, what it holds and who sees it."""
    corpora = _attachments().corpora
    rows = [_told(corpora, row) for row in corpora.listed(OWNER)]
    if json_:
        data({"corpora": rows})
        return
    for row in rows:
        seen = ", ".join(row["groups"] + [row["owner"]] * bool(row["owner"])) or "all"
        held = f"{row['documents']} documents, {row['passages']} passages, vectors in {row['engine']}"
        late = "; searched by words while its vectors are made" if row["stage"] == "words" else ""
        text(f"{row['name']}  {held}, seen by {seen}{late}")


@app.command("show")
def show(name: Name, json_: Json = False) -> None:
    """One corpus with its documents, and the files that are on their way or failed."""
    attachments = _attachments()
    row = attachments.corpora.named(name, OWNER)
    kept = ("file", "filename", "status", "error", "bytes", "attributes", "groups", "created")
    files = [{"id" if key == "file" else key: one[key] for key in kept} for one in attachments.listed(row, OWNER)]
    if json_:
        data({**_told(attachments.corpora, row), "files": files})
        return
    for one in files:
        text(f"{one['id']}  {one['filename']}  {one['status']}  {one['bytes']} bytes{'  ' + (one['error'] or '')}")


@app.command("share")
def share(
    name: Name,
    group: Annotated[
        list[str] | None, typer.Option(help="who sees it; repeatable; without any, as it was made")
    ] = None,
    json_: Json = False,
) -> None:
    """Lets only the keys of these groups (and the key that made it) see a corpus, from their next request on.

    hybrid corpora share prices --group sales
    """
    corpora = _attachments().corpora
    row = corpora.change(corpora.named(name, OWNER), OWNER, groups=group or [])
    if json_:
        data(_told(corpora, row))
    else:
        say(f"{name} is seen by {', '.join(row['groups']) or row['owner'] or 'all keys'}.")


@app.command("delete")
def delete(
    name: Name, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False, json_: Json = False
) -> None:
    """Takes a corpus away with all it holds; the files it was read from stay."""
    corpora = _attachments().corpora
    row = corpora.named(name, OWNER)
    if not yes:
        typer.confirm(f"Delete the corpus {name} with all its passages?", abort=True, err=True)
    corpora.delete(row)
    if json_:
        data({"name": name, "deleted": True})
    else:
        say(f"The corpus {name} is deleted.")


@app.command("alike")
def alike(name: Annotated[str, typer.Argument(help="the corpus")], json_: Json = False) -> None:
    """The passages that say almost the same, in groups: copies that crowd others out of an answer.

    hybrid corpora alike handbook
    """
    found = open_library(Settings.load()).alike(name)
    if json_:
        data({"groups": [{"count": len(group), "ids": [p.id for p in group]} for group in found]})
        return
    for group in found:
        text(f"{len(group)}  {', '.join(p.id for p in group)}\n   {group[0].text[:200]}")
    say(f"{sum(map(len, found))} passages of {name} in {len(found)} groups say almost the same.")


@app.command("tune")
def tune(
    name: Name,
    task: Annotated[Path, typer.Option(metavar="DIR", help="a task folder; its dev questions name their passages")],
    reader: Annotated[
        bool, typer.Option("--reader", help="teach a reader of passages from its training questions, too: minutes")
    ] = False,
    json_: Json = False,
) -> None:
    """Learns from a task's dev questions how a corpus is searched best, and searches it so from now on.

    hybrid corpora tune handbook --task tasks/handbook --reader
    """
    settings = Settings.load()
    folder, examples = dev_examples(task)
    library = open_library(settings)
    with bar() as progress:
        reads = reader_for(library, name, task, settings.cache, progress) if reader else None
        learned = learn(library, name, folder, examples, progress, reader=reads)
    library.tune(name, learned, reads)
    if json_:
        kept = {"rerank": learned.reranker is not None, "refuse": learned.answerable is not None, "reader": reader}
        data({"weight": learned.weight, **kept, **learned.facts})
        return
    facts = learned.facts
    closer = "a closer look helps and is taken" if learned.reranker else "a closer look does not help and is left out"
    say(
        f"{name}: meaning counts {learned.weight:g}, words {1 - learned.weight:g}; {closer}. nDCG@10 on "
        f"{facts['questions']} dev questions: {facts['ndcg@10']} before, {facts['fused']} fused, "
        f"{facts['reranked']} after the closer look (on questions it did not learn from)."
    )
    told = facts["refusals"]
    if learned.answerable is None:
        say("What these questions find does not tell when the answer is missing: none is refused.")
    else:
        say(
            f"Where nothing found is likely to answer, `rag` says so: to {told['refused']:.0%} of these questions with "
            f"their passages taken away, and wrongly to {told['false_refusals']:.0%} of them as they are (likewise)."
        )


@app.command("backup")
def backup(
    name: Annotated[str, typer.Argument(help="the corpus")],
    file: Annotated[Path, typer.Argument(help="a file that does not exist yet")],
    json_: Json = False,
) -> None:
    """Writes all that a corpus has committed to one file; others may go on writing to it.

    hybrid corpora backup handbook handbook.backup
    """
    manifest = open_library(Settings.load()).backup(name, file)
    if json_:
        data(manifest)
    else:
        say(f"{file} holds the corpus {name}: {manifest['bytes']} bytes, SHA-256 {manifest['sha256']}.")


@app.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="what `backup` wrote")],
    name: Annotated[str | None, typer.Option(help="another name for the corpus")] = None,
    json_: Json = False,
) -> None:
    """Makes a corpus of a backup, once every byte of it is checked; none is replaced.

    hybrid corpora restore handbook.backup --name handbook-of-monday
    """
    info = open_library(Settings.load()).restore(file, name)
    if json_:
        data(info.wire())
    else:
        say(f"{info.name} holds {info.documents} documents again, {info.passages} passages.")
