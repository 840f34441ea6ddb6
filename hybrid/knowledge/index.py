"""The generations of one corpus: whole, immutable folders that can be built again from the store at any time.

`generations/<n>/` holds `vectors.faiss` with the row number at each of its positions, the index of words (`lexical.py`)
and, written last, `manifest.json` with the kind of the index and every file's size and SHA-256. Which generation is
current stands in the store, with the SHA-256 of its manifest, and is changed in one transaction.
FAISS loads a damaged file without complaint, so nothing is read before its sum is checked.

With a vector engine the vectors are published to it, and the manifest says where they lie.

While the vectors of a new corpus are still being made its generation holds the words alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrid.errors import Refused, StorageError
from hybrid.knowledge.embed import Vectors
from hybrid.knowledge.kinds import Near, renewed
from hybrid.knowledge.lexical import Words
from hybrid.knowledge.lexical import renewed as renewed_words
from hybrid.knowledge.pg import PgEngine, PgIndex, Place
from hybrid.knowledge.store import Meta, Rows, Store
from hybrid.rooms import publish, sha256_file, write_json
from hybrid.settings import RetrievalSettings
from hybrid.types import JSON

VECTORS = "vectors.faiss"
ROWS = "vectors.rows.npy"
WORDS = "words"
MANIFEST = "manifest.json"
#: the kind of an index that a vector engine holds
ENGINE = "pgvector"
#: the number of this layout; a generation of another one is built again
SCHEMA = 2
KEEP = 2  # the current generation, and the one that a reader may be opening

_NO_ROWS: Rows = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one search sees: a generation, and in memory the vectors committed after it (`fresh`).

    `revision` is the store's when this was taken (a publication counts as one itself). `last` is the highest row of
    the generation and `newer` are those after it, `embedded` the highest row whose vector is here. Unless it is
    `ready` some passages wait for their vectors, and words alone tell which of all are best.
    """

    generation: int
    revision: int
    last: int
    embedded: int = 0
    ready: bool = True
    near: Near | PgIndex | None = None
    fresh_rows: Rows = field(default_factory=lambda: _NO_ROWS)
    fresh: Vectors = field(default_factory=lambda: np.empty((0, 0), np.float32))
    words: tuple[Words, ...] = ()
    newer: Rows = field(default_factory=lambda: _NO_ROWS)

    @property
    def exact(self) -> bool:
        """Whether `nearest` tells the inner products themselves."""
        return not isinstance(self.near, Near) or self.near.exact

    def nearest(self, vector: Vectors, k: int, only: Rows | None = None) -> list[tuple[int, float]]:
        """The `k` rows of the highest inner product with `vector` [d], best first; ties by row number.

        With `only` no other rows are looked at: what a caller may not see takes no place in the ranking. Fewer than
        `k` come back only where there are no more. Raises NotReady and Refused where a vector engine is of no use.
        """
        found = [] if self.near is None else self.near.nearest(vector, k, only)
        if len(self.fresh_rows):
            products = self.fresh @ vector
            best = np.argsort(-products, kind="stable")
            best = best if only is None else best[np.isin(self.fresh_rows[best], only)]
            found += [(int(self.fresh_rows[i]), float(products[i])) for i in best[:k]]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))[:k]


def extended(snapshot: Snapshot, meta: Meta, store: Store) -> Snapshot:
    """`snapshot` with what was committed since; vectors only once none is still to be made."""
    ready = not store.is_waiting()
    rows, vectors = store.vectors(meta.dim, after=snapshot.embedded) if ready else (_NO_ROWS, snapshot.fresh)
    fresh = vectors if not len(snapshot.fresh_rows) else np.concatenate([snapshot.fresh, vectors[: len(rows)]])
    return Snapshot(
        generation=snapshot.generation,
        revision=meta.revision,
        last=snapshot.last,
        embedded=int(rows[-1]) if len(rows) else snapshot.embedded,
        ready=ready,
        near=snapshot.near,
        fresh_rows=np.concatenate([snapshot.fresh_rows, rows]),
        fresh=fresh,
        words=snapshot.words,
        newer=np.array(store.rows(after=snapshot.last), np.int64),
    )


def build(
    folder: Path, store: Store, settings: RetrievalSettings, engine: PgEngine | None = None, old: Snapshot | None = None
) -> int:
    """Publishes a new generation of all that the store holds, makes it current and returns its number.

    `old` is the current one as `load` gave it to the caller alone: it is changed in place, so that only what came is
    read. The caller holds the corpus's lock. A crash before the flip leaves a folder that nobody refers to; the next
    build sweeps it. Raises NotReady while a vector engine does not answer.
    """
    meta = _need(store.meta())
    rows, waits = np.array(store.rows(), np.int64), len(store.waiting())
    number = max([meta.generation, *_numbers(folder)], default=0) + 1
    held = _NO_ROWS if waits else rows
    words = renewed_words(old.words if old else (), store, rows, settings.exact_up_to)
    with publish(folder / str(number)) as staging:
        told = _laid(staging, number, held, store, meta, settings, engine, old.near if old else None)
        for place, part in enumerate(words):
            part.save(staging / WORDS / str(place))
        write_json(staging / MANIFEST, _manifest(staging, meta, told, rows, waits))
    with store.change() as change:
        change.flip(number, sha256_file(folder / str(number) / MANIFEST))
    _sweep(folder, number)
    if engine is not None:
        engine.tidy(folder.parent, told["table"])
    return number


def _laid(
    staging: Path,
    number: int,
    rows: Rows,
    store: Store,
    meta: Meta,
    settings: RetrievalSettings,
    engine: PgEngine | None,
    before: Near | PgIndex | None,
) -> JSON:
    """Lays the vectors of `rows` down: in files, or in a vector engine; says what they are."""
    if engine is None:
        near = renewed(before if isinstance(before, Near) else None, rows, store, meta.dim, settings)
        _write(near, staging)
        return {"kind": near.kind, "vectors": len(rows), "taught": near.taught, "positions": len(near.rows)}
    np.save(staging / ROWS, rows, allow_pickle=False)
    known, folder = before if isinstance(before, PgIndex) else None, staging.parent.parent
    place = engine.publish(folder, known, number, meta.dim, rows, lambda only: store.vectors(meta.dim, only=only))
    return {"kind": ENGINE, "vectors": len(rows), **asdict(place)}


def _write(near: Near, folder: Path) -> None:
    import faiss

    np.save(folder / ROWS, near.rows, allow_pickle=False)
    try:
        faiss.write_index(near.index, str(folder / VECTORS))
    except RuntimeError as error:  # the library's one exception, with errno's words in it
        raise StorageError(
            f"{folder.parent} cannot be written: {error}. Free some space and run the command again; what was "
            "committed is there, and is searched without it."
        ) from error


def load(folder: Path, meta: Meta, engine: PgEngine | None = None) -> Snapshot:
    """The current generation, every byte of it checked. Raises Refused saying what does not match.

    One that lies in a vector engine is opened, and the engine is not asked yet.
    """
    where, told = folder / str(meta.generation), manifest(folder, meta)
    try:
        for name, fact in told["files"].items():
            if (where / name).stat().st_size != fact["size"] or sha256_file(where / name) != fact["sha256"]:
                raise Refused(f"{where / name} is not the file that was published.")
        near = _opened(where, told, meta, engine)
        parts = sorted({int(name.split("/")[1]) for name in told["files"] if name.startswith(f"{WORDS}/")})
        words = tuple(Words.load(where / WORDS / str(part)) for part in parts)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise Refused(f"{where} cannot be read: {error}.") from error
    last, ready = int(told["watermark"]), not told["waiting"]
    revision = int(told["revision"]) + 1
    return Snapshot(meta.generation, revision, last, last if ready else 0, ready, near, words=words)


def manifest(folder: Path, meta: Meta) -> JSON:
    """What the current generation says of itself. Raises Refused when it is not what was published."""
    path = folder / str(meta.generation) / MANIFEST
    try:
        if sha256_file(path) != meta.manifest:
            raise Refused(f"{path} is not the one that was published.")
        told: JSON = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}.") from error
    if told["schema"] != SCHEMA:
        raise Refused(f"{path.parent} was written by another version of hybrid.")
    return told


def _opened(where: Path, told: JSON, meta: Meta, engine: PgEngine | None) -> Near | PgIndex:
    if (told["index"]["kind"] == ENGINE) is (engine is None):
        raise Refused(f"{where} belongs to another vector engine than the one that is set.")
    rows: Rows = np.load(where / ROWS, allow_pickle=False)
    return _read(where, told, meta, rows) if engine is None else engine.open(Place.read(told["index"]), rows)


def _read(where: Path, told: JSON, meta: Meta, rows: Rows) -> Near:
    import faiss

    # bounds for what a hostile header may ask for; the sum already says that we wrote it
    faiss.set_deserialization_vector_byte_limit(2 * told["files"][VECTORS]["size"] + (1 << 20))
    index: Any = faiss.read_index(str(where / VECTORS))
    if index.d != meta.dim or not index.ntotal == len(rows) == told["index"]["positions"]:
        raise Refused(f"{where / VECTORS} holds {index.ntotal} vectors of {index.d}, not those of its rows.")
    return Near(told["index"]["kind"], index, rows, int(told["index"]["taught"]))


def _manifest(staging: Path, meta: Meta, index: JSON, rows: Rows, waits: int) -> JSON:
    import faiss

    files = sorted(path for path in staging.rglob("*") if path.is_file())
    sums = {f.relative_to(staging).as_posix(): {"size": f.stat().st_size, "sha256": sha256_file(f)} for f in files}
    return {
        "schema": SCHEMA,
        "files": sums,
        "embedder": {"name": meta.embedder, "digest": meta.digest, "dim": meta.dim},
        "index": index,
        "passages": len(rows),
        "waiting": waits,
        "watermark": int(rows[-1]) if len(rows) else 0,
        "revision": meta.revision,
        "faiss": faiss.__version__,
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
