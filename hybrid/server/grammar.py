"""Bounds on structured output: what is compiled to an automaton must not explode there.

Engines compile a regex, grammar or JSON schema before the first token. Counted repetition inside counted repetition
multiplies states, and a repeat directly of a repeat is ambiguous at every character: both are refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from hybrid.errors import BadRequest
from hybrid.types import JSON

MAX_REGEX = 2_048
MAX_GRAMMAR = 16_384
MAX_SCHEMA = 65_536
MAX_CHOICES = 512
MAX_REPEAT = 4_096  # the product of nested counts

_COUNTED = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_PIECE = re.compile(
    r"\\.|\((?:\?(?:P?<\w+>|[:=!>]|<[=!]))?|\[\^?\]?(?:\\.|[^\]\\])*\]|[)*+?]|\{(\d+)(?:,(\d*))?\}|[\s\S]"
)


def check(sampling: JSON) -> None:
    """Checks `response_format`, `structured_outputs`, `guided_*` and tool schemas. Raises BadRequest with `param`."""
    for param, kind, value in _asked(sampling):
        if kind == "regex":
            check_regex(value, param)
        elif kind == "grammar":
            _check_size(value, MAX_GRAMMAR, param)
        elif kind == "choice" and (not isinstance(value, list) or len(value) > MAX_CHOICES):
            raise BadRequest(f"{param} takes a list of at most {MAX_CHOICES} choices.", param=param)
        elif kind in ("json", "structural_tag"):
            check_schema(value, param)


def _asked(sampling: JSON) -> Iterator[tuple[str, str, Any]]:
    """Every (param, kind, value) that will be compiled."""
    for kind in ("regex", "grammar", "choice", "json", "structural_tag"):
        structured = sampling.get("structured_outputs") or {}
        for param, value in (
            ("structured_outputs", structured.get(kind)),
            (f"guided_{kind}", sampling.get(f"guided_{kind}")),
        ):
            if value is not None:
                yield param, kind, value
    if sampling.get("response_format") is not None:
        yield "response_format", "json", sampling["response_format"]
    if sampling.get("tools") is not None:
        yield "tools", "json", sampling["tools"]


def check_regex(pattern: Any, param: str) -> None:
    """Refuses what is too long, repeats a repeat, or counts beyond MAX_REPEAT."""
    _check_size(pattern, MAX_REGEX, param)
    groups: list[_Group] = [_Group()]
    for match in _PIECE.finditer(pattern):
        piece, group = match[0], groups[-1]
        if piece.startswith("("):
            groups.append(_Group())
        elif piece == ")" and len(groups) > 1:
            inner = groups.pop()
            groups[-1].close(inner)
        elif piece in ("*", "+", "?") or match[1] is not None:
            if not group.repeat(piece, int(match[2] or match[1] or 1)):
                raise BadRequest(f"{param}: the regex repeats what repeats already, so it could explode.", param=param)
        else:
            group.item()
        if groups[-1].count > MAX_REPEAT:
            raise BadRequest(f"{param}: the regex counts to more than {MAX_REPEAT:,}.", param=param)


class _Group:
    """What is known of a group while it is read: its pieces, the last one, and how far it counts."""

    def __init__(self) -> None:
        self.items = 0
        self.count = 1  # the largest product of counts inside
        self._last_count = 1  # that of the last piece
        self._last_is_repeat = False  # the last piece is nothing but an endless repeat
        self._endless = False

    def item(self) -> None:
        self.items += 1
        self._last_count, self._last_is_repeat, self._endless = 1, False, False

    def close(self, inner: _Group) -> None:
        """A group ended and is now our last piece."""
        self.items += 1
        self._last_count = inner.count
        self._last_is_repeat = inner.items == 1 and (inner._endless or inner._last_is_repeat)
        self._endless = False
        self.count = max(self.count, inner.count)

    def repeat(self, quantifier: str, times: int) -> bool:
        """A quantifier on the last piece; False when an endless repeat is repeated endlessly."""
        endless = quantifier in ("*", "+") or quantifier.endswith(",}")
        if endless and self._last_is_repeat:
            return False
        self._endless = self._endless or endless or self._last_is_repeat
        self._last_count *= times
        self.count = max(self.count, self._last_count)
        return True


def check_schema(schema: Any, param: str) -> None:
    """Refuses a schema that is too large, counts too far, or holds a regex that `check_regex` refuses."""
    _check_size(json.dumps(schema) if not isinstance(schema, str) else schema, MAX_SCHEMA, param)
    level: list[Any] = [schema]
    while level:
        node = level.pop()
        if isinstance(node, list):
            level.extend(node)
        elif isinstance(node, dict):
            _check_node(node, param)
            level.extend(node.values())


def _check_node(node: JSON, param: str) -> None:
    if isinstance(node.get("pattern"), str):
        check_regex(node["pattern"], param)
    if any(isinstance(node.get(key), int) and node[key] > MAX_REPEAT for key in _COUNTED):
        raise BadRequest(f"{param}: the schema counts to more than {MAX_REPEAT:,}.", param=param)


def _check_size(value: Any, limit: int, param: str) -> None:
    if not isinstance(value, str):
        raise BadRequest(f"{param} takes a string here.", param=param)
    if len(value) > limit:
        raise BadRequest(f"{param} is {len(value):,} characters long; the limit is {limit:,}.", param=param)
