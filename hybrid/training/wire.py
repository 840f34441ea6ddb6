"""Rows as OpenAI's objects: what the API answers and `--json` prints."""

from __future__ import annotations

from typing import Any

from hybrid.types import JSON


def job_object(row: JSON) -> JSON:
    """A `fine_tuning.job`. Beside OpenAI's fields, `hybrid` holds the adapter, how far it is and what was measured."""
    spec, result = row["spec"], row["result"] or {}
    done = row["status"] == "succeeded"
    failed = row["status"] == "failed"
    return {
        "object": "fine_tuning.job",
        "id": row["id"],
        "created_at": int(row["created"]),
        "finished_at": _whole(row["finished"]),
        "status": row["status"],
        "model": spec.get("model", "base"),
        "fine_tuned_model": result.get("fine_tuned_model") if done else None,
        "organization_id": row["caller"],
        "training_file": spec.get("training_file", ""),
        "validation_file": spec.get("validation_file"),
        "result_files": result.get("result_files", []) if done else [],
        "hyperparameters": spec.get("hyperparameters", {}),
        "method": spec.get("method") or _supervised(spec.get("hyperparameters", {})),
        "seed": spec.get("seed", 0),
        "trained_tokens": result.get("trained_tokens") if done else None,
        "estimated_finish": _estimate(row),
        "metadata": spec.get("metadata"),
        "integrations": [],
        "user_provided_suffix": spec.get("suffix"),
        "error": {"code": row["error_code"], "message": row["error"], "param": row["error_param"]} if failed else None,
        "hybrid": {
            "adapter": spec.get("name"),
            "version": result.get("version"),
            "wanted": row["wanted"],
            "progress": row["progress"],
            "metrics": result.get("metrics", {}),
            "quickstart": spec.get("quickstart", False),
        },
    }


def event_object(row: JSON) -> JSON:
    """A `fine_tuning.job.event`; its id orders it."""
    return {
        "object": "fine_tuning.job.event",
        "id": f"ftevent-{row['seq']}",
        "created_at": int(row["at"]),
        "level": row["level"],
        "message": row["message"],
        "type": row["type"],
        "data": row["data"],
    }


def checkpoint_object(row: JSON, job: JSON) -> JSON:
    """A `fine_tuning.job.checkpoint`. The last is the model itself; the others are what a crash or a pause goes on
    from, and no `model` to ask."""
    name, is_model = job["spec"]["fine_tuned_model"], "@" in row["path"].rpartition("/")[2]
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": f"ftckpt-{row['seq']}",
        "created_at": int(row["at"]),
        "fine_tuned_model_checkpoint": name if is_model else f"{name}:ckpt-step-{row['step']}",
        "fine_tuning_job_id": row["job"],
        "step_number": row["step"],
        "metrics": row["metrics"],
    }


def file_object(row: JSON) -> JSON:
    """A `file`."""
    return {
        "object": "file",
        "id": row["id"],
        "bytes": row["bytes"],
        "created_at": int(row["created"]),
        "filename": row["filename"],
        "purpose": row["purpose"],
        "status": row["status"],
        "expires_at": None,
        "status_details": None,
    }


def page(objects: list[JSON], more: bool) -> JSON:
    """A page of a list."""
    ends = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {}
    return {"object": "list", "data": objects, "has_more": more, **ends}


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _estimate(row: JSON) -> int | None:
    left = row["progress"].get("eta_s")
    return int(row["updated"] + left) if row["status"] == "running" and left is not None else None


def _supervised(hyperparameters: Any) -> JSON:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
