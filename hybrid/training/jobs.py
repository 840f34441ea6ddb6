"""Jobs as rows: what was asked, how far it is, what came of it. Every step of a job's life is one transaction.

    validating_files ─► queued ─► running ─► succeeded
                          ▲  ▲       │ ├──► failed          any that has not ended ─► cancelled
                   resume │  └───────┘ └──► paused
                       paused   (its process died: it goes on from its newest checkpoint)

A row moves only from the status that the mover has seen (a conditional update), so that two processes never both do a
step. `wanted` is what the caller asked for last; the process that trains reads it between two steps.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from hybrid.errors import Conflict, NotFound
from hybrid.state import State, job_checkpoints, job_events
from hybrid.state import jobs as table
from hybrid.training.control import Wanted
from hybrid.types import JSON

#: rows, and whether more follow
Page = tuple[list[JSON], bool]
ENDED = ("succeeded", "failed", "cancelled")
WAITING = ("validating_files", "queued")
OPEN = (*WAITING, "running")
#: a wish → the statuses from which it is granted without asking a process, what they become, and how that is told
_AT_ONCE: Mapping[Wanted, tuple[tuple[str, ...], str, str]] = {
    "run": (("paused",), "queued", "resumed"),
    "pause": (WAITING, "paused", "paused"),
    "cancel": ((*WAITING, "paused"), "cancelled", "cancelled"),
}


def new_id() -> str:
    """An id no other job has."""
    return f"ftjob-{uuid.uuid4().hex[:24]}"


class JobBook:
    """The training jobs of one home.

    With a `caller` every look-up keeps to that tenant: another's id is as unknown as a wrong one. Without, all are
    seen (the owner of the home, and the process that runs them).
    """

    def __init__(self, state: State, caller: str | None = None) -> None:
        self._state = state
        self._caller = caller

    def of(self, caller: str) -> JobBook:
        """The same book as this tenant sees it."""
        return JobBook(self._state, caller)

    # --- asking ----------------------------------------------------------------------------------------------------

    def create(self, spec: Mapping[str, Any], *, id: str | None = None, key: str | None = None) -> tuple[JSON, bool]:
        """A new job, `validating_files`, and whether it is new: with an idempotency `key` seen before it is the job
        that was made then. Raises Conflict when that key came with another request."""
        job_id = id or new_id()
        row = {
            "id": job_id,
            "kind": "train",
            "caller": self._caller or "local",
            "spec": dict(spec),
            "status": "validating_files",
            "idempotency_key": key,
        }
        try:
            with self._state.transaction() as connection:
                connection.execute(insert(table).values(**row))
                _say(connection, job_id, f"Created fine-tuning job: {job_id}")
        except IntegrityError:
            return self._made_before(key, spec), False
        return self.get(job_id), True

    def _made_before(self, key: str | None, spec: Mapping[str, Any]) -> JSON:
        with self._state.transaction() as connection:
            same = and_(table.c.caller == (self._caller or "local"), table.c.idempotency_key == key)
            row = dict(connection.execute(select(table).where(same)).mappings().one())
        if row["spec"].get("asked") != spec.get("asked"):
            raise Conflict(
                f"This Idempotency-Key made {row['id']} from another request; use a new key.", param="Idempotency-Key"
            )
        return row

    def get(self, job_id: str) -> JSON:
        """A job's row. Raises NotFound."""
        with self._state.transaction() as connection:
            row = connection.execute(select(table).where(self._mine(job_id))).mappings().first()
        if row is None:
            raise NotFound(
                f"There is no fine-tuning job {job_id[:80]!r}; GET /v1/fine_tuning/jobs lists yours.", param="job_id"
            )
        return dict(row)

    def list(self, *, after: str | None = None, limit: int = 20, metadata: Mapping[str, str] | None = None) -> Page:
        """(jobs, newest first, whether more follow) after the id `after`; with `metadata`, those that carry it."""
        query = select(table).where(self._seen())
        for key, value in (metadata or {}).items():
            query = query.where(table.c.spec["metadata"][key].as_string() == value)
        if after is not None:
            query = query.where(table.c.created < self.get(after)["created"])
        with self._state.transaction() as connection:
            rows = connection.execute(query.order_by(table.c.created.desc()).limit(limit + 1)).mappings().all()
        return [dict(row) for row in rows[:limit]], len(rows) > limit

    def events(self, job_id: str, *, after: int | None = None, limit: int = 20) -> Page:
        """(what happened, newest first, whether more follow) before the event numbered `after`."""
        return self._page(job_events, job_id, after, limit)

    def checkpoints(self, job_id: str, *, after: int | None = None, limit: int = 10) -> Page:
        """(complete checkpoints, newest first, whether more follow) before the one numbered `after`."""
        return self._page(job_checkpoints, job_id, after, limit)

    def _page(self, of: Any, job_id: str, after: int | None, limit: int) -> Page:
        self.get(job_id)
        query = select(of).where(of.c.job == job_id)
        if after is not None:
            query = query.where(of.c.seq < after)
        with self._state.transaction() as connection:
            rows = connection.execute(query.order_by(of.c.seq.desc()).limit(limit + 1)).mappings().all()
        return [dict(row) for row in rows[:limit]], len(rows) > limit

    def curve(self, job_id: str) -> Sequence[JSON]:
        """The data of every metrics event, in the order of the steps."""
        query = select(job_events.c.data).where(job_events.c.job == job_id, job_events.c.type == "metrics")
        with self._state.transaction() as connection:
            return connection.scalars(query.order_by(job_events.c.seq)).all()

    # --- wishes ----------------------------------------------------------------------------------------------------

    def want(self, job_id: str, wanted: Wanted) -> JSON:
        """Asks a job to run, pause or be cancelled, and returns it: at once where nothing runs yet, else its process
        is asked. Asking again for what is so already changes nothing. Raises NotFound, Conflict for a job that ended.
        """
        job = self.get(job_id)
        if job["status"] in ENDED:
            if (job["status"], wanted) == ("cancelled", "cancel"):
                return job
            verb = {"run": "resumed", "pause": "paused", "cancel": "cancelled"}[wanted]
            raise Conflict(f"{job_id} has {job['status']}; it cannot be {verb}.", param="job_id")
        origin, target, said = _AT_ONCE[wanted]
        ended = {"finished": time.time()} if target == "cancelled" else {}
        with self._state.transaction() as connection:
            _move(connection, job_id, (*OPEN, "paused"), wanted=wanted)
            if _move(connection, job_id, origin, status=target, **ended):
                _say(connection, job_id, f"Fine-tuning job {said}")
        return self.get(job_id)

    def wanted(self, job_id: str) -> Wanted:
        """What was asked last. Raises NotFound."""
        found: Wanted = self.get(job_id)["wanted"]
        return found

    # --- the life --------------------------------------------------------------------------------------------------

    def validated(self, job_id: str) -> bool:
        """The files are good: the job waits for its turn. False when it was stopped meanwhile."""
        with self._state.transaction() as connection:
            moved = _move(connection, job_id, "validating_files", status="queued")
            if moved:
                _say(connection, job_id, "Files validated, moving job to queued state")
        return moved

    def claim(self, job_id: str, pid: int) -> bool:
        """Takes a queued job for the process `pid`. False when it is not to be run (now, or by this one)."""
        with self._state.transaction() as connection:
            job = connection.execute(select(table.c.started).where(table.c.id == job_id)).first()
            started = job.started if job and job.started else time.time()
            moved = _move(
                connection, job_id, "queued", table.c.wanted == "run", status="running", pid=pid, started=started
            )
            if moved:
                again = bool(job and job.started)
                _say(connection, job_id, "Fine-tuning job goes on" if again else "Fine-tuning job started")
        return moved

    def is_running(self, job_id: str) -> bool:
        """Whether the job is here and a process has claimed it."""
        query = select(func.count()).where(self._mine(job_id), table.c.status == "running")
        with self._state.transaction() as connection:
            return bool(connection.scalar(query))

    def stopped(self, job_id: str) -> str:
        """The process has ended between two steps, or in one, and goes on later unless it was asked to stop.

        Returns the status it came to: what is wanted by now decides, so that a quick resume is not lost.
        """
        with self._state.transaction() as connection:
            wanted = connection.scalar(select(table.c.wanted).where(table.c.id == job_id))
            status = {"pause": "paused", "cancel": "cancelled"}.get(str(wanted), "queued")
            ended = {"finished": time.time()} if status == "cancelled" else {}
            if _move(connection, job_id, OPEN, status=status, pid=None, **ended) and status != "queued":
                _say(connection, job_id, f"Fine-tuning job {status}")
        return status

    def progress(self, job_id: str, **told: Any) -> None:
        """How far it is, replaced whole."""
        with self._state.transaction() as connection:
            _move(connection, job_id, OPEN, progress=told)

    def add_metrics(self, job_id: str, steps: Sequence[Mapping[str, Any]]) -> None:
        """Metrics of steps, in order; one that is on record already (it was done again after a crash) is left out."""
        with self._state.transaction() as connection:
            newest = select(func.max(job_events.c.data["step"].as_integer()))
            last = connection.scalar(newest.where(job_events.c.job == job_id, job_events.c.type == "metrics")) or 0
            for data in steps:
                if data["step"] > last:
                    of = f"/{data['total_steps']}" if "total_steps" in data else ""
                    told = f"Step {data['step']}{of}: training loss={data['train_loss']:.4f}"
                    _say(connection, job_id, told, type="metrics", data=dict(data))

    def add_checkpoint(self, job_id: str, step: int, path: str, metrics: Mapping[str, Any]) -> None:
        """A checkpoint is complete in the folder `path`, or is the version `path` (`name@3`) that was published."""
        row = {"job": job_id, "step": step, "path": path, "metrics": dict(metrics)}
        with self._state.transaction() as connection:
            there = and_(job_checkpoints.c.job == job_id, job_checkpoints.c.step == step)
            known = connection.scalar(select(func.count()).select_from(job_checkpoints).where(there))
            if not known:
                connection.execute(insert(job_checkpoints).values(**row))
                _say(connection, job_id, f"Checkpoint created at step {step}")
            else:
                connection.execute(update(job_checkpoints).where(there).values(path=path))

    def say(self, job_id: str, message: str, level: str = "info") -> None:
        """Adds an event."""
        with self._state.transaction() as connection:
            _say(connection, job_id, message, level=level)

    def published(self, job_id: str, result: Mapping[str, Any]) -> None:
        """What training made: `{"adapter", "version", "metrics", …}`. The job still runs until that is served."""
        with self._state.transaction() as connection:
            _move(connection, job_id, OPEN, result=dict(result))

    def succeed(self, job_id: str, result: Mapping[str, Any]) -> bool:
        """The new model answers. False when the job was cancelled meanwhile."""
        with self._state.transaction() as connection:
            alive = table.c.wanted != "cancel"
            moved = _move(
                connection, job_id, "running", alive, status="succeeded",
                result=dict(result), finished=time.time(), pid=None,
            )  # fmt: skip
            if moved:
                _say(connection, job_id, f"New fine-tuned model created: {result['fine_tuned_model']}")
                _say(connection, job_id, "The job has successfully completed")
        return moved

    def fail(self, job_id: str, message: str, *, code: str, param: str | None = None) -> None:
        """Ends a job that cannot be done, with the reason."""
        ended = {"status": "failed", "error": message, "error_code": code, "error_param": param}
        with self._state.transaction() as connection:
            if _move(connection, job_id, (*OPEN, "paused"), **ended, finished=time.time(), pid=None):
                _say(connection, job_id, f"The job failed: {message}", level="error")

    def cancelled(self, job_id: str) -> None:
        """Its process was ended."""
        with self._state.transaction() as connection:
            if _move(connection, job_id, OPEN, status="cancelled", finished=time.time(), pid=None):
                _say(connection, job_id, "Fine-tuning job cancelled")

    def recover(self) -> Sequence[str]:
        """After a crash or a stop: what ran waits again, what was asked to stop has stopped. Returns the ids of the
        jobs to do, the oldest first."""
        with self._state.transaction() as connection:
            for wanted, status in (("run", "queued"), ("pause", "paused"), ("cancel", "cancelled")):
                left = and_(table.c.kind == "train", table.c.status == "running", table.c.wanted == wanted)
                connection.execute(update(table).where(left).values(status=status, pid=None, updated=time.time()))
            sourceless = and_(table.c.kind.in_(("train", "index")), table.c.spec["source"].as_string().is_(None))
            lost = and_(table.c.status.in_(OPEN), sourceless)
            reason = {"error": "The server stopped meanwhile.", "error_code": "interrupted"}
            connection.execute(update(table).where(lost).values(status="failed", finished=time.time(), **reason))
            waiting = select(table.c.id).where(table.c.kind == "train", table.c.status.in_(WAITING))
            return connection.scalars(waiting.order_by(table.c.created)).all()

    def _seen(self) -> ColumnElement[bool]:
        train = table.c.kind == "train"
        return train if self._caller is None else and_(train, table.c.caller == self._caller)

    def _mine(self, job_id: str) -> ColumnElement[bool]:
        return and_(self._seen(), table.c.id == job_id)


def _move(
    connection: Connection, job_id: str, origin: str | Sequence[str], *also: ColumnElement[bool], **values: Any
) -> bool:
    """Whether the job was in one of the statuses `origin` and has changed."""
    statuses = (origin,) if isinstance(origin, str) else tuple(origin)
    was = and_(table.c.id == job_id, table.c.status.in_(statuses), *also)
    return connection.execute(update(table).where(was).values(updated=time.time(), **values)).rowcount == 1


def _say(connection: Connection, job_id: str, message: str, **more: Any) -> None:
    connection.execute(insert(job_events).values(job=job_id, message=message, **more))
