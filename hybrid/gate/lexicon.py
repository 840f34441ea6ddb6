"""The words of an arm: what embeddings blur (names, templates, punctuation) a count of words still sees."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import numpy.typing as npt

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff"
#: words, single ideographs, and marks: brackets and bars tell forms apart as well as words do
_TOKEN = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")
_ASKING = frozenset(
    "who whom whose what when where which why how is are was were do does did can could".split()  # noqa: SIM905
)
#: characters of a word that count: plurals and endings fall away in most alphabets
STEM = 6
#: words assumed to exist beyond those seen, and how many words of general requests every arm is mixed with
_UNSEEN, _MIXED = 5000, 50
_LEAST, _MOST = -3.0, 4.0
#: words of a request that are looked at, and how many of its phrases count
_LOOK, _CUES = 200, 3


def bare_input(query: str) -> str:
    """The request without the instruction before it: what follows the last blank line (the form of every task)."""
    return query.rstrip().rsplit("\n\n", 1)[-1]


def template(query: str) -> str:
    """The instruction before a request's input; nothing where there is none."""
    return query.rstrip().rpartition("\n\n")[0].strip()


def spelled(text: str) -> list[str]:
    """The words and marks of a text in order, folded."""
    return _TOKEN.findall(text.casefold())


def tokens(text: str) -> list[str]:
    """The words and marks of a text in order, folded and cut to their first characters."""
    return [token[:STEM] for token in spelled(text)]


def look(text: str) -> list[str]:
    """The tokens of a request that are looked at: its input's first."""
    return tokens(bare_input(text))[:_LOOK]


def words(text: str) -> set[str]:
    """The distinct words of a text, without marks."""
    return {token for token in tokens(text) if token[0].isalnum()}


def is_question(text: str) -> bool:
    """Whether a text asks: a question mark at its end, or an English question word first."""
    first = text.casefold().split(maxsplit=1)
    return text.rstrip().endswith(("?", "？", "؟")) or (bool(first) and first[0] in _ASKING)


def rarity(texts: Iterable[str]) -> dict[str, float]:
    """The inverse document frequency of each word (Spärck Jones 1972)."""
    seen: Counter[str] = Counter()
    n = 0
    for text in texts:
        seen.update(words(text))
        n += 1
    return {word: math.log((1 + n) / count) for word, count in seen.items()}


def phrases(asked: Sequence[str]) -> list[str]:
    """Each pair of neighbouring tokens, the beginning and the end of the text included."""
    return [" ".join(pair) for pair in pairwise(("^", *asked, "$"))]


@dataclass(frozen=True, eq=False, slots=True)
class Lexicon:
    """How often an arm's messages use each word and each pair of words, how long they are (log of tokens), and which
    share of them begins with each instruction."""

    counts: Mapping[str, int] = field(default_factory=dict)
    total: int = 0
    length: float = 2.5
    spread: float = 0.5
    templates: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Sequence[str]) -> Lexicon:
        counts: Counter[str] = Counter()
        lengths: list[int] = []
        begun = Counter(template(text) for text in texts)
        templates = {begin: n / len(texts) for begin, n in begun.items() if begin}
        for text in texts:
            asked = look(text)
            counts.update(asked)
            counts.update(phrases(asked))
            lengths.append(len(asked))
        logs = [math.log(1 + n) for n in lengths]
        if len(logs) < 2:
            return cls(counts, sum(lengths), templates=templates)
        return cls(counts, sum(lengths), fmean(logs), max(pstdev(logs), 0.15), templates)

    def oddity(self, asked: Sequence[str]) -> float:
        """How unusual the length of a request is for this arm, in spreads beyond the first; 0 to 6."""
        return min(max(abs(math.log(1 + len(asked)) - self.length) / self.spread - 1, 0.0), 6.0)

    def familiarity(self, asked: Sequence[str], general: Lexicon, own: bool = False) -> tuple[float, float]:
        """How the words `asked` lean to this arm: the mean of all, and of the three phrases that lean most.

        Log-likelihood ratios of this arm's usage against general requests', smoothed by the latter; above zero they are
        the arm's. With `own` the words are one of the arm's messages, which must not vouch for itself.
        """
        if not asked or not self.total:
            return 0.0, 0.0
        pairs = phrases(asked)
        out = Counter([*asked, *pairs]) if own else Counter[str]()
        size = self.total - (len(asked) if own else 0) + _MIXED

        def ratio(token: str) -> float:
            common = (general.counts.get(token, 0) + 1) / (general.total + _UNSEEN)
            seen = max(self.counts.get(token, 0) - out[token], 0)
            return min(max(math.log((seen / common + _MIXED) / size), _LEAST), _MOST)

        best = sorted(map(ratio, pairs))[-_CUES:]
        return sum(map(ratio, asked)) / len(asked), sum(best) / len(best)


@dataclass(frozen=True, eq=False, slots=True)
class Wording:
    """The log-likelihood ratios of many lexicons in one table, so that a request costs a look-up a word and not one a
    word and arm. `ratios` is [words + 1, lexicons]; its last row is that of a word that nobody uses."""

    places: Mapping[str, int] = field(default_factory=dict)
    ratios: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros((1, 0), np.float32))

    @classmethod
    def of(cls, lexicons: Sequence[Lexicon], general: Lexicon) -> Wording:
        """The table of `lexicons` against general requests: what `Lexicon.familiarity` says of others' requests."""
        words = list(dict.fromkeys(word for lexicon in lexicons for word in lexicon.counts))
        common = np.array([general.counts.get(word, 0) + 1 for word in words], float) / (general.total + _UNSEEN)
        columns = [_ratios(lexicon, words, common) for lexicon in lexicons]
        ratios = np.column_stack(columns) if columns else np.zeros((1, 0))
        return cls({word: i for i, word in enumerate(words)}, ratios.astype(np.float32))

    def familiarity(self, asked: Sequence[str]) -> npt.NDArray[np.float64]:
        """[lexicons, 2]: what `Lexicon.familiarity` says for each of them."""
        if not asked or not self.ratios.shape[1]:
            return np.zeros((self.ratios.shape[1], 2))
        pairs = np.sort(self._rows(phrases(asked)), axis=0)[-_CUES:]
        return np.stack([self._rows(asked).mean(axis=0), pairs.mean(axis=0)], axis=1)

    def _rows(self, words: Sequence[str]) -> npt.NDArray[np.float64]:
        unknown = len(self.ratios) - 1
        found: Any = self.ratios[[self.places.get(word, unknown) for word in words]]
        return found.astype(np.float64)  # type: ignore[no-any-return]


def _ratios(lexicon: Lexicon, words: Sequence[str], common: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """[words + 1]; a lexicon of nothing leans nowhere."""
    if not lexicon.total:
        return np.zeros(len(words) + 1)
    seen = np.array([lexicon.counts.get(word, 0) for word in words], float)
    smoothed = np.append(seen / common, 0.0) + _MIXED
    return np.clip(np.log(smoothed / (lexicon.total + _MIXED)), _LEAST, _MOST)
