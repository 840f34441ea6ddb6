"""The vectors of taught queries, embedded once and kept by the digest of their text: a second run finds them all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sqlalchemy import Column, Engine, LargeBinary, MetaData, String, Table, select
from sqlalchemy.dialects.sqlite import insert

from hybrid.gate.features import Embed, Vectors
from hybrid.state import open_sqlite

_schema = MetaData()
_vectors = Table("vectors", _schema, Column("key", String, primary_key=True), Column("vector", LargeBinary))

#: embedded before they are kept; and the most keys asked for at once
_BATCH = 512


def embedded(
    queries: Sequence[str],
    embed: Embed,
    embedder: str,
    cache: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> Vectors:
    """Unit vectors float32 [n, d] of queries. `embedder` is the digest of what `embed` embeds with.

    Equal texts are embedded once; what is done is kept under `cache` batch by batch, so a run that is cut short goes
    on where it was.
    """
    told = progress or (lambda _step, _done, _total: None)
    keys = [hashlib.sha256(f"{embedder}\n{query}".encode()).hexdigest()[:32] for query in queries]
    texts = dict(zip(keys, queries, strict=True))
    engine = open_sqlite(cache / "gate" / "vectors.db", _schema)
    try:
        found = _kept(engine, list(texts))
        missing = [key for key in texts if key not in found]
        for start in range(0, len(missing), _BATCH):
            told("embedding", start, len(missing))
            batch = missing[start : start + _BATCH]
            vectors = np.ascontiguousarray(embed([texts[key] for key in batch]), dtype=np.float32)
            found |= dict(zip(batch, vectors, strict=True))
            _keep(engine, dict(zip(batch, vectors, strict=True)))
    finally:
        engine.dispose()
    return np.stack([found[key] for key in keys])


def _kept(engine: Engine, keys: Sequence[str]) -> dict[str, Vectors]:
    found: dict[str, Vectors] = {}
    with engine.connect() as connection:
        for start in range(0, len(keys), _BATCH):
            query = select(_vectors).where(_vectors.c.key.in_(keys[start : start + _BATCH]))
            found |= {row.key: np.frombuffer(row.vector, dtype=np.float32) for row in connection.execute(query)}
    return found


def _keep(engine: Engine, vectors: dict[str, Vectors]) -> None:
    rows = [{"key": key, "vector": vector.tobytes()} for key, vector in vectors.items()]
    with engine.begin() as connection:
        connection.execute(insert(_vectors).on_conflict_do_nothing(), rows)
