"""Where a run keeps what it would need to go on: a folder that the same inputs find again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hybrid.errors import Conflict
from hybrid.models import ModelFiles
from hybrid.rooms import Home
from hybrid.training.data import Dataset
from hybrid.training.recipes import Recipe
from hybrid.training.team import Team


@contextmanager
def workspace(
    home: Home, name: str, data: Dataset, recipe: Recipe, model: ModelFiles, *, team: Team, fresh: bool
) -> Iterator[Path]:
    """The folder of this run, held by the team's first process; removed when the run ends well, kept when it does not.

    How the weights are split is no part of what a run is: one that was split goes on whole, and the other way round.
    Raises Conflict while another process trains the very same.
    """
    what = recipe.model_dump(mode="json", exclude={"shard"})
    identity = [name, data.train_sha256, data.dev_sha256, what, model.sha256]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = home.hidden / "training" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not team.leads:
        yield folder
        return
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=0):
            if fresh:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout as error:
        raise Conflict(
            f"Another process is training {name} on the same data with the same recipe; wait for it."
        ) from error
