"""A piece of a corpus, and what the stages of a search made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid.types import JSON


@dataclass(frozen=True, slots=True)
class Scores:
    """What each stage of a search made of a passage: the cosine, BM25 (0 where no word is shared), the two together,
    the closer look, and what made it the next one that is unlike those before it (None where a stage is off)."""

    dense: float
    lexical: float = 0.0
    fused: float = 0.0
    rerank: float | None = None
    mmr: float | None = None

    def wire(self) -> JSON:
        """As a search shows them."""
        values = {name: getattr(self, name) for name in ("dense", "lexical", "fused", "rerank", "mmr")}
        return {name: None if value is None else round(value, 4) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a corpus. `score` is the cosine similarity to the query, -1 to 1 (0 where none was asked); `alike` is
    how many others that were found say almost the same and are left out."""

    id: str
    title: str
    text: str
    score: float = 0.0
    corpus: str = ""
    document: str = ""
    scores: Scores | None = field(default=None, compare=False)
    alike: int = field(default=0, compare=False)
