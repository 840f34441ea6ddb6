"""The FAISS generations of one corpus: whole, immutable folders that can be built again from the store at any time.

`generations/<n>/` holds `vectors.faiss`, the index of words (`lexical.py`) and, written last, `manifest.json` with
every file's size and SHA-256. Which generation is current stands in the store, with the SHA-256 of its manifest, and
is changed in one transaction.
FAISS loads a damaged file without complaint, so nothing is read before its sum is checked.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import Refused, StorageError
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.lexical import Words
from hybrid.knowledge.store import Meta, Rows, Store
from hybrid.rooms import publish, sha256_file, write_json

VECTORS = "vectors.faiss"
MANIFEST = "manifest.json"
KEEP = 2  # the current generation, and the one that a reader may be opening


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one search sees: a generation, and in memory the passages committed after it (`fresh`).

    `revision` is the store's when this was taken (a publication counts as one itself); `last` is the highest row
    number in it.
    """

    generation: int
    revision: int
    last: int
    index: Any = None
    fresh_rows: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    fresh: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    words: Words | None = None

    def __len__(self) -> int:
        return (self.index.ntotal if self.index is not None else 0) + len(self.fresh_rows)

    def nearest(self, vector: Vectors, k: int, only: Rows | None = None) -> list[tuple[int, float]]:
        """The `k` rows of the highest inner product with `vector` [d], best first; ties by row number.

        With `only` no other rows are looked at: what a caller may not see takes no place in the ranking.
        """
        found: list[tuple[int, float]] = []
        if self.index is not None:
            scores, rows = self.index.search(vector[None, :], min(k, self.index.ntotal), params=_among(only))
            found += [(int(r), float(s)) for r, s in zip(rows[0], scores[0], strict=True) if r >= 0]
        if len(self.fresh_rows):
            products = self.fresh @ vector
            best = np.argsort(-products, kind="stable")
            best = best if only is None else best[np.isin(self.fresh_rows[best], only)]
            found += [(int(self.fresh_rows[i]), float(products[i])) for i in best[:k]]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]


def _among(rows: Rows | None) -> Any:
    """FAISS's search parameters that leave every other row out."""
    if rows is None:
        return None
    import faiss

    parameters: Any = faiss.SearchParameters  # its types say that it takes nothing
    return parameters(sel=faiss.IDSelectorBatch(rows))


def extended(snapshot: Snapshot, meta: Meta, store: Store) -> Snapshot:
    """`snapshot` with what was committed since."""
    rows, vectors = store.vectors(meta.dim, after=snapshot.last)
    fresh = vectors if not len(snapshot.fresh_rows) else np.concatenate([snapshot.fresh, vectors])
    return Snapshot(
        generation=snapshot.generation,
        revision=meta.revision,
        last=int(rows[-1]) if len(rows) else snapshot.last,
        index=snapshot.index,
        fresh_rows=np.concatenate([snapshot.fresh_rows, rows]),
        fresh=fresh,
        words=snapshot.words,
    )


def build(folder: Path, store: Store) -> int:
    """Publishes a new generation of all that the store holds, makes it current and returns its number.

    The caller holds the corpus's lock. A crash before the flip leaves a folder that nobody refers to; the next build
    sweeps it.
    """
    import faiss

    meta = _need(store.meta())
    rows = np.array(store.rows(), np.int64)
    number = max([meta.generation, *_numbers(folder)], default=0) + 1
    index = _filled(folder, store, meta, rows)
    with publish(folder / str(number)) as staging:
        _write(index, staging / VECTORS)
        Words.stored(store, rows.tolist()).save(staging)
        write_json(staging / MANIFEST, _manifest(staging, meta, rows, faiss.__version__))
    with store.change() as change:
        change.flip(number, sha256_file(folder / str(number) / MANIFEST))
    _sweep(folder, number)
    return number


def _filled(folder: Path, store: Store, meta: Meta, rows: Rows) -> Any:
    """An index of exactly `rows`: the current generation's, less what went and with what came.

    Vectors of a row never change within a generation's life, so after one changed document one vector is read.
    """
    import faiss

    try:
        index = load(folder, meta).index
    except Refused:
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(meta.dim))
    held = faiss.vector_to_array(index.id_map)
    gone = np.setdiff1d(held, rows)
    if len(gone):
        index.remove_ids(gone)
    added, vectors = store.vectors(meta.dim, only=np.setdiff1d(rows, held).tolist())
    if len(added):
        index.add_with_ids(vectors, added)
    return index


def _write(index: Any, path: Path) -> None:
    import faiss

    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # the library's one exception, with errno's words in it
        raise StorageError(
            f"{path.parent.parent} cannot be written: {error}. Free some space and run the command again; what was "
            "committed is there, and is searched without it."
        ) from error


def load(folder: Path, meta: Meta) -> Snapshot:
    """The current generation, every byte of it checked. Raises Refused saying what does not match."""
    import faiss

    where = folder / str(meta.generation)
    try:
        if sha256_file(where / MANIFEST) != meta.manifest:
            raise Refused(f"{where / MANIFEST} is not the one that was published.")
        manifest = json.loads((where / MANIFEST).read_text(encoding="utf-8"))
        for name, fact in manifest["files"].items():
            if (where / name).stat().st_size != fact["size"] or sha256_file(where / name) != fact["sha256"]:
                raise Refused(f"{where / name} is not the file that was published.")
        # bounds for what a hostile header may ask for; the sum above already says that we wrote it
        faiss.set_deserialization_vector_byte_limit(2 * manifest["files"][VECTORS]["size"] + (1 << 20))
        index = faiss.read_index(str(where / VECTORS))
        words = Words.load(where)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Refused(f"{where} cannot be read: {error}.") from error
    if index.d != meta.dim or index.ntotal != manifest["passages"]:
        raise Refused(f"{where / VECTORS} holds {index.ntotal} vectors of {index.d}, not what its manifest says.")
    return Snapshot(meta.generation, int(manifest["revision"]) + 1, int(manifest["watermark"]), index, words=words)


def _manifest(staging: Path, meta: Meta, rows: Rows, faiss_version: str) -> dict[str, Any]:
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(staging.iterdir())}
    return {
        "schema": 1,
        "files": files,
        "embedder": {"name": meta.embedder, "digest": meta.digest, "dim": meta.dim},
        "passages": len(rows),
        "watermark": int(rows[-1]) if len(rows) else 0,
        "revision": meta.revision,
        "faiss": faiss_version,
    }


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdecimal())


def _sweep(folder: Path, current: int) -> None:
    """Removes what a crash left and all generations but the newest; one that is being read is in memory already."""
    old = [folder / str(n) for n in _numbers(folder) if n <= current - KEEP]
    for path in [*old, *folder.glob(".staging-*")]:
        with contextlib.suppress(OSError):
            shutil.rmtree(path)


def _need(meta: Meta | None) -> Meta:
    if meta is None:
        raise Refused("The corpus was never ingested; index a folder into it first.")
    return meta
