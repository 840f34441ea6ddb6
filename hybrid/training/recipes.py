"""A recipe: every knob of a training run, typed, with its default in sight. A name that does not exist is an error."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hybrid.errors import BadRequest

RECIPE_FILE = "recipe.toml"


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

    Raises BadRequest naming the file or flag, the key and what it takes.
    """
    from_file = _read(path) if path is not None and path.is_file() else {}
    _known(overrides, "--set")
    try:
        return Recipe.model_validate({**from_file, **overrides})
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        where = "--set" if key in overrides else str(path)
        told = Recipe.model_fields[key].description
        raise BadRequest(
            f"{where} {key}: {first['msg']}, got {first['input']!r}. {key} is {told}.", param=key
        ) from error


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
