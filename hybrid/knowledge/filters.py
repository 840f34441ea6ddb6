"""Filters on the attributes of documents, as OpenAI spells them: comparisons, and `and` and `or` of filters.

A document without the attribute has no value: it equals nothing, and only `ne` and `nin` let it pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from hybrid.errors import BadRequest

Matches = Callable[[Mapping[str, Any]], bool]

_ORDER = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_PLAIN = (str, int, float, bool)
MAX_FILTERS = 256


def read_filter(value: Any) -> Matches:
    """What `{"type", "key", "value"}` or `{"type": "and"|"or", "filters"}` lets pass. Raises BadRequest."""
    return _read(value, [MAX_FILTERS])


def _read(value: Any, left: list[int]) -> Matches:
    left[0] -= 1
    if left[0] < 0:
        raise _wrong(f"holds more than {MAX_FILTERS} comparisons")
    if not isinstance(value, dict):
        raise _wrong("holds something that is no object")
    kind = value.get("type")
    if kind in ("and", "or"):
        inner = value.get("filters")
        if not isinstance(inner, list) or not inner:
            raise _wrong(f"needs a list `filters` for {kind!r}")
        parts = [_read(one, left) for one in inner]
        every = all if kind == "and" else any
        return lambda attributes: every(part(attributes) for part in parts)
    return _comparison(kind, value.get("key"), value.get("value"))


def _comparison(kind: Any, key: Any, wanted: Any) -> Matches:
    if not isinstance(key, str) or not key:
        raise _wrong("needs a `key`, the name of an attribute")
    if kind in ("in", "nin"):
        if not isinstance(wanted, list) or not all(isinstance(one, _PLAIN) for one in wanted):
            raise _wrong(f"needs a list of strings, numbers or booleans as `value` of {kind!r}")
        return lambda attributes: any(_equal(attributes.get(key), one) for one in wanted) is (kind == "in")
    if not isinstance(wanted, _PLAIN):
        raise _wrong("needs a string, a number or a boolean as `value`")
    if kind in ("eq", "ne"):
        return lambda attributes: _equal(attributes.get(key), wanted) is (kind == "eq")
    if kind not in _ORDER:
        raise _wrong("has a `type` other than and, or, eq, ne, gt, gte, lt, lte, in and nin")
    return lambda attributes: _ordered(_ORDER[kind], attributes.get(key), wanted)


def _equal(found: Any, wanted: Any) -> bool:
    """Whether two values are the same; true is not 1."""
    return isinstance(found, bool) is isinstance(wanted, bool) and bool(found == wanted)


def _ordered(compare: Callable[[Any, Any], bool], found: Any, wanted: Any) -> bool:
    """Numbers with numbers and strings with strings; nothing else has an order."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return False
    alike = isinstance(found, str) is isinstance(wanted, str)
    return found is not None and alike and compare(found, wanted)


def _wrong(what: str) -> BadRequest:
    return BadRequest(f"The filter {what}; write it as OpenAI does.", param="filters")
