"""The quickstart: two small tasks of our own, generated from a seed, so that a newcomer sees the whole loop at once.

Nothing is fetched: the same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from hybrid.quickstart import orders_sql, tickets
from hybrid.quickstart.grammar import SPLITS, Row, Split, distinct
from hybrid.rooms import Home, write_json

SEED = 20
COUNTS: Mapping[Split, int] = {"train": 700, "dev": 80, "test": 100}

#: task name → what its task.json says, and the function that makes one row
TASKS: Mapping[str, tuple[Mapping[str, Any], Callable[[Split, Random], Row]]] = {
    "tickets": (tickets.CARD, tickets.make),
    "orders_sql": (orders_sql.CARD, orders_sql.make),
}


def write_tasks(home: Home, seed: int = SEED) -> list[Path]:
    """Writes the task folders that `home` lacks, `task.json` last, and returns the folders of all of them."""
    for name in TASKS:
        folder = home.tasks / name
        if not (folder / "task.json").exists():
            _write_task(name, folder, seed)
    return [home.tasks / name for name in TASKS]


def _write_task(name: str, folder: Path, seed: int) -> None:
    card, make = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    rows = distinct(make, COUNTS, Random(f"{name} {seed}"))
    for split in SPLITS:
        lines = [json.dumps(r.wire(f"{name}-{split}-{i}"), ensure_ascii=False) for i, r in enumerate(rows[split])]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "task.json", card)
