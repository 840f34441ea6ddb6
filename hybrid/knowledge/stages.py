"""The stages of a search once the candidates are there: fusion, a closer look, copies, spreading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid.knowledge.corpus import Asked, Candidates, Corpus
from hybrid.knowledge.ranking import CLOSER, MANY, Hit, collapsed, fused, reranked, spread
from hybrid.knowledge.rerank import CrossEncoder, features
from hybrid.knowledge.tuned import Tuned
from hybrid.settings import RetrievalSettings


class Stages:
    """What makes one list of the candidates of one or more corpora."""

    def __init__(self, settings: RetrievalSettings) -> None:
        self._settings = settings
        self._cross = CrossEncoder(Path(settings.cross_encoder)) if settings.cross_encoder else None

    def ranked(self, asked: Asked, corpora: Sequence[Corpus], found: Sequence[Candidates], k: int) -> list[Hit]:
        """The `k` best of all candidates."""
        settings, learned = self._settings, [corpus.tuned() for corpus in corpora]
        weights = [self._weight(asked, *pair) for pair in zip(learned, found, strict=True) for _ in pair[1].hits]
        hits = fused([hit for one in found for hit in one.hits], weights, settings.fusion)
        ready = all(one.ready for one in found)
        if asked.text and ready:
            hits = self._closer(asked.text, learned, found, hits)
        if asked.said and settings.collapse and k <= MANY:
            hits = collapsed(hits, k)
        if not settings.mmr or len(hits) < 2 or not ready:
            return hits[:k]
        return self._spread(corpora, hits[: max(k, CLOSER)], k)

    def _weight(self, asked: Asked, tuned: Tuned, found: Candidates) -> float:
        """What the cosine counts: all of it where meaning alone is searched for, none where words alone are."""
        if not found.ready:
            return 0.0
        if not asked.text or not asked.dense:
            return float(not asked.text)
        return tuned.weight if self._settings.weight is None else self._settings.weight

    def _closer(self, text: str, learned: Sequence[Tuned], found: Sequence[Candidates], hits: list[Hit]) -> list[Hit]:
        """The first of them in the order of a closer look, where there is one."""
        if self._cross is not None:
            return reranked(hits, self._cross.scores(text, hits[:CLOSER]))
        if self._settings.rerank and len(learned) == 1 and learned[0].reranker:
            first = hits[:CLOSER]
            return reranked(hits, learned[0].reranker.scores(features(text, found[0].rarity, first)))
        return hits

    def _spread(self, corpora: Sequence[Corpus], hits: Sequence[Hit], k: int) -> list[Hit]:
        vectors = {c.name: c.vectors([hit.row for hit in hits if hit.corpus == c.name]) for c in corpora}
        kept = [hit for hit in hits if hit.row in vectors[hit.corpus]]
        return spread(kept, np.stack([vectors[hit.corpus][hit.row] for hit in kept]), k, self._settings.mmr)
