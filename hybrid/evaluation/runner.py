"""Tasks times arms, asked concurrently, every outcome on disk the moment it exists.

An outcome is keyed by all that it depends on, so a run that was killed goes on where it stopped, and one that is
repeated asks only what has changed. Errors are outcomes too.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any

from hybrid.errors import HybridError
from hybrid.evaluation.asking import Asker, Heard, Offer
from hybrid.evaluation.measured import AUTO
from hybrid.evaluation.metrics import METRICS, Example, Metric
from hybrid.evaluation.tasks import Learnable, Task, learnable
from hybrid.knowledge.support import support
from hybrid.rooms import row_line, write_rows
from hybrid.types.outcome import Outcome

INFLIGHT = 32
OUTCOMES = "outcomes.jsonl"
EARLIER = ".earlier.jsonl"
_FSYNC_S = 2.0
_TRIES = 5
_SHORTEST, _LONGEST, _COUNTED = 16, 512, 1000
#: a final number comes after the working, which references leave out
_WORKING = 256
#: fields that a row leaves out where they hold nothing
_SPARED = frozenset(["chosen", "confidence", "grounded"])

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """One question to one arm. `key` names everything that its outcome depends on."""

    task: Task
    example: Example
    arm: str
    sampling: Mapping[str, Any]
    key: str
    score: Metric


def jobs_for(
    task: Task, examples: Sequence[Example], arm: str, offer: Offer, max_tokens: int, score: Metric | None = None
) -> list[Job]:
    """What to ask one arm about one task: greedy, with the same limit for every arm."""
    sampling = {"temperature": 0, "max_tokens": max_tokens}
    artefact = offer.digest(arm, task)
    metric = score or METRICS[task.metric]
    name = task.metric if score is None else score.__name__
    out = []
    for example in examples:
        truth = [name, example.reference, dict(example.meta)]
        key = _digest([task.name, example.id, arm, artefact, sampling, task.message(example), truth])
        out.append(Job(task, example, arm, sampling, key, metric))
    return out


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:24]


def token_limit(splits: Sequence[Learnable], count: Callable[[str], int]) -> int:
    """Room for an answer of a task: half as long again as all but the longest hundredth of its known references.

    16 to 512 tokens; 512 for tasks without references, and room to work where the answer is a number. Test splits are
    not looked at.
    """
    references = [e.reference for split in splits for e in learnable(split) if e.reference]
    if not references:
        return _LONGEST
    kept = random.Random(0).sample(references, min(len(references), _COUNTED))
    lengths = sorted(count(text) for text in kept)
    usual = lengths[min(len(lengths) - 1, int(0.99 * len(lengths)))]
    least = _WORKING if any(split.task.metric == "numeric" for split in splits) else _SHORTEST
    return max(least, min(_LONGEST, round(usual * 1.5) + 16))


def sample(examples: Sequence[Example], limit: int | None, seed: int = 0) -> tuple[Example, ...]:
    """`limit` of the examples in their order, drawn by `seed`; a larger limit draws the same ones and more."""
    if limit is None or limit >= len(examples):
        return tuple(examples)
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return tuple(examples[i] for i in sorted(order[:limit]))


class Ledger:
    """The outcomes of one folder: `outcomes.jsonl`, one row appended as each comes, a torn last line forgotten.

    What an earlier run of other arms or examples left is kept beside it and used when it is wanted again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / OUTCOMES
        self._earlier = folder / EARLIER
        self._rows = {row["key"]: row for path in (self._earlier, self._path) for row in _whole_rows(path)}
        self._file: IO[str] | None = None
        self._synced = time.monotonic()

    def get(self, key: str) -> Outcome | None:
        """The outcome kept under a key, unless it is an error that asking again may mend."""
        row = self._rows.get(key)
        return None if row is None or row.get("again") else outcome_of(row)

    def add(self, key: str, outcome: Outcome, *, again: bool = False) -> None:
        """Appends an outcome; it reaches the disk within seconds. `again` marks a passing error."""
        row = {**asdict(outcome), "key": key, **({"again": True} if again else {})}
        self._rows[key] = row
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(row_line(_short(row)))
        if time.monotonic() - self._synced > _FSYNC_S:
            self.sync()

    def sync(self) -> None:
        """Puts what was added on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self, keys: Sequence[str] | None = None) -> None:
        """Ends the run. With `keys` the file holds just those, in that order; the others move aside."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None
        if keys is not None:
            wanted = set(keys)
            write_outcomes(self._earlier, [row for key, row in self._rows.items() if key not in wanted])
            write_outcomes(self._path, [self._rows[key] for key in keys if key in self._rows])


def known_outcomes(folder: Path) -> dict[str, Outcome]:
    """The outcomes of a folder by key, errors that asking again may mend aside. Only reads: a run may be writing."""
    rows = {row["key"]: row for name in (EARLIER, OUTCOMES) for row in _rows_in(folder / name)}
    return {key: outcome_of(row) for key, row in rows.items() if not row.get("again")}


def _whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger; a line that a crash cut off is taken out of the file."""
    if not path.is_file():
        return
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with path.open("rb+") as file:
            file.truncate(whole)
    yield from _rows_in(path)


def _rows_in(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "key" in row:
            yield row


def write_outcomes(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts these rows in the place of those that a file holds; none make no file."""
    if rows or path.exists():
        write_rows(path, map(_short, rows))


def _short(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row without the fields of `_SPARED` that hold nothing: `outcome_of` reads the same."""
    return {name: value for name, value in row.items() if name not in _SPARED or value not in (None, {})}


_FIELDS = frozenset(f.name for f in fields(Outcome))


def outcome_of(row: Mapping[str, Any]) -> Outcome:
    """The outcome in a row of `outcomes.jsonl`."""
    facts = {name: value for name, value in row.items() if name in _FIELDS}
    return Outcome(**{**facts, "passages": tuple(facts.get("passages") or ())})


async def run(
    asker: Asker,
    jobs: Sequence[Job],
    ledger: Ledger | None = None,
    *,
    inflight: int = INFLIGHT,
    progress: Progress | None = None,
) -> list[Outcome]:
    """The outcome of every job, in their order; what the ledger knows is not asked again.

    At most `inflight` questions are open at once: enough to fill the engine's batch. Never raises for an answer that
    failed: that is an outcome with an `error` and the score 0.
    """
    done: list[Outcome | None] = [ledger.get(job.key) if ledger else None for job in jobs]
    todo = iter([i for i, outcome in enumerate(done) if outcome is None])
    told = progress or (lambda _done, _total: None)
    finished = len(jobs) - sum(outcome is None for outcome in done)
    told(finished, len(jobs))

    async def work() -> None:
        nonlocal finished
        for i in todo:
            heard = await _ask(asker, jobs[i])
            outcome = await asyncio.to_thread(_outcome, jobs[i], heard)
            done[i] = outcome
            if ledger:
                ledger.add(jobs[i].key, outcome, again=heard.retry_after is not None)
            finished += 1
            told(finished, len(jobs))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(inflight, len(jobs))):
            group.create_task(work())
    return [outcome for outcome in done if outcome is not None]


async def _ask(asker: Asker, job: Job) -> Heard:
    """The answer; an engine that is away for a moment is asked again."""
    message = job.task.message(job.example)
    for _ in range(_TRIES):
        heard = await asker.ask(job.arm, message, job.sampling)
        if heard.retry_after is None:
            break
        await asyncio.sleep(heard.retry_after)
    return heard


def _outcome(job: Job, heard: Heard) -> Outcome:
    score = 0.0
    if heard.error is None:
        try:
            score = job.score(heard.text, job.example)
        except HybridError as error:
            heard = replace(heard, error=f"{error.code}: {error.message}")
    return Outcome(
        task=job.task.name,
        id=job.example.id,
        arm=job.arm,
        score=score,
        answer=heard.text,
        latency_ms=heard.latency_ms,
        prompt_tokens=heard.usage.prompt_tokens,
        completion_tokens=heard.usage.completion_tokens,
        calls=heard.usage.calls,
        adapter=heard.adapter,
        passages=heard.passages,
        error=heard.error,
        chosen=heard.chosen or None,
        confidence=heard.confidence if job.arm == AUTO else None,
        grounded=support(heard.text.removesuffix(heard.quoted), job.example.input, heard.shown).shares,
    )
