"""Task folders lent to whoever serves a home: their training rows are few-shot examples while the lender lives.

A server finds examples in its home, and the task that is evaluated may lie anywhere. The lender says so in a file of
the home's hidden folder, which its owner alone can write: no request lends anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from hybrid.rooms import Home, write_json


@contextlib.contextmanager
def lending(home: Home, folders: Mapping[str, Path]) -> Iterator[None]:
    """Lends task folders by name while the block runs, or this process lives."""
    shelf = home.hidden / "lent"
    for file in shelf.glob("*.json"):
        if not _read(file):
            file.unlink(missing_ok=True)
    mine = shelf / f"{os.getpid()}-{secrets.token_hex(4)}.json"
    if folders:
        shelf.mkdir(parents=True, exist_ok=True)
        where = {name: str(folder.resolve()) for name, folder in folders.items()}
        write_json(mine, {"pid": os.getpid(), "born": psutil.Process().create_time(), "folders": where})
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)


def lent(home: Home) -> dict[str, Path]:
    """What living processes lend to this home now: name → task folder."""
    return {name: folder for file in sorted((home.hidden / "lent").glob("*.json")) for name, folder in _read(file)}


def _read(file: Path) -> list[tuple[str, Path]]:
    """What a file lends; nothing once its lender is gone."""
    try:
        told = json.loads(file.read_bytes())
        alive = psutil.Process(told["pid"]).create_time() == told["born"]
    except (OSError, ValueError, KeyError, psutil.Error):
        return []
    return [(name, Path(folder)) for name, folder in told["folders"].items()] if alive else []
