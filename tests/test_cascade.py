"""A cheap arm is tried first: it answers where it is sure of itself, and else the arm that the gate chose does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from server_kit import Running, make_home, running

from hybrid.gate.choose import fit
from hybrid.gate.model import Scores
from hybrid.gate.outcomes import Lessons
from hybrid.gate.policy import Policy
from hybrid.gate.published import promote, publish_learned
from hybrid.knowledge.embed import Embedder
from hybrid.models import materialise
from hybrid.settings import GateSettings, Settings
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.request import Knobs

SUMS = [f"Work out the answer.\n\n{a} boxes hold {b} {thing} each. How many {thing} are there?"
        for a in (3, 7, 12, 25) for b in (4, 9, 30) for thing in ("pens", "apples", "coins")]  # fmt: skip
ASKED = "Work out the answer.\n\n8 boxes hold 15 lemons each. How many lemons are there?"
DEAR = Arm("few_shot", ("sums",))


def taught_home(home: Path, **gate: Any) -> Settings:
    """A home whose gate knows that worked examples answer sums best, and that they cost seven prompts."""
    settings = make_home(home, gate={"deadline_ms": 20_000, **gate})
    files = materialise(settings.embedder, settings.cache)
    embedder = Embedder(files.path, files.name)
    n = len(SUMS)
    table = Lessons(
        ids=tuple(map(str, range(n))), queries=tuple(SUMS), groups=("sums",) * n, arms=(str(PROMPT), str(DEAR)),
        score=np.tile([0.6, 0.9], (n, 1)), cost=np.tile([100.0, 700.0], (n, 1)),
    )  # fmt: skip
    learned = fit("knn", table, embedder.embed(SUMS))
    promote(settings.rooms, "gate", publish_learned(settings.rooms, "gate", learned, embedder.query_digest, {}))
    shutil.copytree(ROOT / "eval/tasks/tickets", settings.rooms.tasks / "sums")
    return settings


async def ask(server: Running, **more: Any) -> tuple[dict[str, Any], Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": ASKED}], "hybrid": {"explain": True}, **more}
    status, told, headers = await server.post("/v1/chat/completions", body)
    assert status == 200, told
    return told, headers


@pytest.mark.parametrize(("cascade", "arm"), [(1e-9, str(PROMPT)), (1.0, str(DEAR))])
async def test_the_cheap_arm_answers_only_where_it_is_sure(tmp_path: Path, cascade: float, arm: str) -> None:
    async with running(taught_home(tmp_path, cascade=cascade)) as server:
        told, headers = await ask(server)
        assert headers["x-hybrid-selected-arm"] == arm
        assert told["hybrid"]["drafts"][0]["arm"] == str(PROMPT)
        assert "sure" in told["hybrid"]["reason"]
        asked = [r for r in (await server.engine_log())["requests"] if "lemons" in str(r["body"])]
        assert len(asked) == (1 if arm == str(PROMPT) else 2)
        assert told["usage"]["completion_tokens"] > 0
        assert told["choices"][0]["message"]["content"]
        stored = (await server.get(f"/v1/decisions/{headers['x-hybrid-decision-id']}"))[1]
        assert stored["arm"] == arm


async def test_what_an_attempt_cannot_answer_goes_to_the_chosen_arm_at_once(tmp_path: Path) -> None:
    async with running(taught_home(tmp_path, cascade=1e-9)) as server:
        told, headers = await ask(server, n=2)
        assert headers["x-hybrid-selected-arm"] == str(DEAR)
        assert len(told["choices"]) == 2
        stream = await server.client().chat.completions.create(
            model="auto", messages=[{"role": "user", "content": ASKED}], stream=True
        )
        words = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(words)


def test_only_an_arm_worth_trying_is_tried() -> None:
    def first(by_arm: dict[Arm, float], cascade: float = 0.8) -> Arm | None:
        costs = {PROMPT: 100.0, DEAR: 700.0, Arm("head", ("a",)): 5.0}
        scores = Scores(by_arm, stranger=0.0, costs=costs)
        return Policy(GateSettings(cascade=cascade)).choose(scores, allowed=lambda _: True, knobs=Knobs()).first

    head = Arm("head", ("a",))
    assert first({PROMPT: 0.7, DEAR: 1.0}) == PROMPT
    assert first({PROMPT: 0.7, head: 0.8, DEAR: 1.0}) == head
    assert first({PROMPT: 0.4, DEAR: 1.0}) is None  # it would most likely be asked in vain
    assert first({PROMPT: 1.0, DEAR: 0.9}) is None  # nothing is cheaper
    assert first({PROMPT: 0.7, DEAR: 1.0}, cascade=0.0) is None
