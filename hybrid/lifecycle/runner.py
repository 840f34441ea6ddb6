"""The server's side of jobs: takes ids from the line, gives each its process, and serves what comes of it.

The database is the truth, the process does the work, and this decides between them: a job whose process died goes on
from its newest checkpoint, one that was told to stop is ended within seconds, one that has published is `succeeded`
only when its version is loaded and answers. After a crash `run` begins with what was left.
"""

from __future__ import annotations

import asyncio
import csv
import io
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.store import AdapterStore
from hybrid.errors import Conflict, HybridError, ModelNotFound, NotFound, Refused
from hybrid.lifecycle.child import run_child
from hybrid.lifecycle.queue import Queue
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.control import Wanted
from hybrid.training.files import Files
from hybrid.training.jobs import JobBook
from hybrid.types import JSON

log = logging.getLogger("hybrid.lifecycle")
_POLL_S = 0.25
_RETRY_S = 1.0
#: deaths of a job's process without a step between them, after which it is not tried again
MAX_DEATHS = 5
_LAST_WORDS = 500


class Runner:
    """Runs the jobs of one home. `busy`: requests are being answered; `ready`: the engine answers."""

    def __init__(
        self,
        settings: Settings,
        *,
        state: State,
        store: AdapterStore,
        loader: HotLoader,
        busy: Callable[[], bool],
        ready: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._home = settings.rooms
        self._book = JobBook(state)
        self._files = Files(self._home, state)
        self._queue = Queue(self._home.queue)
        self._store = store
        self._loader = loader
        self._busy = busy
        self._ready = ready
        self._lane = asyncio.Semaphore(settings.training.jobs)
        self._checks = asyncio.Semaphore(1)
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def run(self) -> None:
        """Runs jobs for ever. Cancelling it ends their processes; the jobs go on at the next start."""
        await asyncio.to_thread(self._recover)
        async with asyncio.TaskGroup() as tasks:
            while True:
                while (job_id := await asyncio.to_thread(self._queue.take)) is not None:
                    tasks.create_task(self._do(job_id))
                await asyncio.sleep(_POLL_S)

    def _recover(self) -> None:
        """What a crash left: its processes are ended, its jobs wait again, in their order."""
        for process in psutil.process_iter(["pid", "cmdline"]):
            if self._is_left_over(process.info["cmdline"] or []):
                process.kill()
        self._queue.reset(self._book.recover())
        self._files.sweep()

    def _is_left_over(self, argv: list[str]) -> bool:
        if argv[-4:-1] != ["hybrid.cli", "jobs", "run"]:
            return False
        return self._book.is_running(argv[-1])

    async def _do(self, job_id: str) -> None:
        """One job, as far as it goes now. Nothing it raises reaches the others."""
        lock = self._locks.setdefault(job_id, asyncio.Lock())
        async with lock:  # a job that was paused and resumed at once is here twice
            try:
                async with self._checks:
                    await self._check(job_id)
                async with self._lane:
                    await self._train(job_id)
            except NotFound:
                log.warning("the job %s is gone", job_id)
            except Exception:
                log.exception("the job %s could not be run", job_id)
                reason = "Something broke while running it; the server's log says what."
                await asyncio.to_thread(self._book.fail, job_id, reason, code="internal_error")

    async def _check(self, job_id: str) -> None:
        """Has the files read, in a process of their own: a broken or huge one must not hold up the server."""
        job = await self._job(job_id)
        if job["status"] != "validating_files":
            return
        await asyncio.to_thread(self._book.say, job_id, f"Validating training file: {job['spec']['training_file']}")
        code = await self._child("check", job_id)
        if (await self._job(job_id))["status"] == "validating_files":
            reason = f"The check of the files ended with {code}: {self._last_words(job_id)}"
            await asyncio.to_thread(
                self._book.fail, job_id, reason, code="invalid_training_file", param="training_file"
            )

    async def _train(self, job_id: str) -> None:
        """Starts the job's process until one has come to an end that is none of a crash."""
        deaths, died_at = 0, -1
        while (job := await self._job(job_id))["status"] == "queued":
            while not self._ready():  # noqa: ASYNC110  readiness is asked of the engine, nothing announces it
                await asyncio.sleep(_RETRY_S)
            code = await self._child("run", job_id)
            job = await self._job(job_id)
            if job["status"] == "running" and job["result"]:
                await self._serve(job)
                return
            if job["status"] not in ("queued", "running") or code == 0:
                continue
            if job["wanted"] == "cancel":
                await asyncio.to_thread(self._book.cancelled, job_id)
                return
            step = int(job["progress"].get("step", 0))
            deaths, died_at = (deaths + 1 if step == died_at else 1), step
            await asyncio.to_thread(self._died, job_id, code, deaths)

    def _died(self, job_id: str, code: int, deaths: int) -> None:
        words = self._last_words(job_id)
        if deaths >= MAX_DEATHS:
            reason = f"The trainer died {deaths} times at the same step (exit code {code}). {words}"
            self._book.fail(job_id, reason, code="trainer_died")
            return
        self._book.say(job_id, f"The trainer died (exit code {code}); it goes on from its newest checkpoint", "warn")
        self._book.stopped(job_id)

    async def _serve(self, job: JSON) -> None:
        """Takes what was published through its checks to an answer; then, and only then, the job has succeeded."""
        job_id, made = job["id"], job["result"]
        version = f"{made['adapter']}@{made['version']}"
        while (await self._job(job_id))["wanted"] != "cancel":
            try:
                await asyncio.to_thread(self._store.refresh)
                if made["kind"] == "lora":
                    await self._loader.load_now(version)
            except (Refused, ModelNotFound) as error:
                await asyncio.to_thread(self._book.fail, job_id, error.message, code=error.code)
                return
            except HybridError as error:  # the engine's trouble: the loader counts, and refuses in the end
                log.info("%s waits to be served: %s", version, error)
                await asyncio.sleep(_RETRY_S)
                continue
            if await asyncio.to_thread(self._succeed, job):
                return
        await asyncio.to_thread(self._withdraw, job_id, made["adapter"], made["version"])

    def _succeed(self, job: JSON) -> bool:
        job_id, made = job["id"], job["result"]
        results = self._files.write(
            job_id.replace("ftjob-", "file-"),
            curve_csv(self._book.curve(job_id)),
            caller=job["caller"],
            filename=f"step_metrics-{job_id}.csv",
        )
        name = {"lora": job["spec"]["fine_tuned_model"], "head": f"head:{made['adapter']}"}.get(made["kind"])
        answered = {**made, "fine_tuned_model": name, "result_files": [results["id"]]}
        return self._book.succeed(job_id, answered)

    def _withdraw(self, job_id: str, name: str, version: int) -> None:
        """A job cancelled after it published leaves nothing that serves, unless others use it by now."""
        try:
            self._store.retire(name, version)
        except (Conflict, ModelNotFound) as error:
            log.info("%s@%d stays: %s", name, version, error)
        self._book.cancelled(job_id)

    async def _child(self, verb: str, job_id: str) -> int:
        """Runs `hybrid jobs VERB ID`: words of ours and an id of ours, no shell between."""

        async def wanted() -> Wanted:
            wish: Wanted = (await self._job(job_id))["wanted"]
            return wish

        return await run_child(
            ["jobs", verb, job_id], settings=self._settings, log=self._log(job_id), busy=self._busy, wanted=wanted
        )

    async def _job(self, job_id: str) -> JSON:
        return await asyncio.to_thread(self._book.get, job_id)

    def _log(self, job_id: str) -> Path:
        return self._home.jobs / job_id / "log"

    def _last_words(self, job_id: str) -> str:
        path = self._log(job_id)
        return path.read_text(errors="replace").strip()[-_LAST_WORDS:] if path.exists() else ""


def curve_csv(curve: Sequence[JSON]) -> str:
    """The results file: one row a step that was measured, empty where a value was not."""
    text = io.StringIO()
    rows = csv.DictWriter(text, ("step", "train_loss", "valid_loss"), extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    rows.writerows(curve)
    return text.getvalue()
