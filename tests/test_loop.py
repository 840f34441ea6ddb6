"""The circle without hands: what is published is measured, a gate is taught with it, compared, and serves; what people
say of answers moves it; a logged decision can be made again by another version."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from adapters_kit import filling
from filelock import FileLock
from gate_kit import BOOKS, GARDEN_TASK, LIBRARY_TASK, ORDERS, PLANTS, TROUBLES
from server_kit import TOKEN, Running, chat, make_home, running, until
from typer.testing import CliRunner

from hybrid.adapters.preflight import read_base
from hybrid.cli import app
from hybrid.errors import Conflict
from hybrid.gate.bandit import Bandit
from hybrid.gate.feedback import Rewards
from hybrid.gate.outcomes import read_outcomes
from hybrid.gate.published import FEEDBACK, live_version, rollback
from hybrid.gate.teach import teach
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.lifecycle.loop import Round, loop_once
from hybrid.lifecycle.looping import Looping
from hybrid.lifecycle.replay import open_desk
from hybrid.rooms import write_json

GARDEN = [t.format(p) for t in TROUBLES for p in PLANTS]
BORROW = [t.format(b) for t in ORDERS for b in BOOKS]
TASKS = {"garden": (GARDEN_TASK, GARDEN), "library": (LIBRARY_TASK, BORROW)}
#: rows that an adapter is shown, of fifty; the next twenty are its dev rows, the last ten nobody knows
SHOWN, DEV = 20, 40

pytestmark = pytest.mark.asyncio(loop_scope="module")


def publish(server: Running, name: str, embedder: Embedder) -> None:
    """An adapter that answers its task's rows right, and brings dev rows."""
    instruction, inputs = TASKS[name]
    base = read_base(Path(server.settings.model), server.gateway.loader._base.sha256)
    pairs = [(text, f"{name} {i}") for i, text in enumerate(inputs[:DEV])]
    shelf = Shelf.embedded(name, instruction, pairs, embedder, server.settings.rooms.hidden / "cache")

    def fill(staging: Path) -> dict[str, Any]:
        card = filling(base, {"instruction": instruction, "metric": "accuracy", "task": name}, seed=len(name))(staging)
        shelf.write(staging)
        rows = [{"id": f"{name}-{i}", "input": pairs[i][0], "reference": pairs[i][1]} for i in range(SHOWN, DEV)]
        (staging / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return card

    server.gateway.store.publish(name, fill)


async def arrive(server: Running, name: str, embedder: Embedder) -> None:
    """Publishes an adapter and waits until the gate knows it: nobody has to do anything for that."""
    await asyncio.to_thread(publish, server, name, embedder)
    await server.gateway.load_adapter(f"{name}@1", None)
    await until(lambda: f"adapter:{name}" in map(str, server.gateway.decider.gate.arms()))


async def turn(server: Running, budget: float = 5.0) -> Round:
    return await loop_once(server.settings, budget, lambda *_: None)


async def route(server: Running, name: str, row: int = -1) -> dict[str, Any]:
    instruction, inputs = TASKS[name]
    _, body, _ = await server.post("/v1/route", chat(f"{instruction}\n\n{inputs[row]}", model="auto"))
    decision: dict[str, Any] = body["decision"]
    return decision


async def asked(server: Running) -> int:
    return int((await server.engine_log())["started"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> AsyncIterator[Running]:
    """A home that begins with one adapter, and grows in the tests below."""
    home = tmp_path_factory.mktemp("home")
    async with running(make_home(home, gate={"deadline_ms": 20_000})) as server:
        write_json(server.settings.rooms.server_file, {"url": server.url, "pid": os.getpid(), "token": TOKEN})
        await arrive(server, "garden", embedder)
        yield server


async def test_what_was_cut_short_goes_on_and_two_loops_are_refused(server: Running) -> None:
    held = FileLock(server.settings.rooms.hidden / "locks" / "loop.lock")
    with held, pytest.raises(Conflict, match="at work"):
        await turn(server)
    nothing = await turn(server, budget=0)
    assert (nothing.asked, nothing.open) == (0, 60)  # prompt, few-shot and the adapter on twenty dev rows
    assert nothing.gate["version"] is None
    work = asyncio.create_task(turn(server))
    before = await asked(server)
    kept = server.settings.rooms.reports / "loop" / "outcomes.jsonl"
    await until(lambda: kept.is_file() and kept.stat().st_size > 0)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    first = await turn(server)
    assert first.known > 0
    assert first.known + first.asked == 60
    assert await asked(server) - before <= 60 + 8  # those that were open when it ended
    assert first.gate["promoted"], first
    assert live_version(server.settings.rooms) == 1


async def test_a_new_adapter_is_enrolled_measured_taught_and_chosen(server: Running, embedder: Embedder) -> None:
    await arrive(server, "library", embedder)
    before = await asked(server)
    done = await turn(server)
    assert "adapter:library" in done.new
    assert "prompt" not in done.new
    # its own twenty rows to three arms and the other's adapter; sixteen of the other's to it
    assert (done.known, done.asked, done.open) == (60, 3 * 20 + 16 + 16, 0)
    assert await asked(server) - before == done.asked
    assert done.gate["promoted"], done
    assert done.gate["version"] == 2
    gate = server.gateway.decider.gate
    await until(lambda: gate.taught is not None and gate.taught.version == 2)
    for name in TASKS:
        assert (await route(server, name))["arm"] == f"adapter:{name}"
    again = await turn(server)
    assert (again.asked, again.known) == (0, 152)
    assert again.gate == {"version": 2, "promoted": False, "reason": "no outcome is new"}


async def test_a_decision_tells_everything_it_rests_on(server: Running) -> None:
    told = await route(server, "garden")
    _, record, _ = await server.get(f"/v1/decisions/{told['id']}")
    assert record["gate"] == 2
    assert record["propensity"] == 1.0
    assert record["adjusted"] == {}
    assert set(record["scores"]) >= {"prompt", "adapter:garden", "adapter:library"}
    votes = [near["scores"] for near in record["neighbours"] if "scores" in near]
    assert votes
    assert "outcomes" in record["reason"]
    assert "vector" not in record


async def test_a_logged_decision_is_made_again_by_another_version(server: Running) -> None:
    told = [await route(server, name) for name in TASKS]
    await asyncio.to_thread(server.gateway.journal.flush)
    ids = [decision["id"] for decision in told]

    def replay(*words: str) -> Any:
        done = CliRunner().invoke(app, ["gate", "replay", *words], env=server.settings.environment())
        return json.loads(done.stdout) if done.exit_code == 0 else done.exception

    same = await asyncio.to_thread(replay, *ids, "--json", "--gate", "gate@2")
    older = await asyncio.to_thread(replay, *ids, "--json", "--gate", "gate@1")
    assert [row["now"] for row in same["decisions"]] == [decision["arm"] for decision in told]
    assert (same["n"], same["changed"]) == (2, 0)
    assert older["n"] == 2
    assert "the words of the request" in same["missing"]
    since = await asyncio.to_thread(replay, "--since", "1", "--json")
    assert {row["id"] for row in since["decisions"]} >= set(ids)
    assert "no decision" in str(await asyncio.to_thread(replay, "dec_nobody"))


async def test_thumbs_reach_the_scores_through_the_loop_and_can_be_rolled_back(server: Running) -> None:
    for row in range(50):
        for name, score in (("garden", 1.0), ("library", 0.0)):
            decision = await route(server, name, row)
            status, _, _ = await server.post("/v1/feedback", {"decision_id": decision["id"], "score": score})
            assert status == 200
    done = await turn(server)
    assert done.feedback["promoted"], done.feedback
    gate = server.gateway.decider.gate
    await until(lambda: gate.bandit is not None)
    disliked, liked = await route(server, "library"), await route(server, "garden")
    assert -0.1 <= disliked["adjusted"]["adapter:library"] < -0.05
    assert "feedback moved it by -0." in disliked["reason"]
    assert 0 < liked["adjusted"]["adapter:garden"] <= 0.1
    assert disliked["arm"] == "adapter:library"  # outcomes weigh more than a few thumbs
    again = await turn(server)
    assert again.feedback["reason"] == "no reward is new"
    rooms = server.settings.rooms
    second = json.loads((rooms.adapters / FEEDBACK / "1" / "card.json").read_text())
    assert second["holdout"]["n"] + second["n"] == 100


async def test_a_gate_that_people_liked_less_is_not_let_in(server: Running, embedder: Embedder) -> None:
    settings = server.settings.model_copy(
        update={"gate": server.settings.gate.model_copy(update={"adjust_within": 0.5, "abstain_below": 0.6})}
    )
    vectors = embedder.embed([f"{GARDEN_TASK}\n\n{text}" for text in GARDEN]).repeat(4, axis=0)
    tried = ["adapter:garden" if i % 2 else "prompt" for i in range(len(vectors))]

    def rewards(liked: str) -> Rewards:
        reward = np.array([float(arm == liked) for arm in tried])
        names = tuple(map(str, range(len(tried))))
        half, at = np.full(len(tried), 0.5), np.arange(len(tried), dtype=float)
        return Rewards(names, names, tuple(tried), vectors, reward, half, at, ({},) * len(tried))

    def verdicts() -> Sequence[Any]:
        with open_desk(settings, embedder) as desk:
            serving, other = desk.gate(), desk.gate()
            serving.bandit = None
            dislike = np.array([[-1.0]])
            other.bandit = Bandit(("adapter:garden",), vectors[0] * 0, vectors[:0], dislike, np.zeros((1, 1, 1)), 0.5)
            assert str(desk.choices(serving, vectors[:1])[0].arm) == "adapter:garden"
            return [desk.judged(rewards(liked), other, serving, None) for liked in ("adapter:garden", "prompt")]

    worse, better = await asyncio.to_thread(verdicts)
    assert worse.worse
    assert not better.worse
    assert better.gain.low > 0


async def test_a_gate_that_knows_less_than_the_live_one_does_not_replace_it(
    server: Running, embedder: Embedder, tmp_path: Path
) -> None:
    rows = []
    for name, (instruction, inputs) in TASKS.items():
        for i, text in enumerate(inputs[:12]):
            for arm in ("prompt", "adapter:garden", "adapter:library"):
                row = {"id": f"{name}{i}", "input": f"{instruction}\n\n{text}", "model": arm}
                rows.append({**row, "score": float(arm.endswith(name))})
    source = tmp_path / "elsewhere.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rooms = server.settings.rooms
    facts = {"from": [str(source)]}
    table = read_outcomes([source], teach=True)
    made = await asyncio.to_thread(
        lambda: teach(
            rooms,
            table,
            embedder.embed_queries,
            embedder.query_digest,
            server.settings.cache,
            facts=facts,
            veto=lambda _: "",
        )
    )
    assert made.promoted
    source.unlink()
    done = await turn(server)
    assert not done.gate["promoted"]
    assert "what taught it is gone" in done.gate["reason"]
    assert live_version(rooms) == made.version
    assert rollback(rooms) == 2


async def test_a_server_closes_the_circle_by_itself_once(server: Running) -> None:
    for name in TASKS:
        server.gateway.state.put_measurement(f"{name}@1", {"reason": ""})
    done = server.settings.rooms.hidden / "loop.json"
    work = asyncio.create_task(Looping(server.gateway).run())
    await until(done.is_file, 240)
    work.cancel()
    log = (server.settings.rooms.logs / "loop.log").read_text()
    assert "asking" not in log  # everything was known
    assert len(json.loads(done.read_bytes())["mark"]) == 24
