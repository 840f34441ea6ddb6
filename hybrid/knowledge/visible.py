"""Which passages of a corpus a caller may find. It is settled before anything is ranked, so that no rank, no count and
no score tells of a document that is not theirs.

Rights and filters are asked once for each owner with its groups and each set of attributes there is, never once for
each document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.filters import Matches
from hybrid.knowledge.store import Holdings, Rows
from hybrid.types.rights import Rights


@dataclass(frozen=True, eq=False, slots=True)
class Visible:
    """The documents that may be found (`in` asks for one), and the rows of the passages in them: int64, ascending."""

    place: Mapping[str, int]
    seen: npt.NDArray[np.bool_]
    rows: Rows

    def __contains__(self, document: str) -> bool:
        at = self.place.get(document)
        return at is not None and bool(self.seen[at])


def shown(held: Holdings, rights: Rights, matches: Matches | None = None) -> Visible | None:
    """What this caller may find among the documents whose attributes match; None where that is all there is."""
    doors = np.array([rights.reads(owner, groups) for owner, groups in held.doors], bool)
    kinds = np.array([matches is None or matches(attributes) for attributes in held.attributes], bool)
    seen = doors[held.door] & kinds[held.kind]
    if seen.all():
        return None
    rows = held.rows[seen[held.at]]
    return Visible(held.place, seen, rows[np.diff(rows, prepend=-1) > 0])
