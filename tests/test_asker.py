"""Whom an evaluation asks: the same arms of a running server and of an engine of its own, wherever a task lies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server_kit import TOKEN, make_home, running, until
from training_kit import write_colours

from hybrid.boot import token_counter
from hybrid.errors import ModelNotFound
from hybrid.evaluation.asking import CALLER, Offer
from hybrid.knowledge.lending import lending, lent
from hybrid.lifecycle.asker import open_asker
from hybrid.models import materialise
from hybrid.rooms import Home, write_json

SAMPLING = {"max_tokens": 16, "temperature": 0}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere" / "colours"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": "colours", "metric": "accuracy", "instruction": ""}))
    return write_colours(folder, train=(0, 12), test=(200, 4))


def nothing_kept() -> Offer | None:
    return None


@pytest.mark.parametrize("served", [True, False], ids=["a running server", "an engine of its own"])
async def test_a_task_elsewhere_has_its_few_shot_arm(tmp_path: Path, elsewhere: Path, served: bool) -> None:
    settings = make_home(tmp_path / "home")
    model = materialise(settings.model, settings.cache)
    opened = open_asker(
        settings, model, lent={"colours": elsewhere}, kept=nothing_kept, told=lambda *_: None, embeds=False
    )

    async def ask() -> None:
        async with opened as asker:
            assert "few_shot:colours" in (await asker.offer()).models
            heard = await asker.ask("few_shot:colours", "item 200 is red", SAMPLING)
            assert (heard.error, heard.chosen) == (None, "few_shot:colours")
            counted = token_counter(model)("item 200 is red")
            assert heard.usage.prompt_tokens > 4 * counted, "the examples were shown"

    if not served:
        await ask()
        return
    async with running(settings) as server:
        write_json(settings.rooms.server_file, {"url": server.url, "pid": os.getpid(), "token": TOKEN})
        await ask()
        assert server.gateway.shelves.names() == [], "lent for the run alone"
        with pytest.raises(ModelNotFound, match="no examples of a task named 'colours'"):
            server.gateway.shelves.get("colours")

        def callers() -> list[str]:
            server.gateway.journal.flush()
            with server.gateway.state.transaction() as connection:
                return list(connection.exec_driver_sql("SELECT DISTINCT caller FROM decisions").scalars())

        await until(lambda: bool(callers()))  # the server notes a decision once its answer has left
        assert callers() == [CALLER], "its questions are no traffic"


async def test_rows_that_change_are_read_again(tmp_path: Path, elsewhere: Path) -> None:
    async with running(make_home(tmp_path / "home")) as server:
        with lending(server.settings.rooms, {"colours": elsewhere}):
            assert len(server.gateway.shelves.get("colours").messages) == 12
            write_colours(elsewhere, train=(0, 5))
            os.utime(elsewhere / "train.jsonl", (time.time() + 1, time.time() + 1))
            assert len(server.gateway.shelves.get("colours").messages) == 5


def test_what_a_dead_process_lent_is_gone(tmp_path: Path) -> None:
    home = Home(tmp_path)
    died = """
import os, sys
from pathlib import Path
from hybrid.knowledge.lending import lending
from hybrid.rooms import Home
with lending(Home(Path(sys.argv[1])), {"gone": Path(".")}):
    os._exit(0)
"""
    subprocess.run([sys.executable, "-c", died, str(tmp_path)], check=True)
    assert len(list((tmp_path / ".hybrid" / "lent").glob("*.json"))) == 1
    assert lent(home) == {}
    with lending(home, {"mine": tmp_path}):
        assert lent(home) == {"mine": tmp_path}
        assert len(list((tmp_path / ".hybrid" / "lent").glob("*.json"))) == 1, "the leftover is cleared away"
    assert lent(home) == {}
