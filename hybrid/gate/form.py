"""How a request looks, whatever it is about: numbers that an embedding of its meaning does not hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from hybrid.gate.features import Numbers
from hybrid.gate.lexicon import is_question

#: the columns of `form`, in order
FORM = ("length", "question", "code", "digits", "json", "options")
_CODE = re.compile(
    r"```|\bdef \w+\(|\bclass \w+|[;{}][^\S\n]*$|</\w+>|\b(?:SELECT|import|return|function)\b|==|->", re.MULTILINE
)
_OPTION = re.compile(r"^[^\S\n]*\(?[A-E][.):]\s", re.MULTILINE)
#: the end of a long request tells as much as all of it
_LOOK = 4000


def form(queries: Sequence[str]) -> Numbers:
    """[n, columns of FORM]: log length, question, code, share of digits, JSON asked for, lettered options."""
    return np.array([_row(query) for query in queries], dtype=np.float64).reshape(len(queries), len(FORM))


def _row(query: str) -> tuple[float, ...]:
    text = query[-_LOOK:]
    return (
        math.log1p(len(query)) / 10,
        float(is_question(text)),
        float(_CODE.search(text) is not None),
        sum(map(str.isdigit, text)) / max(len(text), 1),
        float("json" in text.casefold()),
        float(_OPTION.search(text) is not None),
    )
