"""What a run does to another task: its dev rows measured before and after, in another language for instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest
from hybrid.training.base import stops
from hybrid.training.batches import Encoded, encode, end_of_turn
from hybrid.training.data import DEV_LIMIT, read_dataset
from hybrid.training.job import Job
from hybrid.training.objective import Measured


def measured_elsewhere(
    job: Job, model: Any, measure: Callable[[Sequence[Encoded]], Measured]
) -> Callable[[], Mapping[str, Any]]:
    """Measures the dev rows of `measure_on` now, and returns what measures them again and tells both.

    Without `measure_on` nothing is measured and nothing told. Raises DataError for data that cannot be read,
    BadRequest for data that hold no questions and answers.
    """
    if not job.recipe.measure_on:
        return dict
    from transformers import AutoTokenizer

    data = read_dataset(Path(job.recipe.measure_on))
    if not data.dev:
        raise BadRequest(f"measure_on: {data.name} holds no questions and answers; name a task.", param="measure_on")
    tokenizer = AutoTokenizer.from_pretrained(job.model.path, local_files_only=True)
    end = end_of_turn(tokenizer, stops(model))
    rows, _ = encode(tokenizer, data.dev[:DEV_LIMIT], end=end, max_length=job.recipe.max_length)
    before = _told(measure(rows))

    def both() -> Mapping[str, Any]:
        return {"elsewhere": {"task": data.name, "rows": len(rows), "before": before, "after": _told(measure(rows))}}

    return both


def _told(found: Measured) -> dict[str, float]:
    return {
        "loss": round(found.loss, 5),
        "token_accuracy": round(found.token_accuracy, 4),
        "exact": round(found.exact, 4),
    }
