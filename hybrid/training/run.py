"""One training run from data to a published version: data → rows → method → adapter, shelf and card → store."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.models import ModelFiles
from hybrid.rooms import check_name
from hybrid.settings import Settings
from hybrid.training.batches import Row, encode
from hybrid.training.cards import hub_card
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.lora import Progress, Trained, train_lora
from hybrid.training.recipes import RECIPE_FILE, Recipe, load_recipe

#: method → what trains it. The one table.
METHODS: Mapping[str, Callable[..., Trained]] = {"lora": train_lora}
SHELF_LIMIT = 5000
CANARY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What was published, and what was measured on the way."""

    adapter: str
    version: int
    path: Path
    metrics: Mapping[str, Any]


def train(
    source: Path,
    *,
    settings: Settings,
    name: str | None,
    overrides: Mapping[str, Any],
    progress: Progress,
    store: AdapterStore,
    embedder: Embedder,
    model: ModelFiles,
) -> TrainResult:
    """Trains an adapter on the task folder or data file `source` and publishes it as the next version of `name`.

    The recipe is `adapters/<name>/recipe.toml` over the defaults, changed by `overrides`. Raises DataError, BadRequest,
    Refused; nothing is published unless everything succeeded.
    """
    adapter = check_name(name or source.resolve().name.removesuffix(source.suffix if source.is_file() else ""))
    recipe = load_recipe(settings.rooms.adapters / adapter / RECIPE_FILE, overrides)
    if recipe.method not in METHODS:
        raise BadRequest(
            f"method {recipe.method!r} is not known; the methods are {', '.join(METHODS)}.", param="method"
        )
    data = read_dataset(source, seed=recipe.seed)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    rows, too_long = encode(data.train, tokenizer, recipe.max_length)
    dev, _ = encode(data.dev, tokenizer, recipe.max_length)
    trained = METHODS[recipe.method](model, recipe, rows, dev, tokenizer.pad_token_id or 0, progress)
    metrics = _metrics(data, trained, too_long)
    version = _publish(store, adapter, data, recipe, trained, metrics, tokenizer, dev[0], embedder, model)
    return TrainResult(adapter, version.version, version.ref.path, metrics)


def _metrics(data: Dataset, trained: Trained, too_long: int) -> dict[str, Any]:
    return {
        "dev_loss": round(trained.dev_loss, 5),
        "train_loss": round(trained.train_loss, 5),
        "dev_sha256": data.dev_sha256,
        "dev_rows": len(data.dev),
        "train_rows": len(data.train),
        "too_long": too_long,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
        "tokens_per_s": round(trained.tokens / trained.seconds, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def _publish(
    store: AdapterStore,
    name: str,
    data: Dataset,
    recipe: Recipe,
    trained: Trained,
    metrics: Mapping[str, Any],
    tokenizer: Any,
    sample: Row,
    embedder: Embedder,
    model: ModelFiles,
) -> AdapterVersion:
    shelf = _shelf(name, data, embedder)
    canary = _canary(trained.model, tokenizer, sample)

    def fill(folder: Path) -> dict[str, Any]:
        _save_peft(trained.model, folder, model.name)
        shelf.write(folder)
        card = {
            "task": data.name,
            "method": recipe.method,
            "recipe": recipe.model_dump(mode="json"),
            "base": model.name,
            "base_sha256": model.sha256,
            "metrics": dict(metrics),
            "data": {**data.counts.wire(), "train_sha256": data.train_sha256},
            "instruction": data.instruction,
            "labels": list(data.labels),
            "license": data.license,
            "source": data.source,
            "curve": list(trained.curve),
            "canary": canary,
        }
        (folder / "README.md").write_text(hub_card(name, card), encoding="utf-8")
        return card

    return store.publish(name, fill)


def _save_peft(model: Any, folder: Path, base: str) -> None:
    """A PEFT folder that names the base by its name: a path of this machine would mean nothing elsewhere."""
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(base_model_name_or_path=base, inference_mode=True)
    path.write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def _shelf(name: str, data: Dataset, embedder: Embedder) -> Shelf:
    """The examples that few-shot prompts and the gate use: every message with and without its instruction."""
    examples = data.train[:SHELF_LIMIT]
    messages = [example.question for example in examples]
    bare = [example.bare for example in examples]
    vectors = embedder.embed(messages)
    return Shelf(
        name,
        tuple(messages),
        tuple(example.answer for example in examples),
        vectors,
        embedder.embed(bare) if bare != messages else vectors,
        embedder.digest,
    )


def _canary(model: Any, tokenizer: Any, row: Row) -> dict[str, Any]:
    """A dev row as text with the log-probability of each of its tokens but the first, by PEFT with this adapter.

    The text is decoded and read again, so that the engine, which is given text, sees the same tokens.
    """
    import torch

    text = tokenizer.decode([*row.prompt, *row.answer][:CANARY_TOKENS])
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return {"prompt": text, "logprobs": [round(float(x), 5) for x in chosen]}
