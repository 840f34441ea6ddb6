"""Which passages of a corpus a caller may find. It is settled before anything is ranked, so that no rank, no count and
no score tells of a document that is not theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.knowledge.filters import Matches
from hybrid.knowledge.store import About, Rows
from hybrid.types import Rights


@dataclass(frozen=True, eq=False, slots=True)
class Visible:
    """The documents that may be found, and the rows of the passages in them: int64, ascending."""

    documents: frozenset[str]
    rows: Rows


@dataclass(frozen=True, eq=False, slots=True)
class Holdings:
    """What a corpus holds at one revision: its documents, and as pairs which of them (`place`) names which passage."""

    revision: int
    documents: Sequence[str]
    abouts: Sequence[About]
    place: Rows
    rows: Rows

    def visible(self, rights: Rights, matches: Matches | None = None) -> Visible | None:
        """What this caller may find among the documents whose attributes match; None where that is all there is."""
        known: dict[tuple[str, tuple[str, ...]], bool] = {}
        seen = np.ones(len(self.documents), bool)
        for i, about in enumerate(self.abouts):
            key = (about.owner, about.groups)
            if key not in known:
                known[key] = rights.reads(*key)
            seen[i] = known[key] and (matches is None or matches(about.attributes))
        if seen.all():
            return None
        named = frozenset(name for name, can in zip(self.documents, seen, strict=True) if can)
        return Visible(named, np.unique(self.rows[seen[self.place]]))
