"""A grammar small enough to read: patterns with alternatives, shares of values for each split, and typing noise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, Literal, TypeVar

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
T = TypeVar("T")

#: two inputs that share more of their word pairs than this (Jaccard) are one input said twice
TOO_ALIKE = 0.7
#: how many of the last phrasings in a list only dev and only test may use
DEV_ONLY, TEST_ONLY = 1, 2

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_WORD = re.compile(r"(?<![{\w])[a-z]{5,}(?![}\w])")


@dataclass(frozen=True, slots=True)
class Row:
    """One example of a generated task. `phrasing` names the patterns it was made with."""

    input: str
    reference: str
    phrasing: str

    def wire(self, row_id: str) -> dict[str, Any]:
        """The row as a task folder spells it."""
        return {"id": row_id, "input": self.input, "reference": self.reference, "meta": {"phrasing": self.phrasing}}


def expand(pattern: str, rng: Random) -> str:
    """One reading of `pattern`: `[a|b|]` stands for one of its alternatives; they nest. `{slots}` stay."""
    while match := _INNERMOST.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(match[1].split("|")) + pattern[match.end() :]
    return " ".join(pattern.split())


def phrasing(patterns: Sequence[T], split: Split, rng: Random) -> tuple[int, T]:
    """A pattern and its number. The last ones are kept from training: dev and test take theirs every second time."""
    shared = len(patterns) - DEV_ONLY - TEST_ONLY
    if split == "train" or rng.random() < 0.5:
        number = rng.randrange(shared)
    elif split == "dev":
        number = rng.randrange(shared, shared + DEV_ONLY)
    else:
        number = rng.randrange(shared + DEV_ONLY, len(patterns))
    return number, patterns[number]


def share(values: Sequence[T], split: Split) -> list[T]:
    """The values a split may use: of every six in order, four are for train, one for dev, one for test."""
    wanted = {"train": (0, 1, 2, 3), "dev": (4,), "test": (5,)}[split]
    return [value for i, value in enumerate(values) if i % 6 in wanted]


def misspell(text: str, rng: Random) -> str:
    """`text` with one longer word mistyped: two letters swapped, one dropped or one doubled. Slots are spared."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = rng.choice(words)
    at = word.start() + rng.randrange(1, len(word[0]) - 1)
    wrong = rng.choice((text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]))
    return text[:at] + wrong + text[at + 2 :]


def sentence_case(text: str) -> str:
    """Every sentence begins with a capital."""
    return re.sub(r"(^|[.?!]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text)


def careless(text: str, rng: Random) -> str:
    """What haste does to a tidy text: most often nothing, else no capitals, no marks, or short forms."""
    haste = rng.random()
    if haste < 0.55:
        return text
    if haste < 0.8:
        text = text.lower()
    if haste > 0.7:
        text = text.replace("'", "").rstrip(".?!")
    if haste > 0.85:
        for long, short in (("please", "pls"), ("thanks", "thx"), (" you ", " u "), (" and ", " & ")):
            text = text.replace(long, short)
    return text


def bigrams(text: str) -> frozenset[tuple[str, str]]:
    """The pairs of neighbouring words, lower-cased, without marks."""
    words = re.findall(r"[\w'-]+", text.lower())
    return frozenset(zip(["", *words], [*words, ""], strict=True))


def alike(a: frozenset[Any], b: frozenset[Any]) -> float:
    """The Jaccard similarity of two sets, 0 to 1."""
    return len(a & b) / (len(a | b) or 1)


def distinct(make: Callable[[Split, Random], Row], counts: Mapping[Split, int], rng: Random) -> dict[Split, list[Row]]:
    """Rows for every split. None is too much like another, and no answer of one split is an answer of another."""
    seen: list[frozenset[tuple[str, str]]] = []
    owner: dict[str, Split] = {}

    def fresh(split: Split) -> Iterator[Row]:
        while True:
            row = make(split, rng)
            pairs = bigrams(row.input)
            if owner.get(row.reference, split) == split and all(alike(pairs, other) <= TOO_ALIKE for other in seen):
                seen.append(pairs)
                owner[row.reference] = split
                yield row

    return {split: list(islice(fresh(split), counts[split])) for split in SPLITS}
