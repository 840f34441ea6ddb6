"""What the gate looks at: how near a request is to each arm's own material, measured against that material itself.

An adapter is known by its training messages (two views: with the instruction and without), `prompt` by general
requests, a corpus by its passages. Every number is relative to the arm's own: a cosine of 0.5 is near for a varied
adapter and far for a narrow one. That is why the weights can be shared by all arms of a kind, and why an arm enrolled
after training is routable at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hybrid.gate.lexicon import bare_input, is_question, rarity, words
from hybrid.types.passage import Passage

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]
Search = Callable[[Vectors, int], Sequence[Passage]]
Embed = Callable[[Sequence[str]], Vectors]

NEAREST = 5
PASSAGES = 3
#: the columns of each kind's feature matrix, in order; a published gate is refused when they differ
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "messages": ("bias", "place", "mean5", "top1", "deviation", "words", "cues", "length"),
    "passages": ("bias", "top1", "mean3", "surprise", "overlap", "question", "length"),
    "general": ("mean5", "top1"),
    "glance": ("bias", "words", "cues", "length", "template"),
}
#: where little is known, an arm is assumed to look like this: cosine of its own, their spread, cosine of strangers
_OWN, _SPREAD, _FAR = 0.6, 0.1, 0.15
_PRIOR_COUNT = 5
#: examples made from few patterns lie closer together than what will be asked: no arm is taken to be tighter than this
_TIGHTEST = 0.055


def closeness(similarity: Vectors, k: int = NEAREST) -> tuple[Numbers, Numbers]:
    """The best and the mean of the `k` best of each row of cosines [rows, n]; -1 where a row has none.

    Entries of -inf are left out (a prototype must not be its own neighbour).
    """
    top, mean = _closeness([similarity], k)
    return top[:, 0], mean[:, 0]


def _closeness(similarity: Sequence[Vectors], k: int = NEAREST) -> tuple[Numbers, Numbers]:
    """`closeness` of many matrices with the same rows at once: each [rows, matrices]."""
    best = np.full((len(similarity[0]), len(similarity), k), -np.inf)
    for place, cosines in enumerate(similarity):
        n = cosines.shape[1]
        many = min(k, n)
        if many:
            best[:, place, :many] = np.partition(cosines, n - many, axis=1)[:, n - many :]
    usable = np.isfinite(best)
    count = usable.sum(axis=2)
    mean = np.where(usable, best, 0.0).sum(axis=2) / np.maximum(count, 1)
    return np.where(count > 0, best.max(axis=2), -1.0), np.where(count > 0, mean, -1.0)


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """One way an arm's requests look. `vectors` [n, d]; `own`, `spread` describe how near they lie to one another
    (leave-one-out mean of five), `far` how near general requests come."""

    vectors: Vectors
    own: float = _OWN
    spread: float = _SPREAD
    far: float = _FAR

    @classmethod
    def of(cls, vectors: Vectors) -> View:
        """Measures a view. With few vectors the measured numbers lean on common ones."""
        n = len(vectors)
        if n < 2:
            return cls(vectors)
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)
        _, mean = closeness(similarity)
        trust = n / (n + _PRIOR_COUNT)
        own = trust * float(mean.mean()) + (1 - trust) * _OWN
        spread = trust * float(mean.std()) + (1 - trust) * _SPREAD
        return cls(vectors, own, max(spread, _TIGHTEST))

    def against(self, strangers: Vectors | None) -> View:
        """The same view, measured against general requests [m, d]."""
        if strangers is None or not len(strangers):
            return self
        far = float(closeness(strangers @ self.vectors.T)[1].mean())
        return replace(self, far=min(far, self.own - 0.1))


def message_features(views: Sequence[View], similarity: Sequence[Vectors]) -> Numbers:
    """[rows, views, 4]: how near a request comes to each view of adapters' messages.

    `similarity[i]` is [rows, n of view i]. `place` is 0 where general requests lie and 1 where the arm's own do;
    `deviation` counts spreads from its own.
    """
    own, far, spread = np.array([(view.own, view.far, view.spread) for view in views]).T
    top, mean = _closeness(similarity)
    place = np.clip((mean - far) / (own - far), -0.5, 1.5)
    deviation = np.clip((mean - own) / spread, -12, 2)
    return np.stack([4 * place, 4 * mean, 4 * top, deviation / 2], axis=2)


def fitting(near: Numbers, views: npt.NDArray[np.intp]) -> Numbers:
    """[rows, arms, 4] of `message_features` [rows, views, 4]: for each arm those of the view that a request fits
    better. `views` [arms, most] are the places of its views, one of them repeated where it has fewer."""
    fit = (2 * near[:, :, 0] + near[:, :, 3])[:, views].argmax(axis=2)
    chosen = views[np.arange(len(views)), fit]
    return np.take_along_axis(near, chosen[:, :, None], axis=1)


def general_features(similarity: Vectors) -> Numbers:
    """[rows, 2] for `prompt`: nearness to general requests."""
    top, mean = closeness(similarity)
    return np.column_stack([4 * mean, 4 * top])


def form_features(queries: Sequence[str]) -> Numbers:
    """[rows, 2]: whether the request is a question, and its length (0 at ten words, 1 at a hundred)."""
    return np.array([[float(is_question(bare_input(q))), _length(bare_input(q))] for q in queries], dtype=np.float64)


def _length(text: str) -> float:
    return math.log10(max(len(text.split()), 1) / 10)


@dataclass(frozen=True, eq=False, slots=True)
class Corpus:
    """A corpus as the gate knows it: a sample of its passages with their vectors [n, d], how rare each word is in
    them, and how near general requests come (`far`, `spread`). `search` asks the whole corpus."""

    passages: tuple[Passage, ...]
    vectors: Vectors
    rarity: Mapping[str, float]
    far: float = 0.3
    spread: float = 0.08
    search: Search | None = None

    @classmethod
    def of(cls, passages: Sequence[Passage], vectors: Vectors, search: Search | None = None) -> Corpus:
        """A corpus by its passages, all or a sample, and their unit vectors [n, d]."""
        seen = rarity(f"{p.title} {p.text}" for p in passages)
        return cls(tuple(passages), vectors, seen, search=search)

    def against(self, strangers: Vectors | None) -> Corpus:
        """The same corpus, measured against general requests [m, d]."""
        if strangers is None or not len(strangers) or not len(self.vectors):
            return self
        top, _ = closeness(strangers @ self.vectors.T)
        return replace(self, far=float(top.mean()), spread=max(float(top.std()), 0.03))

    def retrieve(self, vector: Vectors) -> tuple[Passage, ...]:
        """The passages nearest to one vector [d], best first, with their cosines as scores."""
        if self.search is not None:
            return tuple(self.search(vector, PASSAGES))
        return self.nearest(vector @ self.vectors.T)

    def nearest(self, similarity: Vectors) -> tuple[Passage, ...]:
        """The sampled passages with the best of the cosines [n], best first."""
        k = min(PASSAGES, len(similarity))
        if not k:
            return ()
        best = np.argpartition(-similarity, k - 1)[:k]
        order = best[np.argsort(-similarity[best], kind="stable")]
        return tuple(_scored(self.passages[i], float(similarity[i])) for i in order)

    def overlap(self, query: str, passages: Sequence[Passage]) -> float:
        """The share of the query's words, weighted by rarity, that the best of the passages holds; 0 to 1."""
        asked = words(bare_input(query))
        unseen = math.log(1 + max(len(self.passages), 1))
        total = sum(self.rarity.get(w, unseen) for w in asked)
        if not total or not passages:
            return 0.0
        found = (sum(self.rarity.get(w, unseen) for w in asked & words(f"{p.title} {p.text}")) for p in passages)
        return max(found) / total


def passage_features(corpus: Corpus, query: str, form: Numbers, found: Sequence[Passage]) -> Numbers:
    """[7] for a corpus and one request, from the passages found. `surprise` is in spreads of general requests."""
    found = found[:PASSAGES]
    scores = [p.score for p in found] or [-1.0]
    surprise = float(np.clip((scores[0] - corpus.far) / corpus.spread, -2, 8)) / 2
    overlap = corpus.overlap(query, found)
    return np.array([1.0, 4 * scores[0], 4 * float(np.mean(scores)), surprise, 4 * overlap, *form])


def _scored(passage: Passage, score: float) -> Passage:
    return replace(passage, score=score)
