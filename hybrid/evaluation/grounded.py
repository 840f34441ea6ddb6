"""Whether an answer says more than the passages it was shown: a lexical measure, which any reader can check by eye.

An answer's content words, numbers and names count as supported when the passages hold them; words of the question do
not count, for repeating it claims nothing. It misses paraphrase and credits words taken out of context: a low share
says "read this one", a high share does not prove the answer true.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from hybrid.evaluation.measured import Measured
from hybrid.evaluation.metrics import squad_tokens
from hybrid.evaluation.statistics import estimate
from hybrid.types import JSON

KINDS = ("words", "numbers", "names")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")


def support(answer: str, question: str, passages: Sequence[str]) -> dict[str, float]:
    """The supported share, 0 to 1, of each kind that the answer holds: `words`, `numbers`, `names`.

    {} without passages. Names are runs of capitalised words; a single one that begins a sentence is none.
    """
    if not passages:
        return {}
    shown, asked = "\n".join(passages), set(squad_tokens(question))
    known = set(squad_tokens(shown))
    known_numbers = set(_numbers(shown))
    said = {
        "words": [token in known for token in _content(squad_tokens(answer)) if token not in asked],
        "numbers": [n in known_numbers for n in _numbers(answer) if n not in set(_numbers(question))],
        "names": [set(squad_tokens(name)) <= known for name in _names(answer) if set(squad_tokens(name)) - asked],
    }
    return {kind: round(sum(held) / len(held), 4) for kind, held in said.items() if held}


def _content(tokens: Iterable[str]) -> Iterator[str]:
    """Words that carry meaning: no numbers, and none that the list of stop words names."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return (token for token in tokens if token not in ENGLISH_STOP_WORDS and not token.isdigit())


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in _NUMBER.findall(text)]


def _names(text: str) -> Iterator[str]:
    for sentence in _SENTENCE.split(text):
        words = sentence.split()
        for capital, run in itertools.groupby(range(len(words)), key=lambda i: words[i].lstrip("\"'(“‘")[:1].isupper()):
            places = list(run)
            if capital and places != [0]:
                yield " ".join(words[i] for i in places)


def groundedness(task: Measured) -> JSON:
    """arm → kind → the mean supported share with its interval, for arms that were shown passages."""
    out: JSON = {}
    for arm in task.arms:
        kinds = {kind: [o.grounded[kind] for o in task.outcomes[arm] if kind in o.grounded] for kind in KINDS}
        found = {kind: estimate(shares).wire() for kind, shares in kinds.items() if shares}
        if found:
            out[arm] = found
    return out
