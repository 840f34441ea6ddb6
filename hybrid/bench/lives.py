"""The lives of a process that writes to a corpus and is killed: run by `bench ingest`, and never by hand.

One process loads the embedder and forks a life after another. A life goes on with the plan where the last one was cut
off, and says after each step that it is done; whoever was told so counts on it. Writes a JSON line a life to stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from hybrid.errors import HybridError, NotFound
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings

CORPUS = "lives"
#: small passages and small transactions: many places to be cut off
SETTINGS = RetrievalSettings(chunk_tokens=24, embed_batch=3)
_FILES, _ALL = 12, 10_000
#: the scores of one text differ by this where it was embedded beside others
SAME = 0.01
_QUESTIONS = ("which lamp was lit", "who mended the net", "note on the ferry", "tower 3", "what did the keeper say")
_WORDS = ("keeper", "lamp", "ferry", "net", "tower", "storm", "harbour", "bell", "winter", "rope", "gull", "clock")

Held = dict[str, str]


def text_of(step: int, name: str) -> str:
    """A text that no other step writes; some are cut into several passages."""
    dice = random.Random(f"{step}/{name}")
    sentences = [" ".join(dice.choices(_WORDS, k=8)) for _ in range(dice.choice((1, 1, 1, 8)))]
    return f"{name} at {step}. " + ". ".join(sentences) + "."


def plan(step: int) -> tuple[str, dict[str, str | None]]:
    """What a step does: `ingest` with files written or removed, or `add` and `delete` with one document."""
    dice = random.Random(step)
    if step % 4 == 0:
        files = dice.sample(range(_FILES), 4 if step else _FILES)
        gone = dice.choice(files) if step else -1
        return "ingest", {f"file{i}.txt": None if i == gone else text_of(step, f"file{i}") for i in files}
    if step % 4 == 3:
        return "delete", {f"added{step - 2}": None}
    return "add", {f"added{step}": text_of(step, f"added{step}")}


def held_after(step: int) -> Held:
    """What a corpus holds when all steps up to this one are done: id → text."""
    held: Held = {}
    for one in range(step + 1):
        for name, text in plan(one)[1].items():
            held.pop(name, None)
            if text is not None:
                held[name] = text
    return held


def live(library: Library, room: Path, until: int | None = None) -> None:
    """Does one step after another from where the last life was told to be, each acknowledged when it is done."""
    step = acknowledged(room) + 1
    while until is None or step <= until:
        act, documents = plan(step)
        if act == "ingest":
            _write(room / "files", documents)
            library.ingest(CORPUS, room / "files")
        for name, text in documents.items() if act != "ingest" else ():
            if text is not None:
                library.add_document(CORPUS, name, text=text)
            else:
                with contextlib.suppress(NotFound):  # the life before was cut off behind it
                    library.delete_document(CORPUS, name)
        with (room / "done").open("a") as done:
            done.write(f"{step}\n")
        step += 1


def _write(folder: Path, documents: dict[str, str | None]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in documents.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        else:
            (folder / name).write_text(text)


def acknowledged(room: Path) -> int:
    """The last step that was said to be done, or -1."""
    with contextlib.suppress(FileNotFoundError):
        lines = (room / "done").read_text().split()
        return int(lines[-1]) if lines else -1
    return -1


def faults(library: Library, room: Path) -> dict[str, list[str]]:
    """What is lost or invented after a kill. The step that was cut off may have happened, in part or not at all."""
    step = acknowledged(room)
    before, after = held_after(step), held_after(step + 1)
    try:
        ids = [d.id for d in library.documents(CORPUS)]
        named = library.called(CORPUS, ids)
        found = {p.document for p in library.search(CORPUS, _QUESTIONS[0], _ALL, every_id=True)} if ids else set()
    except NotFound:  # killed before the first commit
        ids, named, found = [], {}, set()
    lost = sorted((before.keys() & after.keys()) - found)
    invented = sorted(name for name in found if name not in before and name not in after)
    # what a document says is one of its two texts, whole: pieces are joined without the blanks between them
    torn = [name for name in ids if _joined([p.text for p in named[name]]) not in _allowed(name, before, after)]
    return {"lost": lost, "invented": invented + sorted(set(ids) ^ found), "torn": torn}


def _allowed(name: str, *states: Held) -> set[str]:
    return {_joined([held[name]]) for held in states if name in held}


def _joined(texts: list[str]) -> str:
    return "".join("".join(texts).split())


def apart(library: Library, scratch: Library, room: Path) -> int:
    """How many answers to the questions are not those of a corpus that was built from scratch from the same."""
    scratch.ingest(CORPUS, room / "files")
    for name, text in held_after(acknowledged(room)).items():
        if not name.startswith("file"):
            scratch.add_document(CORPUS, name, text=text)
    different = 0
    for question in _QUESTIONS:
        ours, theirs = (
            {p.id: p.score for p in one.search(CORPUS, question, _ALL, every_id=True)} for one in (library, scratch)
        )
        different += ours.keys() != theirs.keys() or any(abs(ours[id_] - theirs[id_]) > SAME for id_ in ours)
    return different


def _forked(work: Callable[[], Any], after: float | None = None) -> Any:
    """What `work` returns in a process of its own; None when that was killed `after` so many seconds.

    Raises HybridError when the process failed by itself; its words are on stderr.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(work()))
            code = 0
        except BaseException:  # a fork never returns into its parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading) as told:
        answer = told.read()
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 0:
        raise HybridError("A life ended by itself.")
    return json.loads(answer) if answer else None


def _lives(room: Path, embedder: Embedder, kills: int, seed: int) -> Iterator[dict[str, Any]]:
    def opened(folder: str = "home") -> Any:
        return closing(Library(Home(room / folder), embedder, SETTINGS))

    def grow(until: int | None) -> bool:
        with opened() as library:
            live(library, room, until)
        return True

    def look() -> dict[str, list[str]]:
        with opened() as library:
            return faults(library, room)

    def compare() -> int:
        with opened() as library, opened("scratch") as scratch:
            return apart(library, scratch, room)

    begun = time.monotonic()
    _forked(lambda: grow(3))
    pace = (time.monotonic() - begun) / 4
    dice = random.Random(seed)
    for kill in range(1, kills + 1):
        after = dice.uniform(0, 3 * pace)
        _forked(lambda: grow(None), after)
        yield {"kill": kill, "after_s": round(after, 3), "step": acknowledged(room) + 1, **_forked(look)}
    _forked(lambda: grow(acknowledged(room) + 1))
    yield {"documents": len(held_after(acknowledged(room))), "apart": _forked(compare), **_forked(look)}


def main() -> None:
    """Arguments: a folder to work in, the embedder's folder and name, how many kills, and a seed."""
    room, model, name, kills, seed = sys.argv[1:]
    embedder = Embedder(Path(model), name)
    embedder.digest, embedder.dim  # noqa: B018  read once, by all lives
    for told in _lives(Path(room), embedder, int(kills), int(seed)):
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
