"""`answerable`: whether `rag` says that an answer is not in the documents, where it is and where it is not.

What tells the two apart is learned from all dev questions, never from those measured. The test questions are asked of
one corpus twice: as it is, and after the passages that answer them, and all that say the same, were taken out of it.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.bench.result import Goal, Result
from hybrid.errors import DataError
from hybrid.evaluation.metrics import Example
from hybrid.evaluation.runner import sample
from hybrid.evaluation.statistics import estimate
from hybrid.evaluation.tasks import CORPUS, Task, read_split
from hybrid.knowledge.answerable import Found
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.knowledge.tuned import Tuned
from hybrid.lifecycle.lessons import gold, question, says
from hybrid.lifecycle.teach_reader import reader_for
from hybrid.lifecycle.tune_refusal import FALSE_REFUSALS, auroc
from hybrid.lifecycle.tune_search import dev_examples, learn
from hybrid.models import ModelFiles
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.types import JSON

Progress = Callable[[str, int, int], None]

NAME = "task"
#: the share of questions without an answer that must be refused
REFUSED = 0.8


async def measure(
    settings: Settings,
    folder: Path,
    *,
    embedding: ModelFiles,
    limit: int | None = None,
    reader: bool = False,
    progress: Progress | None = None,
) -> Result:
    """How often `limit` test questions are refused, with and without their passages; with a `reader` that the training
    questions teach. Raises DataError, Refused."""
    return await asyncio.to_thread(_measure, settings, folder, embedding, limit, reader, progress)


def _measure(
    settings: Settings, folder: Path, embedding: ModelFiles, limit: int | None, reader: bool, progress: Progress | None
) -> Result:
    task, dev = dev_examples(folder)
    tested = sample([e for e in read_split(task, "test").examples if gold(e)], limit)
    if not tested or not task.has_corpus:
        raise DataError(f"{folder} needs a {CORPUS}, and a test.jsonl whose rows name their `meta.gold_passages`.")
    rows = [json.loads(line) for line in (folder / CORPUS).read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory(prefix="hybrid-answerable-") as scratch:
        home, documents = Home(Path(scratch)), Path(scratch) / "documents"
        embedder = Embedder(embedding.path, embedding.name)
        with closing(Library(home, embedder, settings.retrieval)) as library:
            _ingest(library, documents, rows, progress)
            reads = reader_for(library, NAME, folder, settings.cache, progress) if reader else None
            learned = learn(library, NAME, task, dev, progress, reader=reads)
            if learned.answerable is None:
                raise DataError(f"The dev questions of {folder} do not tell when an answer is missing.")
            library.tune(NAME, learned, reads)
            present = _asked(library, task, tested, settings.retrieval.shown())
            kept = _without(rows, tested)
            _ingest(library, documents, kept, progress)
            absent = _asked(library, task, tested, settings.retrieval.shown())
    facts = {
        "task": task.name,
        "passages": len(rows),
        "taken out": len(rows) - len(kept),
        "learned from": len(dev),
        "reader": reader,
    }
    return _result(tested, present, absent, learned, facts)


def _ingest(library: Library, folder: Path, rows: Sequence[JSON], progress: Progress | None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / CORPUS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    library.ingest(NAME, folder, progress)


def _without(rows: Sequence[JSON], tested: Sequence[Example]) -> list[JSON]:
    """The rows but those that answer a question, under whatever id."""
    named = {name for example in tested for name in gold(example)}
    texts = {row["text"] for row in rows if row["id"] in named}
    return [row for row in rows if row["text"] not in texts]


def _asked(library: Library, task: Task, tested: Sequence[Example], k: int) -> list[Found]:
    return [library.look_up(NAME, question(task, example), k) for example in tested]


def _result(
    tested: Sequence[Example], present: Sequence[Found], absent: Sequence[Found], learned: Tuned, facts: JSON
) -> Result:
    silent = [
        found
        for example, found in zip(tested, absent, strict=True)
        if not any(says(example.references, passage.text) for passage in found.passages)
    ]
    rows = [
        _row("as they are", present),
        _row("without their passages", absent),
        *([_row("… and nothing shown says the answer", silent)] if silent else []),
    ]
    with_answer, without = _chances(present), _chances(absent)
    squares = np.concatenate([(1 - with_answer) ** 2, without**2])
    told = {
        "refused below": round(learned.answerable.least, 4) if learned.answerable else None,
        "auroc": round(auroc(with_answer, without), 4),
        "brier": round(float(squares.mean()), 4),
        "on dev questions it did not learn from": learned.facts["refusals"],
    }
    goals = (
        Goal("refused without their passages", rows[1]["refused"], REFUSED, at_least=True),
        Goal("refused as they are", rows[0]["refused"], FALSE_REFUSALS),
    )
    return Result("answerable", tuple(rows), {**facts, **told}, goals)


def _row(name: str, found: Sequence[Found]) -> dict[str, Any]:
    """The share that is refused, with its 95 % Wilson interval."""
    share = estimate([float(one.weak) for one in found])
    return {
        "questions": name,
        "n": len(found),
        "refused": round(share.score, 4),
        "ci95": [round(share.low, 4), round(share.high, 4)],
    }


def _chances(found: Sequence[Found]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([one.answerable or 0.0 for one in found])
