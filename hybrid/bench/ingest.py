"""`ingest`: a corpus whose writer is killed again and again, at moments that dice choose."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from hybrid.bench.result import Goal, Result
from hybrid.errors import HybridError
from hybrid.knowledge.embed import Embedder

#: moments of death are drawn from this seed's dice
SEED = 0
_FAULTS = ("lost", "invented", "torn")


async def measure(
    embedder: Embedder, *, kills: int, seed: int = SEED, progress: Callable[[str, int, int], None]
) -> Result:
    """Kills (`kill -9`) a process that ingests, adds and deletes, and looks after each kill at what a reader finds.

    A document is lost when it was acknowledged and is not found, invented when it is found and is not there, torn
    when its passages are not the whole of one of its texts. At the end the corpus is compared with one built from
    scratch. Raises HybridError with the last words of the lives when they end by themselves.
    """
    with tempfile.TemporaryDirectory(prefix="hybrid-bench-") as room:
        argv = [room, str(embedder.path), embedder.name, str(kills), str(seed)]
        # one thread: what is forked must not wait for threads that stayed behind
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hybrid.bench.lives", *argv, env=environment, stdout=pipe, stderr=pipe
        )
        assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018  pipes, as asked for
        told: list[dict[str, Any]] = []
        async for line in process.stdout:
            told.append(json.loads(line))
            progress("killing", min(len(told), kills), kills)
        words = (await process.stderr.read()).decode()[-2000:]
        if await process.wait() != 0 or len(told) != kills + 1:
            raise HybridError(f"The lives ended before their time:\n{words}")
    return _result(told[:-1], told[-1])


def _result(lives: list[dict[str, Any]], end: dict[str, Any]) -> Result:
    rows = tuple({**life, **{fault: len(life[fault]) for fault in _FAULTS}} for life in lives)
    sums = {fault: sum(len(life[fault]) for life in [*lives, end]) for fault in _FAULTS}
    goals = [Goal(f"documents {fault}", sums[fault], 0) for fault in _FAULTS]
    different = Goal("questions answered unlike an index built from scratch", end["apart"], 0)
    facts = {"steps": lives[-1]["step"], "documents": end["documents"], "killed inside a step": _inside(lives)}
    return Result("ingest", rows, facts, (*goals, different))


def _inside(lives: list[dict[str, Any]]) -> int:
    """How many kills came after the life had done something."""
    return sum(a["step"] < b["step"] for a, b in itertools.pairwise(lives))
