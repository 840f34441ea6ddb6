"""Whether what a search found holds an answer at all: a probability, from what the stages of the search saw.

A passage that answers stands out: it lies nearer than the rest, and holds the question's rare words. Where the best
passage is one of many alike, the answer is not in the documents. What that looks like is a corpus's own, and learned
from its own questions, asked with and without the passages that answer them (unanswerable questions as in SQuAD 2.0,
Rajpurkar et al. 2018, arXiv 1806.03822).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hybrid.knowledge.logistic import Logistic
from hybrid.knowledge.ranking import Floats
from hybrid.knowledge.reader import SAYS
from hybrid.knowledge.rerank import COLUMNS, READ_COLUMNS, Reranker, Shortlist
from hybrid.types import JSON
from hybrid.types.passage import Passage

#: columns of `rerank.features` that are read of the passage that comes first
_FIRST = ("rare_words", "title_words", "title_asked", "pairs", "names", "dense_rank", "lexical_rank")
#: those whose best value among the first few counts
_BEST = ("rare_words", "pairs", "names")
_FEW = 5
#: how many of the rest the best one is held against
_REST = 10
#: the columns of `signals`, in order; a model that was learned from others is not used
SIGNALS = (
    *(f"{part}_{what}" for part in ("dense", "lexical", "closer") for what in ("best", "gap", "lead")),
    *(f"first_{name}" for name in _FIRST),
    *(f"few_{name}" for name in _BEST),
    "question_words", "question_rarity",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The passages of a search, best first. `answerable` is the probability that they hold an answer, 0 to 1, where
    the corpus's own questions taught to tell; below `least` they count as weak."""

    passages: tuple[Passage, ...]
    answerable: float | None = None
    least: float = 0.0

    @property
    def weak(self) -> bool:
        """Whether nothing was found, or nothing that is likely to answer."""
        return not self.passages or (self.answerable is not None and self.answerable < self.least)


def signals(rows: Floats, rarity: Mapping[str, float], closer: Reranker | None) -> Floats:
    """float64 [21]: what tells whether the first candidates hold an answer; [27] where they were read.

    `rows` [m, 12 or 16], m >= 1, are those of a `Shortlist`, `rarity` is that of the question's words, and `closer`
    says how likely each answers.
    """
    column = dict(zip((*COLUMNS, *READ_COLUMNS), rows.T, strict=False))
    worth = np.zeros(len(rows)) if closer is None else closer.logits(rows)
    order = np.argsort(-worth, kind="stable")
    stands_out = [*_lead(column["dense"]), *_lead(column["lexical"]), *_lead(worth)]
    read = [value for name in SAYS if name in column for value in _lead(column[name])]
    first = [column[name][order[0]] for name in _FIRST]
    best = [column[name][order[:_FEW]].max() for name in _BEST]
    asked = [np.log1p(len(rarity)), sum(rarity.values()) / max(1, len(rarity))]
    return np.array([*stands_out, *first, *best, *asked, *read], np.float64)


def _lead(values: Floats) -> tuple[float, float, float]:
    """The best value, how far the next is below it, and the mean of the next nine."""
    best, *rest = np.sort(values)[::-1][:_REST]
    return float(best), float(best - rest[0]) if rest else 0.0, float(best - np.mean(rest)) if rest else 0.0


@dataclass(frozen=True, slots=True)
class Answerable:
    """What was learned: the model over `signals`, the closer look that it takes, and from which probability on what
    was found is taken to answer."""

    model: Logistic
    closer: Reranker | None
    least: float

    def chance(self, found: Shortlist) -> float:
        """The probability, 0 to 1, that these candidates hold an answer; 0 where there are none.

        Calibrated as if half of the questions had one.
        """
        if not found.hits:
            return 0.0
        return float(self.model.scores(signals(found.rows, found.rarity, self.closer)[None])[0])

    @classmethod
    def read(cls, value: JSON) -> Answerable:
        """What `dataclasses.asdict` spelled. Raises KeyError, TypeError or ValueError for what is none."""
        closer = value["closer"]
        model, least = Logistic.read(value["model"]), float(value["least"])
        return cls(model, None if closer is None else Reranker.read(closer), least)
