"""Searches and learning curves: what they find out, and that they go on where they were cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import hybrid
from tiny_model import make_tiny_model
from training_kit import write_colours

from hybrid.errors import BadRequest
from hybrid.knowledge.embed import Embedder
from hybrid.models import materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.training.data import read_dataset
from hybrid.training.job import Fitted, Job
from hybrid.training.loop import Watch
from hybrid.training.recipes import Recipe
from hybrid.training.study import predicted, tuned

SETS = ["rank=4", "alpha=8", "learning_rate=1e-2", "batch_size=8", "precision=float32", "epochs=2"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "colours"
    folder.mkdir()
    return write_colours(folder, train=(0, 80), dev=(100, 12))


@pytest.fixture
def job(task: Path, tmp_path: Path) -> Job:
    embedding = materialise(DEFAULT_EMBEDDER, Settings.load().cache)
    folder = tmp_path / "run"
    folder.mkdir()
    return Job(
        data=read_dataset(task), recipe=Recipe(method="lora", learning_rate=1e-3, rank=16), model=embedding,
        watch=Watch(lambda **_: None), embedder=Embedder(embedding.path, embedding.name), name="colours", folder=folder,
    )  # fmt: skip


class Valley:
    """A method whose dev loss is least at a rate of 3e-3, told at ten steps of each run; it counts its runs."""

    def __init__(self, *, fail_at: int = 0) -> None:
        self.runs: list[Recipe] = []
        self._fail_at = fail_at

    def __call__(self, job: Job) -> Fitted:
        self.runs.append(job.recipe)
        if len(self.runs) == self._fail_at:
            raise KeyboardInterrupt
        loss = 1 + abs(job.recipe.learning_rate - 3e-3) * 100
        for step in range(1, 11):
            job.watch.progress(step=step, steps=10, dev_loss=loss + 1 / step)
        return Fitted({"dev_loss": loss}, [], lambda _: {})


def test_a_search_ends_at_a_better_recipe_than_it_began_with(job: Job) -> None:
    valley = Valley()
    recipe, told = tuned(job, valley, 12)
    assert valley.runs[0].learning_rate == job.recipe.learning_rate
    assert abs(recipe.learning_rate - 3e-3) < abs(job.recipe.learning_rate - 3e-3)
    assert recipe.alpha == 2 * recipe.rank
    assert told["trials"] == 12
    assert told["pruned"] > 0
    assert told["best"]["learning_rate"] == recipe.learning_rate


def test_a_search_that_was_cut_off_does_not_begin_again(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(job, Valley(fail_at=4), 6)
    rest = Valley()
    tuned(job, rest, 6)
    assert len(rest.runs) == 3


def test_a_search_without_a_number_says_what_to_do(job: Job) -> None:
    def fails(_: Job) -> Fitted:
        raise BadRequest("The loss is no number any more.")

    with pytest.raises(BadRequest, match="lower learning_rate"):
        tuned(replace(job, folder=None), fails, 1)


@pytest.mark.parametrize(("floor", "exponent"), [(0.0, 0.5), (0.3, 0.8), (1.0, 0.2)])
def test_the_curve_goes_on_as_the_power_law_it_came_from(floor: float, exponent: float) -> None:
    def loss(rows: float) -> float:
        return floor + 5 * rows**-exponent

    ahead = predicted([{"rows": rows, "dev_loss": loss(rows)} for rows in (100, 300, 1000)])
    assert [point["rows"] for point in ahead] == [2000, 4000]
    assert [point["dev_loss"] for point in ahead] == pytest.approx([loss(2000), loss(4000)], abs=2e-5)


@pytest.mark.parametrize("losses", [(1.0, 1.1, 0.9), (1.0, 0.9, 0.1), (1.0, 1.0, 1.0)])
def test_no_law_is_read_into_points_that_follow_none(losses: tuple[float, ...]) -> None:
    points = [{"rows": rows, "dev_loss": loss} for rows, loss in zip((100, 300, 1000), losses, strict=True)]
    assert predicted(points) == []


def test_the_card_tells_of_the_search_and_of_what_more_data_would_bring(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HYBRID_MODEL", str(make_tiny_model(tmp_path / "tiny").path))
    monkeypatch.setenv("HYBRID_HOME", str(home))
    arguments = [word for pair in SETS for word in ("--set", pair)]
    done = hybrid(home, "train", str(task), "--json", "--tune", "2", "--growth", *arguments)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    card = json.loads((Path(told["path"]) / "card.json").read_text())
    assert card["tuned"]["trials"] == 2
    assert card["recipe"]["learning_rate"] == card["tuned"]["best"]["learning_rate"]
    assert [point["rows"] for point in card["growth"]["points"]] == [8, 24, 80]
    assert card["growth"]["points"][-1]["dev_loss"] == told["metrics"]["dev_loss"]
    for picture in ("curve.png", "growth.png"):
        assert (Path(told["path"]) / picture).read_bytes().startswith(b"\x89PNG")
