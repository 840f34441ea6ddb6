"""The stages of a search once the candidates are there: fusion, a closer look, copies, spreading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid.knowledge.corpus import Asked, Candidates, Corpus
from hybrid.knowledge.ranking import CLOSER, MANY, Hit, collapsed, fused, reranked, spread
from hybrid.knowledge.rerank import CrossEncoder, Shortlist
from hybrid.settings import RetrievalSettings


class Stages:
    """What makes one list of the candidates of one or more corpora."""

    def __init__(self, settings: RetrievalSettings) -> None:
        self._settings = settings
        self._cross = CrossEncoder(Path(settings.cross_encoder)) if settings.cross_encoder else None

    def shortlist(self, asked: Asked, corpora: Sequence[Corpus], found: Sequence[Candidates]) -> Shortlist:
        """The first stage: all candidates, fused."""
        method = self._settings.fusion
        weights = [self._weight(asked, *pair) for pair in zip(corpora, found, strict=True)]
        each = [weight for weight, one in zip(weights, found, strict=True) for _ in one.hits]
        hits = fused([hit for one in found for hit in one.hits], each, method)
        alone = method == "convex" and len(found) == 1
        # rows tell candidates apart within one corpus only
        reader = corpora[0].reader() if len(found) == 1 and asked.text and found[0].ready else None
        return Shortlist(asked.text, found[0].rarity, hits, weights[0] if alone else None, reader)

    def ranked(
        self,
        asked: Asked,
        corpora: Sequence[Corpus],
        found: Sequence[Candidates],
        k: int,
        first: Shortlist | None = None,
    ) -> list[Hit]:
        """The `k` best of all candidates; `first` is their `shortlist` where it is known already."""
        settings = self._settings
        first = self.shortlist(asked, corpora, found) if first is None else first
        ready = all(one.ready for one in found)
        hits = self._closer(asked.text, corpora, first) if asked.text and ready else first.hits
        if asked.said and settings.collapse and k <= MANY:
            hits = collapsed(hits, k)
        if not settings.mmr or len(hits) < 2 or not ready:
            return hits[:k]
        return self._spread(corpora, hits[: max(k, CLOSER)], k)

    def _weight(self, asked: Asked, corpus: Corpus, found: Candidates) -> float:
        """What the cosine counts: all of it where meaning alone is searched for, none where words alone are."""
        if not found.ready:
            return 0.0
        if not asked.text or not asked.dense:
            return float(not asked.text)
        return corpus.tuned().weight if self._settings.weight is None else self._settings.weight

    def _closer(self, text: str, corpora: Sequence[Corpus], first: Shortlist) -> list[Hit]:
        """The best of them in the order of a closer look, where there is one."""
        if self._cross is not None:
            return reranked(first.hits, self._cross.scores(text, first.hits[:CLOSER]))
        if self._settings.rerank and len(corpora) == 1 and (reranker := corpora[0].tuned().reranker):
            return reranked(first.looked, reranker.scores(first.rows))
        return first.hits

    def _spread(self, corpora: Sequence[Corpus], hits: Sequence[Hit], k: int) -> list[Hit]:
        vectors = {c.name: c.vectors([hit.row for hit in hits if hit.corpus == c.name]) for c in corpora}
        kept = [hit for hit in hits if hit.row in vectors[hit.corpus]]
        return spread(kept, np.stack([vectors[hit.corpus][hit.row] for hit in kept]), k, self._settings.mmr)
