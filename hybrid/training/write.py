"""Rows out: task folders and files that read back as what was written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest, Conflict
from hybrid.rooms import publish
from hybrid.training.data import DEV_LIMIT, DEV_SHARE, Splits, read_splits
from hybrid.training.formats import row_of
from hybrid.training.splits import GROUP, draw


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSONL. Raises Conflict where the file exists: labels that cost money are never overwritten."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError as error:
        raise Conflict(f"{path} exists already; name another file, or move it away.") from error


def write_splits(
    source: Path, out: Path, *, dev: float = DEV_SHARE, test: float = DEV_SHARE, seed: int = 0, group: str = ""
) -> Splits:
    """Writes `source` as a task folder `out` with three disjoint splits; those that exist are kept, the others drawn.

    `dev` and `test` are shares of the training rows (500 rows at most). Raises DataError, BadRequest (shares),
    Conflict where `out` exists.
    """
    if not 0 < dev + test < 1 or min(dev, test) < 0:
        raise BadRequest("The shares of dev and test must be at least 0 and leave rows to learn from.")
    splits = read_splits(source, seed=seed, group=group, dev_share=dev)
    train, held = splits.train, splits.test
    if not held and test:
        named = group or str(splits.task.get("group") or GROUP)
        size = max(1, min(DEV_LIMIT, round(test * (len(train) + len(splits.dev)))))
        train, held = draw(train, size, seed=seed + 1, group=named, labels=splits.labels)
    written = Splits(
        name=splits.name, task=splits.task, kind=splits.kind, counts=splits.counts,
        train=train, dev=splits.dev, test=held,
    )  # fmt: skip
    try:
        with publish(out) as staging:
            for name, items in (("train", train), ("dev", splits.dev), ("test", held)):
                write_rows(staging / f"{name}.jsonl", (row_of(item, splits.instruction) for item in items))
            about = {"instruction": "", "metric": "", **splits.task, "name": splits.name}
            (staging / "task.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    except FileExistsError as error:
        raise Conflict(f"{out} exists already; name a folder that does not.") from error
    return written
