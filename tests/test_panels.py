"""Drafts that a reward model rates, and what panels and trainings are planned to take."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from adapters_kit import filling
from jobs_kit import make_trainable_home
from objectives_kit import House, preferences
from server_kit import Running, chat, running, until

from hybrid.adapters.preflight import read_base
from hybrid.evaluation.asking import Offer, shown_settings
from hybrid.evaluation.plan import parts, turns
from hybrid.evaluation.runner import Ledger, jobs_for
from hybrid.evaluation.tasks import Example, Task
from hybrid.knowledge.embed import Embedder
from hybrid.lifecycle.suite_adapters import Order, minutes
from hybrid.models import ModelFiles
from hybrid.settings import MoaSettings, Settings
from hybrid.training.recipes import load_recipe
from hybrid.training.reward import HEAD
from hybrid.types.arm import Arm

# --- drafts that a reward model rates --------------------------------------------------------------------------------


async def test_best_of_asks_the_reward_model_that_the_panel_names_and_says_so_when_it_cannot(
    data: Path, tmp_path: Path, tiny: ModelFiles, embedder: Embedder
) -> None:
    settings = make_trainable_home(tmp_path / "home")
    folder = preferences(data, tmp_path / "likes")
    house = House(tmp_path / "home", tiny, embedder)
    await asyncio.to_thread(house.train, folder, "likes", method="reward", epochs=4, max_steps=0)
    pair = json.loads((folder / "dev.jsonl").read_text().splitlines()[0])
    learned = {"good": pair["chosen"], "bad": pair["rejected"]}
    proposers = ["adapter:good", "adapter:bad"]
    panels = {
        "rated": {"proposers": proposers, "method": "best_of", "reward": "likes"},
        "turned": {"proposers": proposers[::-1], "method": "best_of", "reward": "likes@1"},
        "plain": {"proposers": proposers, "method": "best_of"},
        "gone": {"proposers": proposers, "method": "best_of", "reward": "likes@7"},
        "wrong": {"proposers": proposers, "method": "best_of", "reward": "good"},
    }
    moa = MoaSettings.model_validate({"panels": panels})
    gate = settings.gate.model_copy(update={"deadline_ms": 60_000.0})
    async with running(settings.model_copy(update={"moa": moa, "gate": gate})) as server:
        for seed, (name, answer) in enumerate(learned.items(), 1):
            await published(server, name, pair["prompt"], answer, seed)
        await until(lambda: server.gateway.store.resolve("likes@1").state == "candidate")
        path = server.gateway.store.resolve("likes@1").ref.path / HEAD
        content = path.read_bytes()

        path.unlink()
        said, note = await asked(server, "rated", pair["prompt"])
        assert said in learned.values()
        assert "log-probability" in note
        assert "likes@1 did not rate them: likes/1 cannot rate answers here" in note
        path.write_bytes(content)
        for panel in ("rated", "turned"):
            said, note = await asked(server, panel, pair["prompt"])
            assert said == pair["chosen"]
            assert note.startswith("likes@1 rates it best of 2")
        _, note = await asked(server, "plain", pair["prompt"])
        assert "highest mean log-probability" in note
        assert note.endswith("the panel names no reward model")
        for panel in ("gone", "wrong"):
            status, told, _ = await server.post("/v1/chat/completions", chat(pair["prompt"], model=f"moa:{panel}"))
            assert (status, told["error"]["code"]) == (404, "model_not_found")
            assert "no reward model" in told["error"]["message"]


async def published(server: Running, name: str, question: str, answer: str, seed: int) -> None:
    """An adapter that answers one question as it has learned, loaded."""
    fill = filling(read_base(Path(server.settings.model)), seed=seed)

    def write_it(staging: Path) -> dict[str, Any]:
        card = fill(staging)
        (staging / "examples.jsonl").write_text(json.dumps({"input": question, "reference": answer}) + "\n")
        return card

    version = await asyncio.to_thread(server.gateway.store.publish, name, write_it)
    await server.gateway.loader.load_now(version.id)


async def asked(server: Running, panel: str, question: str) -> tuple[str, str]:
    """(the answer, what its draft is noted with)."""
    body = chat(question, model=f"moa:{panel}", hybrid={"explain": True})
    status, told, _ = await server.post("/v1/chat/completions", body)
    assert status == 200, told
    (note,) = [draft["note"] for draft in told["hybrid"]["drafts"] if draft["note"]]
    return told["choices"][0]["message"]["content"], note


def test_a_reward_belongs_to_best_of() -> None:
    with pytest.raises(ValueError, match="rates the drafts of method best_of, and this is vote"):
        MoaSettings.model_validate({"panels": {"p": {"proposers": ["prompt"], "method": "vote", "reward": "likes"}}})


# --- plans -----------------------------------------------------------------------------------------------------------

PANELS = {
    "vote": {"proposers": ["prompt", "prompt", "prompt"], "method": "vote"},
    "layers": {"proposers": ["prompt", "rag:a"], "method": "synthesis", "layers": 2, "aggregator": "base"},
    "roles": {"proposers": ["prompt", "rag:a"], "method": "refine", "layers": 2},
}


def test_a_plan_counts_every_call_of_a_panel(tmp_path: Path) -> None:
    moa = MoaSettings.model_validate({"panels": PANELS})
    assert turns(moa, Arm("moa", ("vote",))) == [["prompt"] * 3]
    assert turns(moa, Arm("moa", ("layers",))) == [["prompt", "rag:a"]] * 2 + [["base"]]
    assert turns(moa, Arm("moa", ("roles",))) == [["prompt"], ["rag:a"]] * 2 + [["prompt"]]
    assert turns(moa, Arm("moa")) == [["auto"] * 3, ["auto"]]
    assert turns(moa, Arm("self_moa")) == [["auto"] * 4, ["auto"]]

    settings = Settings.load(home=tmp_path).model_copy(update={"moa": moa})
    status = {"adapters": [], "corpora": [], "gate": {}, "engine": {}}
    offer = Offer(("moa",), status, shown_settings(settings), "base")
    task = Task("t", "accuracy", "Say it.", folder=tmp_path)
    arms = ["prompt", "rag:a", "base", "moa:vote", "moa:layers"]
    jobs = {arm: jobs_for(task, [Example("1", "one two three")], arm, offer, 100) for arm in arms}
    sizes = {}
    for arm, asked_of in jobs.items():
        (part,) = parts(asked_of, offer, Ledger(tmp_path / "out"), lambda text: len(text.split()), settings)
        sizes[arm] = (part.prompt, part.answer)
    (prompt, answer), (rag, _), (base, _) = sizes["prompt"], sizes["rag:a"], sizes["base"]
    assert sizes["moa:vote"] == (3 * prompt, 3 * answer)
    read = 2 * answer  # what each later call reads of those before
    assert sizes["moa:layers"] == (2 * (prompt + rag) + base + 3 * read, 5 * answer)


def test_minutes_of_training_know_long_rows_and_bounded_looks(tmp_path: Path) -> None:
    def took(method: str, dev: int) -> float:
        folder = tmp_path / f"{method}{dev}"
        folder.mkdir()
        (folder / "task.json").write_text(json.dumps({"name": "t", "instruction": "", "metric": "accuracy"}))
        for split, count in (("train", 300), ("dev", dev), ("test", 1)):
            lines = [
                {"id": f"{split}{n}", "input": f"{split}{n} " + "word " * 398, "reference": "yes"} for n in range(count)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps({**line, "meta": {}}) + "\n" for line in lines))
        recipe = load_recipe(None, {"method": method})
        order = Order("t", Task("t", "accuracy", "", folder=folder), {}, recipe)
        return minutes(order, lambda text: len(text.split()), 3)

    few, many, long = took("lora", 400), took("lora", 500), took("raft", 400)
    assert few == many  # beyond its tokens nothing is looked at
    around = 25 / 60
    assert (long - around) / (few - around) == pytest.approx(1000 / 600)
    trained = 300 * 3 * 431 / 1000 / 60
    assert trained < few - around < 1.5 * trained
