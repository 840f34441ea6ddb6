"""The kinds of FAISS index that hold a corpus's vectors, chosen by how many there are.

`flat` looks at every vector: exact, and nothing to build. `hnsw` walks a graph of neighbours (Malkov & Yashunin 2018,
arXiv 1603.09320): a search hardly grows with the corpus, for more memory and a build that takes its time. `ivfpq`
keeps a byte for eight numbers (Jégou, Douze & Schmid 2011, "Product quantization for nearest neighbor search"), a
thirtieth of the memory; what it finds is measured again by the vectors in the store.

A vector stands at a position, and `rows` says which passage that is. The flat kind forgets what went; of the others
it stays, is never returned by the store, and is gone with the next whole build.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.store import Rows
from hybrid.settings import RetrievalSettings

Kind = Literal["flat", "hnsw", "ivfpq"]

#: neighbours that a passage keeps in the graph, and how many are looked at to find them
LINKS, CARE = 32, 80
#: passages that a walk through the graph keeps in sight
SIGHT = 128
#: where fewer than this share may be found a walk meets too few of them, and so it does where more than `FAR` are
#: asked for: all that may be found are looked at
NARROW, FAR = 0.1, 1_000
#: lists of compressed vectors that are read, and how many times more are taken from them than are asked for
PROBES, REFINE = 64, 4
#: so many vectors teach a list its middle
_TEACH = 64
#: a code has 256 values, which are learned from as many vectors at least
CODES = 256
#: an index is built anew once so much of it is gone
WORN = 0.1
#: vectors read from the store at once
_PART = 10_000


class Source(Protocol):
    """Where vectors come from: a `Store`."""

    def vectors(self, dim: int, *, after: int = 0, only: Sequence[int] | None = None) -> tuple[Rows, Vectors]: ...


@dataclass(frozen=True, eq=False, slots=True)
class Near:
    """A FAISS index and the row number at each of its positions: int64 [n]. `taught` is how many vectors it was built
    of: the compressed kind learned its codes from them."""

    kind: Kind
    index: Any
    rows: Rows
    taught: int

    @property
    def exact(self) -> bool:
        """Whether its scores are the inner products, and not estimates of them."""
        return self.kind != "ivfpq"

    def nearest(self, vector: Vectors, k: int, only: Rows | None = None) -> list[tuple[int, float]]:
        """The `k` rows of the highest inner product with `vector` [d], best first, or as many as there are.

        With `only` no other rows are looked at. Fewer than `k` come back only where there are no more.
        """
        seen = None if only is None else np.isin(self.rows, only)
        count = len(self.rows) if seen is None else int(np.count_nonzero(seen))
        k = min(k, count)
        if k == 0:
            return []
        at, scores = np.empty(0, np.int64), np.empty(0, np.float32)
        for index, parameters in self._ways(k, count, seen):
            found, places = index.search(vector[None, :], k, params=parameters)
            at, scores = places[0], found[0]
            if (at >= 0).all():
                break
        there = at >= 0
        return list(zip(self.rows[at[there]].tolist(), scores[there].tolist(), strict=True))

    def _ways(self, k: int, count: int, seen: npt.NDArray[np.bool_] | None) -> Iterator[tuple[Any, Any]]:
        """What to search and how, the quickest first; the last one misses nothing."""
        faiss = _faiss()
        among: dict[str, Any] = {}
        if seen is not None:
            among["sel"] = faiss.IDSelectorBitmap(np.packbits(seen, bitorder="little"))
        share = count / len(self.rows)
        if self.kind == "flat":
            yield self.index, faiss.SearchParameters(**among)
        elif self.kind == "hnsw":
            if share >= NARROW and k <= min(FAR, count // 2):
                yield self.index, faiss.SearchParametersHNSW(efSearch=math.ceil(max(SIGHT, 2 * k) / share), **among)
            yield faiss.downcast_index(self.index.storage), faiss.SearchParameters(**among)
        else:
            lists = int(self.index.nlist)
            yield self.index, faiss.SearchParametersIVF(nprobe=min(lists, math.ceil(PROBES / share)), **among)
            yield self.index, faiss.SearchParametersIVF(nprobe=lists, **among)

    def without(self, gone: Rows) -> Near:
        """Takes rows out of a flat index, in place."""
        out = np.isin(self.rows, gone)
        self.index.remove_ids(np.flatnonzero(out))
        return replace(self, rows=self.rows[~out])

    def plus(self, rows: Rows, vectors: Vectors) -> Near:
        """Puts vectors [n, d] in, in place."""
        self.index.add(vectors)
        return replace(self, rows=np.concatenate([self.rows, rows]))

    def worn(self, gone: int, left: int) -> bool:
        """Whether it should be built anew: too much of it is gone, or it learned its codes from less than half."""
        if self.kind == "flat":
            return False
        return gone > WORN * len(self.rows) or (self.kind == "ivfpq" and left > 2 * self.taught)


def kind_of(count: int, settings: RetrievalSettings) -> Kind:
    """The kind for so many vectors."""
    if count <= settings.exact_up_to:
        return "flat"
    return "hnsw" if count <= settings.graph_up_to or count < CODES else "ivfpq"


def renewed(near: Near | None, rows: Rows, source: Source, dim: int, settings: RetrievalSettings) -> Near:
    """An index of exactly `rows` as far as its kind can forget; made of `near`, in place, where that can be.

    A row's vector never changes within an index's life, so after one changed document one vector is read.
    """
    kind = kind_of(len(rows), settings)
    gone = np.empty(0, np.int64) if near is None else np.setdiff1d(near.rows, rows)
    if near is None or near.kind != kind or near.worn(len(gone), len(rows)):
        near = _empty(kind, rows, source, dim)
    elif kind == "flat" and len(gone):
        near = near.without(gone)
    new = np.setdiff1d(rows, near.rows)
    for start in range(0, len(new), _PART):
        near = near.plus(*source.vectors(dim, only=new[start : start + _PART].tolist()))
    return near


def _empty(kind: Kind, rows: Rows, source: Source, dim: int) -> Near:
    """An index that holds nothing yet; a compressed one has learned its codes from a sample of `rows`."""
    faiss, none = _faiss(), np.empty(0, np.int64)
    if kind == "flat":
        return Near(kind, faiss.IndexFlatIP(dim), none, len(rows))
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = CARE
        return Near(kind, index, none, len(rows))
    lists = max(1, round(2 * math.sqrt(len(rows))))
    span = next(size for size in (8, 4, 2, 1) if dim % size == 0)
    # np: no polysemous codes, which take minutes and serve another way of searching
    index = faiss.index_factory(dim, f"IVF{lists},PQ{dim // span}np", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # it would print what it thinks of few
    sample = min(len(rows), _TEACH * max(lists, CODES))
    chosen = np.sort(np.random.default_rng(0).choice(rows, sample, replace=False))
    index.train(source.vectors(dim, only=chosen.tolist())[1])
    return Near(kind, index, none, len(rows))


def _faiss() -> Any:
    """FAISS, whose published types lack much of it."""
    import faiss

    return faiss
