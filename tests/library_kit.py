"""Libraries that a test opens as one process after another would, and the rows they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import RetrievalSettings

#: opens one more library, with the settings that are given
Open = Callable[..., Library]


@contextmanager
def libraries(home: Path, embedder: Embedder) -> Iterator[Open]:
    """What opens libraries of a home, or of another one; all are closed at the end."""
    with ExitStack() as opened:

        def open_(where: Path = home, embedder: Embedder = embedder, **settings: object) -> Library:
            return opened.enter_context(closing(Library(Home(where), embedder, RetrievalSettings(**settings))))

        yield open_


def write(folder: Path, texts: Mapping[str, str]) -> Path:
    """A folder of one row a text."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": name, "title": "", "text": text} for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def coded(count: int) -> dict[str, str]:
    """Texts that only their codes tell apart."""
    told = "Part {} of the pump costs {} coins and is made of brass."
    return {f"ZX-{n}Q": told.format(f"ZX-{n}Q", n % 90) for n in range(4100, 4100 + count)}


#: texts that are asked for in words that they do not have
FACTS = {
    "ferry": "A vessel crosses the sound to Osterholm at dawn every weekday.",
    "bakery": "Loaves of rye come out of the oven in Mill Lane on Tuesdays.",
    "cat": "Felines doze for most of the day and hunt at dusk.",
    "tower": "The clock on the town hall runs slow because a stork nests on its hand.",
}
