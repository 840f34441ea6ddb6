"""Whether an answer says more than the passages it was shown: by words, which any reader can check by eye.

An answer's content words, numbers and names count as supported when the passages hold them; words of the question do
not count, for repeating it claims nothing. A claim is a sentence with content of its own; a passage supports it that
holds every number in it and half of its words. Where an answer names passages as `[n]`, each must support the claim
that names it. This misses paraphrase and credits words taken out of context: a low share says "read this one", a high
share does not prove the answer true.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hybrid.knowledge.lexical import tokens
from hybrid.types import JSON

KINDS = ("claims", "words", "numbers", "names")
#: the share of a claim's words that a passage must hold to support it
HALF = 0.5
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
#: a passage that the answer names, and such names after the end of their sentence
_MARK = re.compile(r"\s*\[(\d{1,3})\]")
_AFTER = re.compile(r"([.!?]+)((?:\s*\[\d{1,3}\])+)")


@dataclass(frozen=True, slots=True)
class Support:
    """How far passages hold an answer: the supported share, 0 to 1, of each of the `KINDS` that it holds; the places,
    from 0, of the passages that support a claim of it; and of those that it names, whether the claims with the name
    are supported by them."""

    shares: Mapping[str, float] = field(default_factory=dict)
    by: tuple[int, ...] = ()
    cited: Mapping[int, bool] = field(default_factory=dict)

    @property
    def used(self) -> bool | None:
        """Whether any passage supports any claim; None for an answer that claims nothing."""
        return bool(self.by) if "claims" in self.shares else None

    def wire(self) -> JSON:
        """As a reply tells it; `miscited` counts passages from 1, as the prompt and the answer do."""
        return {"used": self.used, **self.shares, "miscited": [at + 1 for at, right in self.cited.items() if not right]}


@dataclass(frozen=True, slots=True)
class _Said:
    """What a text holds that can be looked for elsewhere, in order."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> _Said:
        return cls(tuple(_content(tokens([text])[0])), tuple(_numbers(text)))

    def beside(self, other: _Said) -> _Said:
        """What it holds and the other does not."""
        words, numbers = set(other.words), set(other.numbers)
        return _Said(
            tuple(word for word in self.words if word not in words),
            tuple(number for number in self.numbers if number not in numbers),
        )

    def supports(self, claim: _Said) -> bool:
        held = sum(word in self.words for word in claim.words)
        return set(claim.numbers) <= set(self.numbers) and held >= HALF * len(claim.words)


def support(answer: str, question: str, passages: Sequence[str]) -> Support:
    """What of an answer the passages hold; nothing is said where there are none.

    Names are runs of capitalised words; a single one that begins a sentence is none.
    """
    if not passages:
        return Support()
    asked, shown = _Said.of(question), [_Said.of(text) for text in passages]
    sentences = _SENTENCE.split(_AFTER.sub(r"\2\1", answer))
    own = [_Said.of(_MARK.sub("", sentence)).beside(asked) for sentence in sentences]
    claims = [claim for claim in own if claim.words or claim.numbers]
    names = [_Said.of(name).beside(asked).words for name in _names(_MARK.sub("", answer))]
    words, numbers = {w for text in shown for w in text.words}, {n for text in shown for n in text.numbers}
    held = {
        "claims": [any(text.supports(claim) for text in shown) for claim in claims],
        "words": [word in words for claim in claims for word in claim.words],
        "numbers": [number in numbers for claim in claims for number in claim.numbers],
        "names": [words.issuperset(name) for name in names if name],
    }
    shares = {kind: round(sum(found) / len(found), 4) for kind, found in held.items() if found}
    by = tuple(at for at, text in enumerate(shown) if any(text.supports(claim) for claim in claims))
    return Support(shares, by, _cited(zip(sentences, own, strict=True), shown))


def _cited(claims: Iterable[tuple[str, _Said]], shown: Sequence[_Said]) -> dict[int, bool]:
    """By place, whether each passage that a sentence names supports all claims with its name."""
    cited: dict[int, bool] = {}
    for sentence, claim in claims:
        for at in {int(number) - 1 for number in _MARK.findall(sentence)}:
            right = 0 <= at < len(shown) and shown[at].supports(claim)
            cited[at] = right and cited.get(at, True)
    return dict(sorted(cited.items()))


def _content(words: Iterable[str]) -> Iterator[str]:
    """Words that carry meaning: no numbers, and none that the list of stop words names."""
    from bm25s.stopwords import STOPWORDS_EN_PLUS

    return (word for word in words if word not in STOPWORDS_EN_PLUS and not word.isdigit())


def _numbers(text: str) -> Iterator[str]:
    return (number.replace(",", "") for number in _NUMBER.findall(text))


def _names(text: str) -> Iterator[str]:
    for sentence in _SENTENCE.split(text):
        words = sentence.split()
        for capital, run in itertools.groupby(range(len(words)), key=lambda i: words[i].lstrip("\"'(“‘")[:1].isupper()):
            places = list(run)
            if capital and places != [0]:
                yield " ".join(words[i] for i in places)
