"""A recipe: every knob of a training run, typed, with its default in sight. A name that does not exist is an error."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hybrid.errors import BadRequest

RECIPE_FILE = "recipe.toml"

#: where a method wants another default than LoRA does
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "rslora": {"alpha": 8.0},  # alpha / sqrt(rank) is then what LoRA's default is at the default rank
    "lora_plus": {"learning_rate": 2e-4},  # A's; B's is sixteen times that
    "ia3": {"learning_rate": 5e-3},
    "prompt_tuning": {"learning_rate": 3e-2},
    "prefix_tuning": {"learning_rate": 1e-2},
    "full": {"learning_rate": 5e-5},
    "last_layers": {"learning_rate": 1e-4},
    "pretrain": {"learning_rate": 5e-4},  # nothing but the text says what to keep: go gently
    "dpo": {"learning_rate": 2e-4, "epochs": 1.0},  # preferences overfit within an epoch or two
    "reward": {"learning_rate": 5e-4, "epochs": 1.0},
}
_LORA = ("lora", "rslora", "lora_plus", "dora", "qlora")
#: keys that mean something to some methods only
ONLY: Mapping[str, tuple[str, ...]] = {
    "lora_plus_ratio": ("lora_plus",),
    "layer_decay": (*_LORA, "full", "last_layers"),
    "embedding_rate": ("full",),
    "layers": ("last_layers",),
    "virtual_tokens": ("prompt_tuning", "prefix_tuning"),
    "shots": ("few_shot",),
    "candidates": ("prompt_search",),
    "features": ("head",),
    "beta": ("dpo",),
    "corpus": ("raft",),
    "gold_share": ("raft",),
    "passages": ("raft",),
    "teacher": ("distill", "distill_logits"),
    "teacher_model": ("distill",),
    "distill_temperature": ("distill_logits",),
    "distill_weight": ("distill_logits",),
    "shard": ("lora", "rslora", "lora_plus", "full", "last_layers"),
    "init_from": ("lora", "rslora", "lora_plus", "pretrain", "dpo", "reward", "raft", "distill", "distill_logits"),
    "measure_on": (
        *_LORA, "ia3", "prompt_tuning", "prefix_tuning", "full", "last_layers",
        "pretrain", "raft", "distill", "distill_logits",
    ),
}  # fmt: skip


class Recipe(BaseModel):
    """The one flat set of keys that `recipe.toml` and `--set` share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field("lora", description="how the model is adapted: a row of the methods table")
    epochs: float = Field(3.0, gt=0, description="passes over the training rows at most")
    max_steps: int = Field(0, ge=0, description="optimiser steps at most; 0 leaves it to the epochs")
    learning_rate: float = Field(2e-3, gt=0, lt=1, description="the peak of the schedule")
    batch_size: int = Field(16, ge=1, le=4096, description="rows in one forward and backward pass")
    accumulate: int = Field(1, ge=1, le=4096, description="batches summed into one optimiser step")
    max_length: int = Field(1024, ge=16, description="tokens of a row, prompt and answer, at most")
    rank: int = Field(16, ge=1, le=512, description="rank of the LoRA matrices")
    alpha: float = Field(32.0, gt=0, description="LoRA scale: the update is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the LoRA matrices")
    target_modules: tuple[str, ...] = Field(("all-linear",), description="names of the linear layers to adapt")
    seed: int = Field(0, ge=0, description="orders the rows and draws the initial weights")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="share of the steps in which the rate climbs")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="AdamW's decoupled decay")
    early_stop: bool = Field(True, description="stop when the dev loss no longer falls")
    patience: int = Field(3, ge=1, description="dev measurements without a new best before stopping")
    eval_every: int = Field(0, ge=0, description="steps between dev measurements; 0 measures twice an epoch")
    precision: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the frozen base's arithmetic")

    lora_plus_ratio: float = Field(16.0, ge=1, description="LoRA+: B's learning rate as a multiple of A's")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each block's rate as a share of the one above it")
    embedding_rate: float = Field(1.0, ge=0, description="the rate of embeddings and head as a multiple of the rest's")
    layers: int = Field(2, ge=1, description="blocks that train, counted from the top")
    virtual_tokens: int = Field(16, ge=1, le=512, description="length of a soft prompt or prefix")
    shots: int = Field(4, ge=1, le=64, description="examples shown before a question")
    features: Literal["embedder", "base", "both"] = Field("embedder", description="what a head reads")
    candidates: tuple[str, ...] = Field((), description="instructions to try beside the task's own and its variants")

    beta: float = Field(0.1, gt=0, description="DPO: how dear it is to leave the reference")
    corpus: str = Field("", description="RAFT: the corpus to retrieve from; the adapter's own name by default")
    gold_share: float = Field(
        0.8, ge=0, le=1, description="RAFT: rows that get the right passage if the search misses it"
    )
    passages: int | None = Field(
        None, ge=1, le=50, description="RAFT: passages before each question, then and when served (default: as `rag`)"
    )
    teacher: str = Field("", description="distillation: the teacher's URL, or the folder or name of a local model")
    teacher_model: str = Field("", description="distillation: what the teacher at that URL is called")
    distill_temperature: float = Field(2.0, gt=0, description="softens the probabilities of teacher and student")
    distill_weight: float = Field(
        0.5, ge=0, le=1, description="the teacher's share of the loss; the rest is the answers'"
    )
    shard: bool = Field(False, description="split the model over the processes of a team, for one that fits no device")
    init_from: str = Field("", description="the adapter (name@version) whose weights the run starts from")
    rows: int = Field(0, ge=0, description="training rows to learn from, labels in their shares; 0 takes all")
    measure_on: str = Field("", description="another task, whose dev rows are measured before and after")
    mixture_temperature: float = Field(
        1.0, gt=0, description="several tasks: 1 keeps their sizes, more makes them equal"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, values: Any) -> Any:
        return {**DEFAULTS.get(str(values.get("method")), {}), **values} if isinstance(values, Mapping) else values

    @field_validator("target_modules", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def parse_sets(pairs: Iterable[str]) -> dict[str, Any]:
    """`key=value` words as a mapping. A value is read as TOML (`3`, `1e-3`, `true`, `["a"]`), else it is text.

    Raises BadRequest for a word without `=` or with an unknown key.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise BadRequest(f"--set {pair!r} has no '='; write --set key=value, for example --set epochs=2.")
        values[key.strip()] = _literal(text.strip())
    _known(values, "--set")
    return values


def load_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """The defaults, changed by the file where there is one, changed by the overrides.

    Raises BadRequest naming the file or flag, the key and what it takes, or the methods it is for.
    """
    from_file = _read(path) if path is not None and path.is_file() else {}
    _known(overrides, "--set")
    values = {**from_file, **overrides}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        where = "--set" if key in overrides else str(path)
        told = Recipe.model_fields[key].description
        raise BadRequest(
            f"{where} {key}: {first['msg']}, got {first['input']!r}. {key} is {told}.", param=key
        ) from error
    for key in values:
        if recipe.method not in ONLY.get(key, (recipe.method,)):
            where = "--set" if key in overrides else str(path)
            raise BadRequest(
                f"{where} {key}: method {recipe.method!r} has no such knob; it is for {', '.join(ONLY[key])}.",
                param=key,
            )
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} is not valid TOML: {error}. Correct it, or remove it to use the defaults.") from error
    _known(values, str(path))
    return values


def _known(values: Mapping[str, Any], where: str) -> None:
    for key in values:
        if key not in Recipe.model_fields:
            near = difflib.get_close_matches(key, Recipe.model_fields, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"The keys are {', '.join(Recipe.model_fields)}."
            raise BadRequest(f"{where} {key}: no recipe has this key. {hint}", param=key)


def _literal(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
