"""What becomes of the candidates of a search: fused, reranked, freed of copies, spread out. Each stage keeps its score.

Fusion is the convex combination of Bruch et al. 2023 (arXiv 2210.11934), or reciprocal ranks (Cormack et al. 2009);
the spreading is maximal marginal relevance (Carbonell & Goldstein 1998).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.alike import Shingles, numbers, same, shingles
from hybrid.knowledge.embed import Vectors
from hybrid.types.passage import Passage, Scores

Floats = npt.NDArray[np.float64]
Fusion = Literal["convex", "rrf"]

#: so many of the fused list are looked at more closely
CLOSER = 30
#: of more than so many that are asked for copies are not looked for
MANY = 100
#: what the cosine counts beside the words where nothing was learned: the lower of the weights that the dev questions of
#: two unlike corpora chose, 0.75 and 0.9
WEIGHT = 0.75
#: how flat reciprocal ranks are, as Cormack et al. set it
_FLAT = 60


@dataclass(frozen=True, eq=False, slots=True)
class Hit:
    """One text that was found: its row in a corpus, the passage under each id that the caller may see, its scores, and
    how many others that were found say almost the same and stand behind it."""

    corpus: str
    row: int
    passages: Sequence[Passage]
    scores: Scores
    alike: int = 0

    def named(self) -> list[Passage]:
        """The passage under each of its ids; `score` is the cosine."""
        dense, alike = self.scores.dense, self.alike
        return [replace(p, score=dense, corpus=self.corpus, scores=self.scores, alike=alike) for p in self.passages]


def fused(hits: Sequence[Hit], weights: Sequence[float], method: Fusion) -> list[Hit]:
    """The candidates by both scores, best first. `weights` [n] in 0..1 say what the cosine counts for each."""
    dense = np.array([hit.scores.dense for hit in hits])
    lexical = np.array([hit.scores.lexical for hit in hits])
    shares = np.array(weights)
    parts = (_reciprocal(dense), _reciprocal(lexical)) if method == "rrf" else (_share(dense), _share(lexical))
    together = shares * parts[0] + (1 - shares) * parts[1]
    scored = [replace(h, scores=replace(h.scores, fused=float(s))) for h, s in zip(hits, together, strict=True)]
    return sorted(scored, key=lambda hit: (-hit.scores.fused, -hit.scores.dense, hit.corpus, hit.row))


def convex(hits: Sequence[Hit], weight: float) -> list[Hit]:
    """The candidates of one corpus by both scores, best first: the cosine counts `weight` in 0..1 for each of them."""
    return fused(hits, [weight] * len(hits), "convex")


def reranked(hits: Sequence[Hit], scores: Floats) -> list[Hit]:
    """The list with its first ones in the order of their new scores [m], m <= n; the rest stay behind them."""
    first = [
        replace(hit, scores=replace(hit.scores, rerank=float(score)))
        for hit, score in zip(hits[: len(scores)], scores, strict=True)
    ]
    order = np.argsort(-scores, kind="stable")
    return [*(first[i] for i in order), *hits[len(scores) :]]


def collapsed(hits: Sequence[Hit], k: int) -> list[Hit]:
    """The hits less those that say almost the same as one before them, which counts them.

    The first `CLOSER` are looked at, and then as many as it takes to have `k`. Texts with other numbers are others.
    """
    kept: list[Hit] = []
    said: dict[tuple[str, ...], list[tuple[int, Shingles]]] = {}
    for place, hit in enumerate(hits):
        if place >= CLOSER and len(kept) >= k:
            return [*kept, *hits[place:]]
        text = hit.passages[0].text
        mine, others = shingles(text), said.setdefault(numbers(text), [])
        twin = next((at for at, theirs in others if same(mine, theirs)), None)
        if twin is None:
            others.append((len(kept), mine))
            kept.append(hit)
        else:
            kept[twin] = replace(kept[twin], alike=kept[twin].alike + 1)
    return kept


def spread(hits: Sequence[Hit], vectors: Vectors, k: int, diversity: float) -> list[Hit]:
    """`k` of the hits, each chosen for its place and for being unlike those before it.

    `vectors` [n, d] are unit vectors; `diversity` in 0..1 is what the likeness counts. Relevance falls by rank from 1.
    """
    left = list(range(len(hits)))
    relevance = 1 - np.arange(len(hits)) / max(1, len(hits))
    likeness = np.zeros(len(hits))
    chosen: list[Hit] = []
    while left and len(chosen) < k:
        worth = (1 - diversity) * relevance - diversity * likeness
        best = max(left, key=lambda i: worth[i])
        left.remove(best)
        chosen.append(replace(hits[best], scores=replace(hits[best].scores, mmr=float(worth[best]))))
        likeness = np.maximum(likeness, vectors @ vectors[best])
    return chosen


def _share(scores: Floats) -> Floats:
    """Scores as shares of the best one, whose least is 0 by theory: no stretching of a list of equals."""
    best = float(scores.max(initial=0.0))
    return np.maximum(scores, 0) / best if best > 0 else np.zeros(len(scores))


def _reciprocal(scores: Floats) -> Floats:
    """1 / (60 + rank) by falling score; nothing for a score of 0, which says that it was not found."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return np.where(scores > 0, 1 / (_FLAT + ranks), 0.0)
