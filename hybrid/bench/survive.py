"""`survive`: one training killed again and again, beside the same training left alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.bench.result import Goal, Result
from hybrid.errors import HybridError
from hybrid.rooms import Home
from hybrid.settings import Settings

#: relative difference of the final dev loss that is called the same: the order of additions may differ
SAME = 0.01
#: seconds between checkpoints of the run that is killed: so that most kills find one that is young, or half written
CHECKPOINT_S = 1.0
#: moments of death are drawn anew from this seed's dice
SEED = 0


async def measure(
    source: Path | None,
    *,
    settings: Settings,
    sets: Sequence[str],
    kills: int,
    progress: Callable[[str, int, int], None],
) -> Result:
    """Trains on `source` (default: this home's tickets task) once in peace and once with `kills` × `kill -9`.

    Raises HybridError with the trainer's last words when it fails by itself.
    """
    source = (source or settings.rooms.tasks / "tickets").resolve()
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as folder:
        progress("in peace", 0, kills + 2)
        calm = await _finish(_argv(source, sets), _environment(settings, Path(folder) / "calm"))
        home = Home(Path(folder) / "killed")
        environment = _environment(settings, home.root)
        rows = []
        dice = random.Random(SEED)
        for number in range(1, kills + 1):
            progress(f"kill {number}", number, kills + 2)
            # somewhere in this life's share of the run: each gets a little further
            goal = dice.uniform(number - 1, number) / (kills + 1) * calm["metrics"]["steps"]
            died_at = await _kill_after(_argv(source, sets), environment, goal, dice.uniform(0, 0.3))
            rows.append({"kill": number, "killed_at_step": died_at, "newest_checkpoint": _newest(home)})
        progress("to the end", kills + 1, kills + 2)
        ended = await _finish(_argv(source, sets), environment)
    return _result(rows, calm["metrics"], ended["metrics"])


def _result(rows: list[dict[str, Any]], calm: Mapping[str, Any], ended: Mapping[str, Any]) -> Result:
    apart = abs(ended["dev_loss"] - calm["dev_loss"]) / calm["dev_loss"]
    keys = ("dev_loss", "train_loss", "steps", "tokens", "best_step")
    return Result(
        "survive",
        tuple(rows),
        {"in_peace": {key: calm[key] for key in keys}, "killed": {key: ended[key] for key in keys}},
        (
            Goal("relative difference of the final dev loss", round(apart, 5), SAME),
            Goal("difference in steps taken", abs(ended["steps"] - calm["steps"]), 0),
        ),
    )


def _argv(source: Path, sets: Sequence[str]) -> list[str]:
    words = [word for pair in sets for word in ("--set", pair)]
    return [
        sys.executable,
        "-m",
        "hybrid.cli",
        "train",
        str(source),
        "--name",
        "bench",
        "--json",
        "--progress-json",
        *words,
    ]


def _environment(settings: Settings, root: Path) -> dict[str, str]:
    root.mkdir()
    if (settings.home / "hybrid.toml").is_file():
        shutil.copy(settings.home / "hybrid.toml", root)
    more = {"HYBRID_HOME": str(root), "HYBRID_CACHE": str(settings.cache.resolve()), "HYBRID_MODEL": settings.model}
    return {**os.environ, **more, "HYBRID_TRAINING__CHECKPOINT_S": str(CHECKPOINT_S)}


async def _start(argv: Sequence[str], environment: Mapping[str, str]) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*argv, env=environment, stdout=pipe, stderr=asyncio.subprocess.DEVNULL)


async def _finish(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs to the end and returns the last line."""
    process = await _start(argv, environment)
    out, _ = await process.communicate()
    if process.returncode != 0:
        raise HybridError(f"The trainer ended with {process.returncode}; run it by hand: {' '.join(argv)}")
    told: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return told


async def _kill_after(argv: Sequence[str], environment: Mapping[str, str], goal: float, pause: float) -> int:
    """Kills the trainer once it has passed step `goal` and a moment more. Returns the last step it told of."""
    process = await _start(argv, environment)
    assert process.stdout is not None  # noqa: S101  a pipe, as asked for
    step = 0
    async for line in process.stdout:
        step = json.loads(line).get("step", step)
        if step >= goal:
            break
    await asyncio.sleep(pause)
    process.kill()
    await process.wait()
    return step


def _newest(home: Home) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in home.hidden.glob("training/*/checkpoints/step-*")]
    return max(steps, default=0)
