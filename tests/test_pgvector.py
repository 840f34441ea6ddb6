"""Vectors in PostgreSQL with pgvector, on a real server: what is ranked, and what a killed publication leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pg_kit import Postgres

from hybrid.errors import Refused
from hybrid.knowledge.pg import PgEngine


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.remove()


def points(count: int, dim: int = 16) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def best(vectors: np.ndarray, query: np.ndarray, k: int, only: np.ndarray) -> list[int]:
    return (only[np.argsort(-(vectors[only - 1] @ query), kind="stable")][:k]).tolist()


def publish(engine: PgEngine, folder: Path, number: int, rows: np.ndarray, vectors: np.ndarray, before=None):
    place = engine.publish(
        folder, before, number, vectors.shape[1], rows, lambda part: (np.array(part), vectors[np.array(part) - 1])
    )
    return engine.open(place, rows)


@pytest.mark.parametrize("exact_up_to", [10**9, 1000])
def test_many_rows_few_rights_and_a_graph(postgres: Postgres, tmp_path: Path, exact_up_to: int) -> None:
    vectors, engine = points(12_000), PgEngine(postgres.url, exact_up_to)
    everything = np.arange(1, len(vectors) + 1)
    index = publish(engine, tmp_path, 1, everything, vectors)
    most, few = everything[everything % 12 != 0], everything[::400]
    hits = 0
    for query in points(12_010)[-10:]:
        for only in (most, few):
            near = [row for row, _ in index.nearest(query, 10, only)]
            assert len(near) == 10
            assert set(near) <= set(only.tolist())
            hits += len(set(near) & set(best(vectors, query, 10, only)))
        near = index.nearest(query, 10)
        hits += len({row for row, _ in near} & set(best(vectors, query, 10, everything)))
        assert [score for _, score in near] == pytest.approx(
            [float(vectors[row - 1] @ query) for row, _ in near], abs=1e-5
        )
    assert hits == 300 if exact_up_to > len(vectors) else hits > 270
    assert index.nearest(points(1)[0], 5, np.empty(0, np.int64)) == []
    engine.tidy(tmp_path)
    engine.close()


def test_a_publication_that_never_became_current_is_taken_back(postgres: Postgres, tmp_path: Path) -> None:
    vectors, engine = points(40), PgEngine(postgres.url, 1000)
    query = vectors[30]
    first = publish(engine, tmp_path, 1, np.arange(1, 21), vectors)
    killed = publish(engine, tmp_path, 2, np.arange(11, 36), vectors, before=first)  # its publisher died here
    assert [row for row, _ in first.nearest(query, 30)] == best(vectors, query, 30, np.arange(1, 21))
    again = publish(engine, tmp_path, 2, np.arange(5, 32), vectors, before=first)
    assert [row for row, _ in again.nearest(query, 30)] == best(vectors, query, 30, np.arange(5, 32))
    assert [row for row, _ in first.nearest(query, 30)] == best(vectors, query, 30, np.arange(1, 21))
    with pytest.raises(Refused):
        killed.nearest(query, 5)
    third = publish(engine, tmp_path, 3, np.arange(1, 41), vectors, before=again)  # what went came again
    assert [row for row, _ in third.nearest(query, 50)] == best(vectors, query, 50, np.arange(1, 41))
    assert len(postgres.run(f"SELECT * FROM {third.place.table} WHERE died <= 1")) == 0
    engine.tidy(tmp_path)
    assert third.place.table not in postgres.tables()
    engine.close()
