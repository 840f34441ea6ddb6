"""`hybrid bench overload`: its load, its goals, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from server_kit import make_home

from hybrid.bench import generator, overload
from hybrid.bench.load import PATH
from hybrid.types import JSON


async def test_what_was_refused_for_now_is_told_apart_from_what_failed() -> None:
    asked: list[int] = []

    async def answer(_request: web.Request) -> web.Response:
        asked.append(1)
        status, headers = [(200, {}), (429, {"retry-after": "1"}), (503, {"retry-after": "1"}), (503, {})][
            len(asked) % 4
        ]
        return web.json_response({"choices": []}, status=status, headers=headers)

    app = web.Application()
    app.router.add_post(PATH, answer)
    async with TestServer(app) as server, aiohttp.ClientSession(str(server.make_url(""))) as session:
        told = await generator.press(session, {}, 0.01, 0.12)
    assert (len(told["answered"]), len(told["refused"]), told["failed"]) == (3, 6, 3)
    assert told["why"] == ['status 503: {"choices": []}']


def told(latencies: list[float], failed: int = 0) -> JSON:
    return {"latencies": latencies, "failed": failed, "why": ["late"] * bool(failed)}


def test_the_goals_are_about_both_keys() -> None:
    flood = {"answered": [1000.0] * 18 + [1500.0], "refused": [3.0, 900.0], "failed": 0, "why": []}
    facts = {"places": 2, "rate": 6.0, "seconds": 10.0}
    result = overload.tell(told([30.0, 40.0]), flood, told([30.0, 70.0]), told([50.0]), [2**20, 2**24], facts)
    assert [goal.value for goal in result.goals] == [0, 0.95, 900, 1.41, 1.74, 50, 15]
    assert all(goal.met for goal in result.goals)
    slow = overload.tell(told([30.0]), flood, told([90.0], 1), told([50.0]), [2**20, 2**28], facts)
    assert [goal.met for goal in slow.goals] == [False, True, True, True, False, True, False]
    nothing = overload.tell(told([]), flood, told([], 2), told([]), [2**20], facts)
    assert [goal.met for goal in nothing.goals] == [False, True]
    json.dumps(nothing.wire(), allow_nan=False)
    assert nothing.table()


async def test_a_small_run_floods_and_serves_the_other_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "ANSWER_S", 0.5)
    monkeypatch.setattr(overload, "AFTER_S", 0.4)
    settings = make_home(tmp_path / "home", server={"max_inflight_per_key": 4})
    monkeypatch.setenv("HYBRID_MODEL", settings.model)  # for the server that is started
    monkeypatch.setenv("HYBRID_SERVER__MAX_INFLIGHT_PER_KEY", "4")
    result = await overload.measure(settings, seconds=1, progress=lambda *_: None)
    rows = {row["requests"]: row for row in result.rows}
    assert {row["failed"] for row in result.rows} == {0}, result.summary["why"]
    assert rows["other key, alone"]["n"] == rows["other key, beside the flood"]["n"] == overload.NOW_AND_THEN
    assert rows["flood, answered"]["n"] + rows["flood, refused"]["n"] == result.summary["rate"] == 24
    assert rows["flood, answered"]["n"] >= 4
    assert rows["flood, refused"]["n"] >= 4
    assert rows["flood, answered"]["p50_ms"] >= 500
    assert rows["first key, afterwards"]["n"] == 2
