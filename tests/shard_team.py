"""Runs of `train()`, one after the other in one process or in each of a team: what test_shard.py compares.

`accelerate launch shard_team.py HOME MODEL RUNS` reads a JSON list of runs and writes `results.json` into the home.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.adapters.store import AdapterStore
from hybrid.errors import HybridError
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise, weights_sha256
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training.control import RUN, Wanted
from hybrid.training.run import train


@dataclass
class PauseAfter:
    """Lets a run make some steps."""

    steps: int

    def wanted(self) -> Wanted:
        self.steps -= 1
        return "run" if self.steps >= 0 else "pause"


def run_all(home: Path, model: ModelFiles, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run's path and metrics, or the error that ended it. A run is `task`, `name`, `recipe` and maybe `steps`."""
    settings = Settings.load()
    store = AdapterStore(settings.rooms, State(settings.rooms.database))
    embedding = materialise(DEFAULT_EMBEDDER, settings.cache)
    embedder = Embedder(embedding.path, embedding.name)
    told = []
    for run in runs:
        control = PauseAfter(run["steps"]) if "steps" in run else RUN
        try:
            result = train(
                Path(run["task"]), settings=settings, name=run["name"], overrides=run["recipe"], store=store,
                progress=lambda **_: None, embedder=embedder, model=model, control=control,
            )  # fmt: skip
        except HybridError as error:
            told.append({"error": error.code, "message": error.message})
        else:
            told.append({"path": str(result.path), **result.metrics} if result else {})
    return told


def main() -> None:
    home, folder = Path(sys.argv[1]), Path(sys.argv[2])
    told = run_all(home, ModelFiles("tiny", folder, weights_sha256(folder)), json.loads(sys.argv[3]))
    if os.environ["RANK"] == "0":
        (home / "results.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
