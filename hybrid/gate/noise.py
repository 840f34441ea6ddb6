"""Words that are none: keyboard noise, and strings that an embedder sees in fragments only, belong to nobody.

To an embedder such a string lies somewhere, and now and then near an arm. Two signs tell it apart, and both must hold:
no lexicon of this home holds its words, and the embedder's tokenizer cuts them into scraps. A rare name, or a language
that nobody here wrote, shows one sign alone, or a little of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hybrid.gate.lexicon import STEM, bare_input, spelled

#: how many word pieces the embedder makes of each text
Pieces = Callable[[Sequence[str]], Sequence[int]]
#: whether a word is known, by its stem
Knows = Callable[[str], bool]

#: noise below this is none, and above the second it is all that there is
FAINT, _SURE = 0.35, 0.6
#: letters in a piece: in those of names and of words, and in scraps
_WHOLE, _SCRAP = 3.0, 2.0
#: words that are looked at, and how far; a tokenizer may take a word of a hundred letters for a single unknown piece
_LOOK, _LONGEST = 60, 40
#: an arm takes the noise that nine in ten of its own messages stay below; few messages say little of that
_USUAL, _PRIOR = 0.9, 20


def noise(query: str, knows: Knows, pieces: Pieces) -> float:
    """How much of a request is noise, 0 to 1: the share of its words that nobody knows, times how far the tokenizer
    cuts those to scraps. A string without letters and digits is nothing else; less than `FAINT` is 0."""
    found = _words(query)
    if not found:
        return _wordless(query)
    unknown = [word[:_LONGEST] for word in found if not knows(word[:STEM])]
    share = len(unknown) / len(found)
    amount = share * _scraps(unknown, sum(pieces(unknown))) if share >= FAINT else 0.0
    return amount if amount >= FAINT else 0.0


def _scraps(words: Sequence[str], cut: int) -> float:
    """0 to 1: the share of the pieces, `cut` of these words, that only go on with another, where they are short, too.

    A rare name falls into a few long pieces; what fingers drum on a keyboard into letters and pairs of them.
    """
    cut = max(cut, 1)
    short = (_WHOLE - sum(map(len, words)) / cut) / (_WHOLE - _SCRAP)
    return max(cut - len(words), 0) / cut * float(np.clip(short, 0.0, 1.0))


def believed(amount: float, usual: float = 0.0) -> float:
    """How much of an arm's claim to a request stands, 0 to 1, given its noise and what is `usual` of the arm's own."""
    return float(np.clip((_SURE - (amount - usual)) / (_SURE - FAINT), 0.0, 1.0))


def own_noise(messages: Sequence[str]) -> float:
    """The share of words, 0 to 1, that are in no other of an arm's messages: what nine in ten of them stay below.

    An arm for part numbers is asked in words that nobody has seen, and must not lose its requests for that.
    """
    spoken = [{word[:STEM] for word in _words(message)} for message in messages]
    heard: dict[str, int] = {}
    for stems in spoken:
        for stem in stems:
            heard[stem] = heard.get(stem, 0) + 1
    shares = [
        sum(heard[stem] < 2 for stem in stems) / len(stems) if stems else _wordless(message)
        for stems, message in zip(spoken, messages, strict=True)
    ]
    return float(np.quantile(shares, _USUAL)) * len(shares) / (len(shares) + _PRIOR) if shares else 0.0


def _words(query: str) -> list[str]:
    """The first words of a request's input that hold a letter, folded."""
    return [word for word in spelled(bare_input(query)) if any(map(str.isalpha, word))][:_LOOK]


def _wordless(query: str) -> float:
    """The noise of a string without words: digits may be a sum, marks alone say nothing."""
    return float(bool(query.strip()) and not any(map(str.isdigit, query)))
