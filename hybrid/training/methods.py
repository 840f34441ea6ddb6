"""The one table of methods: the word of a recipe → the function that trains."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid.errors import BadRequest
from hybrid.training import lora
from hybrid.training.job import Method

METHODS: Mapping[str, Method] = {
    "lora": lora.fit,
}


def find_method(name: str) -> Method:
    """The method called `name`. Raises BadRequest naming those that exist."""
    if name not in METHODS:
        raise BadRequest(f"There is no method {name[:80]!r}; use one of {', '.join(METHODS)}.", param="method")
    return METHODS[name]
