"""The body of `POST /v1/fine_tuning/jobs` as an order: every field checked, what is unknown left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import BadRequest, NotFound
from hybrid.gateway import Gateway
from hybrid.lifecycle.orders import Order
from hybrid.server.body import kind_of
from hybrid.training.recipes import Recipe
from hybrid.types import JSON
from hybrid.types.rights import Rights

#: OpenAI's word for a method → ours; ours can be said outright in `hybrid.method`
_METHODS = {"supervised": None, "dpo": "dpo"}
#: our own keys of `hybrid`, beside those of a recipe
_OURS = ("name", "promote")
_MAX_PAIRS, _MAX_KEY, _MAX_VALUE, _MAX_SUFFIX = 16, 64, 512, 64


def read_order(body: JSON, gateway: Gateway, rights: Rights) -> Order:
    """The order in a body. Raises BadRequest naming the field, ModelNotFound for what the caller may not use."""
    extras = _object(body, "hybrid")
    method = _object(body, "method")
    kind = method.get("type", "supervised")
    if kind not in _METHODS:
        raise BadRequest(f"`method.type` is supervised or dpo, not {str(kind)[:80]!r}.", param="method")
    hyper = {**_object(body, "hyperparameters"), **_object(_object(method, str(kind)), "hyperparameters")}
    overrides = _recipe(hyper)
    if (ours := _METHODS[kind]) is not None:
        overrides["method"] = ours
    overrides |= {key: value for key, value in extras.items() if key not in _OURS}
    if (parent := _parent(body, gateway, rights)) is not None:
        overrides["init_from"] = parent
    _check_sources(body, overrides, gateway, rights)
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise BadRequest("`seed` is a whole number from 0.", param="seed")
    return Order(
        model=_text(body, "model"),
        training_file=_text(body, "training_file"),
        validation_file=_text(body, "validation_file") if body.get("validation_file") is not None else None,
        name=_text(extras, "name") if extras.get("name") is not None else None,
        suffix=_suffix(body.get("suffix")),
        overrides=overrides,
        seed=seed,
        metadata=_metadata(body.get("metadata")),
        method=method or None,
        promote=extras.get("promote", True) is not False,
        asked=body,
    )


def _check_sources(body: JSON, overrides: Mapping[str, Any], gateway: Gateway, rights: Rights) -> None:
    """A job learns from no adapter and no corpus that its caller may not use; an adapter's corpus has its name."""
    if rights.admin:
        return
    if (parent := overrides.get("init_from")) is not None:
        gateway.names.arm(str(parent), rights)
    for corpus in (overrides.get("corpus"), _object(body, "hybrid").get("name"), body.get("suffix")):
        if isinstance(corpus, str) and corpus in rights.hidden:
            raise NotFound(f"There is no corpus {corpus[:80]!r} for this key.", param="corpus")


def _parent(body: JSON, gateway: Gateway, rights: Rights) -> str | None:
    """The adapter version to go on from, when `model` is one; None for the base. Raises ModelNotFound, BadRequest."""
    model = _text(body, "model")
    arm = gateway.names.arm(model, rights)
    if arm is not None and arm.strategy == "base":
        return None
    if arm is None or arm.strategy != "adapter" or arm.adapter is None:
        raise BadRequest(f"{model[:80]!r} cannot be trained; name the base model or an adapter.", param="model")
    return gateway.store.resolve(arm.adapter).id


def _recipe(hyper: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's hyperparameters as recipe keys; "auto" leaves the recipe's own."""
    given = {key: value for key, value in hyper.items() if value not in (None, "auto")}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadRequest(f"`{str(key)[:80]}` is a number above 0 or 'auto', not {kind_of(value)}.", param=str(key))
    found = {ours: given[theirs] for theirs, ours in _HYPER.items() if theirs in given}
    if "learning_rate_multiplier" in given:
        usual = float(Recipe.model_fields["learning_rate"].default)
        found["learning_rate"] = usual * given["learning_rate_multiplier"]
    return found


_HYPER = {"n_epochs": "epochs", "batch_size": "batch_size", "beta": "beta"}


def _object(body: Mapping[str, Any], field: str) -> JSON:
    value = body.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest(f"`{field}` is an object, not {kind_of(value)}.", param=field)
    return value


def _text(body: Mapping[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"`{field}` is a string that is not empty, not {kind_of(value)}.", param=field)
    return value


def _suffix(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and 1 <= len(value) <= _MAX_SUFFIX):
        return value
    raise BadRequest(f"`suffix` is a string of 1 to {_MAX_SUFFIX} characters.", param="suffix")


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_PAIRS:
        raise BadRequest(f"`metadata` is an object of at most {_MAX_PAIRS} pairs.", param="metadata")
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > _MAX_KEY or len(text) > _MAX_VALUE:
            raise BadRequest(
                f"`metadata` holds strings: keys of at most {_MAX_KEY}, values of at most {_MAX_VALUE} characters.",
                param="metadata",
            )
    return value
