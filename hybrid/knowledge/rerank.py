"""A closer look at the best candidates: a linear model over what question and passage share, or a cross-encoder.

The model is learned from the user's own questions; serving it is one product of a small matrix. Where a reader was
taught from them too, what it says of each candidate is among what the model looks at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import SetupError
from hybrid.knowledge.lexical import tokens
from hybrid.knowledge.logistic import Logistic
from hybrid.knowledge.ranking import CLOSER, Floats, Hit, convex
from hybrid.knowledge.reader import SAYS, Reader, as_read

#: the columns of `features`, in order; a model that was learned from others is not used
COLUMNS = (
    "dense", "dense_gap", "lexical", "lexical_share", "dense_rank", "lexical_rank",
    "rare_words", "title_words", "title_asked", "pairs", "names", "length",
)  # fmt: skip
#: more columns where a reader reads: what it says, and how far that is below the best
READ_COLUMNS = (*SAYS, *(f"{name}_gap" for name in SAYS))
#: so many of the fused list are read, those first of which a reader's own first look thinks most
READ = 8


@dataclass(frozen=True, slots=True)
class Reranker(Logistic):
    """Logistic regression over the columns of a `Shortlist` [n, 12 or 16]: the probability that a passage answers."""


def features(question: str, rarity: Mapping[str, float], hits: Sequence[Hit]) -> Floats:
    """float64 [n, 12]: what each candidate shares with the question. `rarity` is that of the question's words."""
    dense = np.array([hit.scores.dense for hit in hits])
    lexical = np.array([hit.scores.lexical for hit in hits])
    asked = tokens([question])[0]
    most = max(sum(rarity.get(word, 0.0) for word in set(asked)), 1e-9)
    titles = tokens([hit.passages[0].title for hit in hits])
    texts = tokens([hit.passages[0].text for hit in hits])
    exact = _exact(question)
    shared = [_shared(asked, exact, rarity, most, t, w) for t, w in zip(titles, texts, strict=True)]
    numbers = np.column_stack(
        [
            dense,
            dense - dense.max(initial=-1.0),
            lexical / most,
            lexical / max(float(lexical.max(initial=0.0)), 1e-9),
            1 / (1 + _ranks(dense)),
            1 / (1 + _ranks(lexical)),
        ]
    )
    return np.hstack([numbers, np.array(shared, np.float64).reshape(-1, 6)])


def _shared(
    asked: Sequence[str],
    exact: frozenset[str],
    rarity: Mapping[str, float],
    most: float,
    title: Sequence[str],
    text: Sequence[str],
) -> list[float]:
    wanted, named, held = set(asked), set(title), {*title, *text}
    pairs = set(pairwise(asked))
    both = {*pairwise(title), *pairwise(text)}
    return [
        sum(rarity.get(word, 0.0) for word in wanted & held) / most,
        sum(rarity.get(word, 0.0) for word in wanted & named) / most,
        len(wanted & named) / max(1, len(named)),
        len(pairs & both) / max(1, len(pairs)),
        len(exact & held) / len(exact) if exact else 0.5,
        math.log1p(len(text)),
    ]


def _exact(question: str) -> frozenset[str]:
    """The numbers and names of a question: words with a digit, and those written large inside it."""
    words = question.split()
    kept = [w for i, w in enumerate(words) if any(c.isdigit() for c in w) or (i and w[:1].isupper())]
    return frozenset(tokens([" ".join(kept)])[0])


def _ranks(scores: Floats) -> Floats:
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


@dataclass(frozen=True, eq=False)
class Shortlist:
    """The candidates for a question, fused, best first; `rarity` is that of the question's words. `weight` is what the
    cosine counted in a convex fusion, one number for all of them; None where they were fused otherwise. The candidates
    of a corpus with a `reader` are read; `read` keeps, by row, what it said of them.
    """

    question: str
    rarity: Mapping[str, float]
    hits: list[Hit]
    weight: float | None = None
    reader: Reader | None = None
    read: dict[int, Floats] = field(default_factory=dict)

    @cached_property
    def looked(self) -> list[Hit]:
        """The candidates as they are looked at more closely: with a reader those first that it is to read."""
        first = self.hits[:CLOSER]
        if self.reader is None or not first:
            return self.hits
        order = np.argsort(-self.reader.first.logits(features(self.question, self.rarity, first)), kind="stable")
        return [*(first[n] for n in order), *self.hits[CLOSER:]]

    @cached_property
    def rows(self) -> Floats:
        """float64 [m, 12]: the `features` of the first `CLOSER` of `looked`, worked out once however many ask; with a
        reader [m, 16], of the first `READ`."""
        first = self.looked[: CLOSER if self.reader is None else READ]
        wide = len(COLUMNS) + len(READ_COLUMNS) * (self.reader is not None)
        if not first:
            return np.empty((0, wide))
        found = features(self.question, self.rarity, first)
        return found if self.reader is None else np.hstack([found, self._said(self.reader, first)])

    def _said(self, reader: Reader, hits: Sequence[Hit]) -> Floats:
        """float64 [m, 4]: the `READ_COLUMNS`."""
        new = [hit for hit in hits if hit.row not in self.read]
        self.read.update(zip((hit.row for hit in new), reader.read(self.question, [told(h) for h in new]), strict=True))
        said = np.stack([self.read[hit.row] for hit in hits])
        return np.hstack([said, said - said.max(axis=0)])

    def by(self, weight: float) -> Shortlist:
        """The same candidates as a convex fusion with this weight has them; these themselves where it made them."""
        if weight == self.weight:
            return self
        return Shortlist(self.question, self.rarity, convex(self.hits, weight), weight, self.reader, self.read)


def told(hit: Hit) -> str:
    """A candidate as it is read."""
    return as_read(hit.passages[0])


class CrossEncoder:
    """A model that reads question and passage together (Nogueira & Cho 2019, arXiv 1901.04085); loaded at first use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scores(self, question: str, hits: Sequence[Hit]) -> Floats:
        """How well each passage [n] answers; only the order counts. Raises SetupError when there is no such model."""
        pairs = [(question, told(hit)) for hit in hits]
        return np.asarray(self._model.predict(pairs, show_progress_bar=False), np.float64).reshape(-1)

    @cached_property
    def _model(self) -> Any:
        from sentence_transformers import CrossEncoder as Model

        if not any(self.path.glob("*.safetensors")):
            raise SetupError(
                f"{self.path} holds no cross-encoder with safetensors; name the folder of one in the setting "
                "`retrieval.cross_encoder`, or leave that empty."
            )
        return Model(str(self.path), device="cpu", local_files_only=True)
