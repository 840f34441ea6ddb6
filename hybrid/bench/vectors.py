"""`vectors`: what each kind of FAISS index costs and finds, by how many vectors it holds.

Each is built in a process of its own, from synthetic vectors, by the code that builds a corpus's generations; what it
finds is compared with looking at every vector.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psutil

from hybrid.bench.result import Goal, Result
from hybrid.bench.synthetic import Space
from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.kinds import CODES, REFINE, Kind, Near, renewed
from hybrid.knowledge.search import POOL
from hybrid.knowledge.store import Rows
from hybrid.rooms import write_json
from hybrid.settings import RetrievalSettings

Progress = Callable[[str, int, int], None]

POINTS = (10_000, 100_000, 1_000_000)
QUESTIONS = 200
DIM = 384
TOP = 10
KINDS: tuple[Kind, ...] = get_args(Kind)
GOAL_RECALL: Mapping[Kind, float] = {"hnsw": 0.95, "ivfpq": 0.9}
GOAL_MS = 20.0
MILLION = 1_000_000
_BLOCK = 50_000


class Held:
    """Vectors in memory, as a store gives them: those of rows from 1 on."""

    def __init__(self, vectors: Vectors) -> None:
        self.all = vectors
        self.rows: Rows = np.arange(1, len(vectors) + 1)

    def vectors(self, dim: int, *, after: int = 0, only: Sequence[int] | None = None) -> tuple[Rows, Vectors]:
        rows = self.rows[after:] if only is None else np.array(only, np.int64)
        return rows, self.all[rows - 1, :dim]


async def measure(
    *,
    points: Sequence[int] = POINTS,
    kinds: Sequence[str] = KINDS,
    dim: int = DIM,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Build time, memory, latency and recall of each kind at each number of vectors of `dim` numbers. Writes
    `vectors.json` and `vectors.png` into `out`. Raises BadRequest for a kind that there is not or too few vectors.
    """
    return await asyncio.to_thread(_measure, sorted(points), kinds, dim, out, progress)


def _measure(
    points: Sequence[int], kinds: Sequence[str], dim: int, out: Path | None, progress: Progress | None
) -> Result:
    wanted = [kind for kind in KINDS if kind in kinds]
    if set(kinds) - set(KINDS) or not points or points[0] < CODES:
        raise BadRequest(f"The kinds are {', '.join(KINDS)}, and {CODES} vectors are the least.", param="kinds")
    rows: list[dict[str, Any]] = []
    runs = [(kind, count) for count in points for kind in wanted]
    for done, run in enumerate(runs, 1):
        # a process for each: what one takes of memory is nobody else's
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            rows.append(alone.submit(one, *run, dim).result())
        if progress:
            progress("indexes", done, len(runs))
    result = Result("vectors", tuple(rows), _summary(rows, wanted, dim), _goals(rows, points[-1]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "vectors.json", result.wire())
        _draw(rows, wanted, out / "vectors.png")
    return result


def one(kind: Kind, count: int, dim: int) -> dict[str, Any]:
    """One index of `count` vectors, measured in this process."""
    space = Space(dim)
    source, asked = Held(space.draw(count, 1)), space.draw(QUESTIONS, 2)
    truth = _exact(source.all, asked)
    gc.collect()
    before, began = _resident(), time.perf_counter()
    near = renewed(None, source.rows, source, dim, _forced(kind, count))
    build = time.perf_counter() - began
    grown = _resident() - before
    measured = [_asked(near, source, vector, right) for vector, right in zip(asked, truth, strict=True)]
    recalls, spent = zip(*measured, strict=True)
    p50, p95 = np.percentile(spent, (50, 95))
    return {
        "kind": kind,
        "vectors": count,
        "build_s": round(build, 2),
        "build_s_a_million": round(build / count * MILLION, 1),
        "rss_mb": round(grown / 1e6, 1),
        "file_mb": round(_size(near) / 1e6, 1),
        "ms": round(float(p50), 3),
        "ms_p95": round(float(p95), 3),
        f"recall@{TOP}": round(float(np.mean(recalls)), 4),
    }


def _forced(kind: Kind, count: int) -> RetrievalSettings:
    """Settings by which so many vectors get this kind."""
    exact, graph = {"flat": (count, count), "hnsw": (0, count), "ivfpq": (0, 0)}[kind]
    return RetrievalSettings(exact_up_to=exact, graph_up_to=graph)


def _asked(near: Near, source: Held, vector: Vectors, right: set[int]) -> tuple[float, float]:
    """(recall, milliseconds) of one search, as a corpus is searched: what compressed vectors find is measured again."""
    began = time.perf_counter()
    found = [row for row, _ in near.nearest(vector, POOL if near.exact else POOL * REFINE)]
    if not near.exact:
        rows, vectors = source.vectors(len(vector), only=found)
        found = rows[np.argsort(-(vectors @ vector), kind="stable")].tolist()
    spent = (time.perf_counter() - began) * 1000
    return len(right.intersection(found[:TOP])) / len(right), spent


def _exact(vectors: Vectors, asked: Vectors) -> list[set[int]]:
    """The rows of the highest products with each question, by looking at all of them."""
    scores, rows = np.empty((len(asked), 0), np.float32), np.empty((len(asked), 0), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        here = asked @ vectors[start : start + _BLOCK].T
        scores = np.hstack([scores, here])
        rows = np.hstack([rows, np.broadcast_to(np.arange(here.shape[1]) + start + 1, here.shape)])
        best = np.argsort(-scores, axis=1)[:, :TOP]
        scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    return [set(row.tolist()) for row in rows]


def _size(near: Near) -> int:
    import faiss

    with tempfile.TemporaryDirectory(prefix="hybrid-vectors-") as scratch:
        faiss.write_index(near.index, f"{scratch}/index")
        return Path(scratch, "index").stat().st_size


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _summary(rows: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], dim: int) -> dict[str, Any]:
    """What a million vectors cost by each kind, along the line through the logarithms of what was measured."""
    out: dict[str, Any] = {"dimensions": dim, "cores": os.cpu_count()}
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        told = {key: _at_million(own, key) for key in ("build_s", "rss_mb", "file_mb", "ms")}
        measured = any(row["vectors"] == MILLION for row in own)
        out[f"{kind}, a million vectors, {'measured' if measured else 'extrapolated'}"] = told
    return out


def _at_million(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    for row in rows:
        if row["vectors"] == MILLION:
            return float(row[key])
    counts = np.log([row["vectors"] for row in rows])
    values = np.log([max(float(row[key]), 1e-3) for row in rows])
    slope, start = np.polyfit(counts, values, 1) if len(rows) > 1 else (1.0, float(values[0] - counts[0]))
    return round(float(np.exp(start + slope * np.log(MILLION))), 2)


def _goals(rows: Sequence[Mapping[str, Any]], largest: int) -> tuple[Goal, ...]:
    goals: list[Goal] = []
    for row in rows:
        kind, count = row["kind"], row["vectors"]
        if count == largest and kind in GOAL_RECALL:
            found = float(row[f"recall@{TOP}"])
            goals.append(Goal(f"{kind}, {count:,}: recall@{TOP}", found, GOAL_RECALL[kind], at_least=True))
            goals.append(Goal(f"{kind}, {count:,}: median, ms", row["ms"], GOAL_MS))
    return tuple(goals)


def _draw(rows: Sequence[Mapping[str, Any]], kinds: Sequence[Kind], path: Path) -> None:
    """A search's time, the building's, the memory and the recall against the number of vectors, a line a kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    what = {"ms": "a search, ms", "build_s": "building, s", "rss_mb": "memory, MB", f"recall@{TOP}": f"recall@{TOP}"}
    for axes, (key, label) in zip(figure.subplots(1, len(what)), what.items(), strict=True):
        for kind in kinds:
            own = [row for row in rows if row["kind"] == kind]
            axes.plot([row["vectors"] for row in own], [max(float(row[key]), 1e-3) for row in own], "o-", label=kind)
        axes.set_xscale("log")
        if not key.startswith("recall"):
            axes.set_yscale("log")
        axes.set_xlabel("vectors")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
