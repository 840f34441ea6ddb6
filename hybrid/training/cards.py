"""The adapter's papers: what `card.json` says, and the same as Hugging Face lays it out, `README.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    """The README of a version's folder."""
    what, library, relation = _KINDS[card["kind"]]
    metadata = {
        **({"library_name": library} if library else {}),
        "base_model": card["base"],
        **({"base_model_relation": relation} if relation else {}),
        "pipeline_tag": "text-generation",
        "tags": [card["kind"], card["method"], "hybrid"],
        **({"license_name": card["license"], "license": "other"} if card["license"] else {}),
    }
    serve = f"{card['serve_with']}." if card.get("serve_with") else f"a server of `hybrid` loads it as `{name}`."
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"{what} `{card['base']}` (weights {card['base_sha256'][:12]}) for the task `{card['task']}`, "
        f"made with the method `{card['method']}`.",
        "",
        f"**To serve it:** {serve}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {label} | {said} |" for label, said in facts(card) if said),
        "",
        *(["![Training and dev loss over the steps](curve.png)", ""] if card["curve"] else []),
        "Meant for requests like those of its task, asked with the same instruction. Elsewhere it may be worse than "
        "its base; the gate of `hybrid` routes by the nearness of a request to its training messages.",
        "",
    ]
    return "\n".join(lines)


#: kind → (what it is, the library that opens it, its relation to the base as the hub says it)
_KINDS: Mapping[str, tuple[str, str, str]] = {
    "lora": ("A LoRA adapter of", "peft", "adapter"),
    "peft": ("An adapter, and no LoRA, of", "peft", "adapter"),
    "weights": ("All the weights, fine-tuned, of", "transformers", "finetune"),
    "head": ("A linear head beside", "", ""),
    "prompt": ("A way of asking", "", ""),
}


def facts(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The rows of a card's table; an empty one says nothing of this method."""
    metrics, data, recipe = card["metrics"], card["data"], card["recipe"]
    trained = metrics.get("train_rows", 0)
    yield "rows", f"{trained} trained on, {metrics.get('dev_rows', 0)} measured on"
    left = f"{data['duplicates']} duplicates, {data['near_duplicates']} near duplicates"
    yield "left out", f"{left}, {data['leaked']} also in dev or test, {data['bad']} unusable"
    yield "dev loss", f"{metrics['dev_loss']} nats a token" if "dev_loss" in metrics else ""
    yield "over-fitting", f"dev loss above training loss by {metrics['gap']}" if "gap" in metrics else ""
    yield "trained parameters", f"{metrics['trained_parameters']:,}" if metrics.get("trained_parameters") else ""
    steps = (
        f"{metrics['steps']} steps, {metrics['tokens']} tokens, " if "steps" in metrics and "tokens" in metrics else ""
    )
    yield "compute", f"{steps}{metrics['seconds']} s" if "seconds" in metrics else ""
    yield "rank, alpha", f"{recipe['rank']}, {recipe['alpha']:g}" if card["kind"] == "lora" else ""
    yield "learning rate", f"{recipe['learning_rate']:g}" if steps else ""
    yield "data", f"training rows {data['train_sha256'][:12]}, dev rows {metrics['dev_sha256'][:12]}"
    yield "source", " ".join(str(card["source"]).split())
