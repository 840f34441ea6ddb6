"""Evaluations that a server does in the background: what is asked for, and its row among the jobs.

queued ─► running ─► succeeded | failed        any that has not ended ─► cancelled
  ▲          │
  └──────────┘  the server stopped meanwhile: it goes on from the answers that are kept
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import and_, insert, select, update

from hybrid.errors import BadRequest, Conflict, DataError, NotFound
from hybrid.evaluation.gallery import check_report_name
from hybrid.evaluation.suite import DATA, folder_of, read_suite
from hybrid.evaluation.tasks import read_task
from hybrid.rooms import Home
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.state import jobs as table
from hybrid.types import JSON

KIND = "evaluate"
ACTIVE = ("queued", "running")
Split = Literal["dev", "test"]
#: questions open at once: a batch worth computing, and small enough for a person's request beside it
_INFLIGHT = 8
_SUITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is asked for: the report's `name`, and `what` as `hybrid eval` takes it, a suite's file or task folders."""

    name: str
    what: tuple[str, ...]
    suite: str = ""
    tasks: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    split: Split = "dev"
    limit: int | None = None

    def arguments(self, home: Home) -> list[str]:
        """The words of the command that does it."""
        limit = ["--limit", str(self.limit)] if self.limit else []
        words = [*self.what, f"--arms={','.join(self.arms)}", "--split", self.split, *limit]
        return ["eval", *words, "--inflight", str(_INFLIGHT), "--out", str(home.reports / self.name)]


def find_evaluation(
    settings: Settings,
    *,
    suite: str = "",
    tasks: Sequence[str] = (),
    arms: Sequence[str] = (),
    split: Split = "dev",
    limit: int | None = None,
    name: str = "",
) -> Evaluation:
    """The evaluation that these words mean. `tasks` are folders within the home or HYBRID_DATA.

    Raises BadRequest, NotFound for what is not there or lies elsewhere, DataError for a task without the split.
    """
    if bool(suite) == bool(tasks):
        raise BadRequest("Name a suite, or at least one task folder.", param="suite")
    if suite:
        path = _suite_file(suite, settings)
        what = [str(path)]
        folders = [folder_of(task, settings) for task in read_suite(what, settings).tasks]
    else:
        folders = [_inside(task, settings) for task in tasks]
        what = [str(folder) for folder in folders]
    for folder in folders:
        read_task(folder)
        if not (folder / f"{split}.jsonl").is_file():
            raise DataError(f"{folder.name} has no {split}.jsonl; choose another split.", param="split")
    title = suite or (folders[0].name if len(folders) == 1 else "tasks")
    return Evaluation(
        name=check_report_name(name or f"{title[:58]}-{split}"),
        what=tuple(what),
        suite=suite,
        tasks=tuple(tasks),
        arms=tuple(arms),
        split=split,
        limit=limit,
    )


def _suite_file(name: str, settings: Settings) -> Path:
    path = settings.rooms.suites / f"{name}.toml"
    if not _SUITE.fullmatch(name) or not path.is_file():
        known = ", ".join(sorted(p.stem for p in settings.rooms.suites.glob("*.toml"))) or "none"
        raise NotFound(f"There is no suite {name[:80]!r}. Suites here: {known}.", param="suite")
    return path


def _inside(name: str, settings: Settings) -> Path:
    """A task folder of the home or of HYBRID_DATA; what lies elsewhere is as unknown as what does not exist."""
    unknown = NotFound(f"There is no task folder {name[:80]!r} in this home or in HYBRID_DATA.", param="tasks")
    if "\0" in name or len(name) > 1000:
        raise unknown
    folder = folder_of(name, settings).resolve()
    roots = [root.resolve() for root in (settings.rooms.root, settings.data) if root is not None]
    if not any(folder.is_relative_to(root) for root in roots) or not (folder / "task.json").is_file():
        raise unknown
    return folder


def choices(settings: Settings) -> JSON:
    """What can be evaluated: `{"suites": [{"name", "tasks", "split", "limit", …}], "tasks": [{"name", "path", …}]}`.

    A suite or task that cannot be read has `error` instead of its facts.
    """
    found = [(path.parent, f"eval/tasks/{path.parent.name}") for path in settings.rooms.tasks.glob("*/task.json")]
    if settings.data is not None:
        found += [(path.parent, f"{DATA}/{path.parent.name}") for path in settings.data.glob("*/task.json")]
    return {
        "suites": [_suite_facts(path, settings) for path in sorted(settings.rooms.suites.glob("*.toml"))],
        "tasks": [_task_facts(folder, path) for folder, path in sorted(found, key=lambda pair: pair[1])],
    }


def _suite_facts(path: Path, settings: Settings) -> JSON:
    try:
        suite = read_suite([str(path)], settings)
    except DataError as error:
        return {"name": path.stem, "error": error.message}
    facts = suite.model_dump(mode="json", include={"arms", "split", "limit", "foreign_limit"})
    names = [Path(task).name for task in suite.tasks]
    return {"name": path.stem, "tasks": names, "trains": len(suite.adapters), **facts}


def _task_facts(folder: Path, path: str) -> JSON:
    try:
        task = read_task(folder)
    except DataError as error:
        return {"name": folder.name, "path": path, "error": error.message}
    splits = [split for split in ("dev", "test") if (folder / f"{split}.jsonl").is_file()]
    return {"name": task.name, "path": path, "metric": task.metric, "splits": splits}


class EvaluationBook:
    """The evaluations of one home. One server runs them; a row moves only from a status that has not ended."""

    def __init__(self, state: State) -> None:
        self._state = state

    def create(self, evaluation: Evaluation, caller: str) -> JSON:
        """A new row, `queued`. Raises Conflict while another evaluation writes the same report."""
        row_id = f"eval-{uuid.uuid4().hex[:24]}"
        spec = asdict(evaluation)
        same = and_(table.c.kind == KIND, table.c.status.in_(ACTIVE))
        with self._state.transaction() as connection:
            for other in connection.execute(select(table.c.id, table.c.spec).where(same)):
                if other.spec["name"] == evaluation.name:
                    raise Conflict(f"{other.id} writes the report {evaluation.name!r} already; cancel it, or wait.")
            row = {"id": row_id, "kind": KIND, "caller": caller, "spec": spec, "status": "queued"}
            connection.execute(insert(table).values(**row))
        return self.get(row_id)

    def get(self, row_id: str) -> JSON:
        """A row. Raises NotFound."""
        with self._state.transaction() as connection:
            one = and_(table.c.id == row_id, table.c.kind == KIND)
            row = connection.execute(select(table).where(one)).mappings().first()
        if row is None:
            raise NotFound(f"There is no evaluation {row_id[:80]!r}; GET /v1/evaluations lists them.", param="id")
        return dict(row)

    def list(self, limit: int = 20) -> Sequence[JSON]:
        """The newest first."""
        query = select(table).where(table.c.kind == KIND).order_by(table.c.created.desc()).limit(limit)
        with self._state.transaction() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def cancel(self, row_id: str) -> JSON:
        """Asks it to end: at once where it waits. Raises NotFound, Conflict for one that has ended otherwise."""
        row = self.get(row_id)
        if row["status"] not in (*ACTIVE, "cancelled"):
            raise Conflict(f"{row_id} has {row['status']}; it cannot be cancelled.", param="id")
        self._move(row_id, ACTIVE, wanted="cancel")
        self._move(row_id, ("queued",), status="cancelled", finished=time.time())
        return self.get(row_id)

    def claim(self) -> JSON | None:
        """The one that waits longest, `running` from now on; None when none waits."""
        waiting = and_(table.c.kind == KIND, table.c.status == "queued")
        with self._state.transaction() as connection:
            found = connection.scalar(select(table.c.id).where(waiting).order_by(table.c.created).limit(1))
        if found is None or not self._move(found, ("queued",), status="running", started=time.time()):
            return None
        return self.get(found)

    def tell(self, row_id: str, progress: Mapping[str, Any]) -> None:
        """How far it is, replaced whole."""
        self._move(row_id, ("running",), progress=dict(progress))

    def end(self, row_id: str, status: str, error: str = "", code: str | None = None) -> None:
        """It has come to an end."""
        self._move(row_id, ACTIVE, status=status, error=error, error_code=code, finished=time.time())

    def recover(self) -> None:
        """After a stop or a crash: what ran waits again, what was asked to end has ended."""
        for row in self.list(limit=1000):
            if row["status"] == "running" and row["wanted"] == "cancel":
                self.end(row["id"], "cancelled")
            elif row["status"] == "running":
                self._move(row["id"], ("running",), status="queued", progress={})

    def _move(self, row_id: str, origin: Sequence[str], **values: Any) -> bool:
        was = and_(table.c.id == row_id, table.c.status.in_(origin))
        with self._state.transaction() as connection:
            done = connection.execute(update(table).where(was).values(updated=time.time(), **values))
        return done.rowcount == 1


def wire(row: Mapping[str, Any]) -> JSON:
    """A row as the API tells it."""
    spec = row["spec"]
    return {
        "id": row["id"],
        "object": "evaluation",
        "status": row["status"],
        **{key: spec[key] for key in ("suite", "tasks", "arms", "split", "limit")},
        "report": spec["name"],
        "progress": row["progress"],
        "error": {"message": row["error"], "code": row["error_code"]} if row["error"] else None,
        "created_at": int(row["created"]),
        "finished_at": int(row["finished"]) if row["finished"] else None,
    }
