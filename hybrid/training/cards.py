"""The adapter's papers: what `card.json` says, and the same as Hugging Face lays it out, `README.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from hybrid.training.job import Fitted, Job


def artefact_card(job: Job, fitted: Fitted, more: Mapping[str, Any]) -> dict[str, Any]:
    """What `card.json` says of a run; the store adds name, version, hash and date."""
    data = job.data
    return {
        "task": data.name,
        "kind": fitted.kind,
        "method": job.recipe.method,
        "recipe": job.recipe.model_dump(mode="json"),
        "base": job.model.name,
        "base_sha256": job.model.sha256,
        "metrics": {"dev_sha256": data.dev_sha256, **fitted.metrics},
        "data": {**data.counts.wire(), "train_sha256": data.train_sha256, "complaints": list(data.counts.complaints)},
        "rank": job.recipe.rank,
        "examples": len(data.train_items),
        "curve": [dict(point) for point in fitted.curve],
        "metric": data.metric,
        "instruction": data.instruction,
        "labels": list(data.labels),
        "license": data.license,
        "source": data.source,
        **({"serve_with": fitted.serve_with} if fitted.serve_with else {}),
        **more,
    }


def hub_card(name: str, card: Mapping[str, Any]) -> str:
    """The README of an adapter folder."""
    metadata = {
        "library_name": "peft",
        "base_model": card["base"],
        "pipeline_tag": "text-generation",
        "tags": ["lora", "hybrid"],
        **({"license_name": card["license"], "license": "other"} if card["license"] else {}),
    }
    metrics, data, recipe = card["metrics"], card["data"], card["recipe"]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"An adapter of `{card['base']}` (weights {card['base_sha256'][:12]}) for the task `{card['task']}`, "
        f"trained with `{card['method']}`.",
        "",
        "| | |",
        "|---|---|",
        f"| rows | {metrics['train_rows']} trained on, {metrics['dev_rows']} measured on |",
        f"| left out | {data['duplicates']} duplicates, {data['leaked']} also in dev or test, {data['bad']} unusable |",
        f"| dev loss | {metrics['dev_loss']} nats a token |",
        f"| compute | {metrics['steps']} steps, {metrics['tokens']} tokens, {metrics['seconds']} s |",
        f"| rank, alpha | {recipe['rank']}, {recipe['alpha']:g} |",
        f"| learning rate | {recipe['learning_rate']:g} |",
        "",
        "Meant for requests like those of its task, asked with the same instruction. Elsewhere it may be worse than "
        "its base; the gate of `hybrid` routes by the nearness of a request to its training messages.",
        "",
    ]
    return "\n".join(lines)
