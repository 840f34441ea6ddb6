"""What adapters cost, what they hold in memory, and which settings fit: measured, told and kept as they should be."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from conftest import hybrid
from server_kit import make_home

from hybrid.bench import lora, memory, tune
from hybrid.bench.alone import Burst, Client, alone, random_adapters
from hybrid.bench.result import Result
from hybrid.errors import NotReady
from hybrid.models import ModelFiles, materialise
from hybrid.settings import EngineSettings, Settings


def quiet(*_: object) -> None:
    """No progress."""


@pytest.fixture
def scripted(tmp_path: Path) -> Settings:
    return make_home(tmp_path / "home")


def base_of(settings: Settings) -> ModelFiles:
    return materialise(settings.model, settings.cache)


async def test_lora_sets_both_engines_beside_the_base(scripted: Settings, tmp_path: Path) -> None:
    result = await lora.measure(scripted, rounds=2, starts=1, rank=8, out=tmp_path / "out", progress=quiet)
    *cases, bare = result.rows
    assert [row["what"] for row in cases] == [case.name for case in lora.CASES]
    assert all(row["base_tokens_per_s"] > 0 and row["stock_tokens_per_s"] > 0 for row in result.rows)
    for row in result.rows:
        low, high = row["plugin_ci95"]
        assert 0 < low <= row["plugin"] <= high
    assert bare["stock"] == 1.0
    assert [(goal.limit, goal.at_least) for goal in result.goals] == [
        (1.10, False), (1.25, False), (0.85, True), (0.60, True), (0.85, True), (0.99, True),
    ]  # fmt: skip
    written = json.loads((tmp_path / "out" / "lora.json").read_text())
    assert {key: written[key] for key in result.wire()} == json.loads(json.dumps(result.wire()))
    counts = {
        len(speeds) for cases in written["tokens_per_s"].values() for one in cases.values() for speeds in one.values()
    }
    assert counts == {2}, "the first round warms"
    assert (tmp_path / "out" / "lora.png").read_bytes().startswith(b"\x89PNG")


async def test_a_burst_is_spread_over_its_adapters_and_nothing_comes_twice(scripted: Settings, tmp_path: Path) -> None:
    model = base_of(scripted)
    made = random_adapters(tmp_path / "made", model, count=3, rank=4)
    async with alone(scripted, model, made) as engine:
        assert await engine.loaded() == {ref.engine_name for ref in made}
        client = Client(engine, model, made)
        assert await client.tokens_per_s(Burst(9, 3, streams=4, adapters=2)) > 0
        assert await client.tokens_per_s(Burst(9, 1, streams=2)) > 0
        scores = {
            name: await engine.prompt_logprobs("one two three", adapter=name) for name in (None, *await engine.loaded())
        }
    assert len(set(scores.values())) == 4, "each adapter says something else"


async def test_an_engine_that_does_not_start_says_why(scripted: Settings, tmp_path: Path) -> None:
    (tmp_path / "why").write_text("the moon is full")
    crash = scripted.engine.model_copy(update={"args": ("--crash-if", str(tmp_path / "why"))})
    with pytest.raises(NotReady, match="the moon is full"):
        async with alone(scripted.model_copy(update={"engine": crash}), base_of(scripted)):
            pass


async def test_memory_reads_both_with_few_and_many_adapters(
    scripted: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in scripted.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(memory, "COUNTS", (1, 3))
    result = await memory.measure(scripted, requests=40, out=tmp_path / "out", progress=quiet)
    assert [row["adapters"] for row in result.rows] == [0, 1, 3]
    assert all(row["gateway"] > 30 and row["engine"] > 10 for row in result.rows)
    assert [goal.limit for goal in result.goals] == [memory.LIMIT] * 2
    written = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert len(written["churn"]) == memory.SAMPLES + 1
    assert (tmp_path / "out" / "memory.png").read_bytes().startswith(b"\x89PNG")


# --- which settings fit ----------------------------------------------------------------------------------------------


async def test_tuning_begins_with_what_is_set_and_keeps_to_its_time(scripted: Settings) -> None:
    result = await tune.tune(scripted, base_of(scripted), minutes=0.001, progress=quiet)
    assert [row["changed"] for row in result.rows] == ["nothing"]
    assert result.rows[0]["score"] == 1
    assert result.summary["won"] == {}
    assert result.summary["tried"].startswith("0 of ")
    assert tune.keep(scripted, result) is None
    assert json.loads((scripted.rooms.hidden / "tuned.json").read_text())["rows"] == list(result.rows)


def test_a_try_is_scored_by_all_kinds_of_work() -> None:
    first = tune.Try({}, {"chat": 10.0, "crowd": 100.0})
    assert tune.Try({"ngram": 4}, {"chat": 20.0, "crowd": 200.0}).score(first) == pytest.approx(2)
    assert tune.Try({"ngram": 4}, {"chat": 20.0, "crowd": 50.0}).score(first) == pytest.approx(1)
    assert tune.Try({"ngram": 4}, {}, "it did not start").score(first) == 0


def test_what_is_tried_is_not_what_is_set(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576})
    )
    model = ModelFiles("small", tmp_path, "")
    tried = {axis.name: axis for axis in tune.axes(EngineSettings(max_num_seqs=32, kv_cache_gb=4, ngram=4), model)}
    assert tried["ngram"].values == (0,)
    assert tried["max_num_seqs"].values == (16, 64)
    # 32 contexts of 2,048 tokens, each 30 layers of 3 heads with keys and values of 64 bfloat16
    assert (tried["kv_cache_gb"].values, tried["kv_cache_gb"].saves) == ((2,), True)
    assert 1 not in tried["reserved_cores"].values, "vLLM leaves one free by itself"


def test_what_won_is_written_and_all_else_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hybrid.toml").write_text('# ours\nmodel = "/m"\n\n[engine]\nmax_loras = 4  # few\nngram = 2\n')
    settings = Settings.load(home=tmp_path)
    won = {"ngram": 4, "prefix_caching": False, "openmp": "intel"}
    path = tune.keep(settings, Result("tune", ({"changed": "nothing"},), {"won": won}, ()))
    assert path == tmp_path / "hybrid.toml"
    assert path.read_text().startswith("# ours\n")
    assert "max_loras = 4  # few" in path.read_text()
    assert tomllib.loads(path.read_text())["engine"] == {"max_loras": 4, **won}
    monkeypatch.setenv("HYBRID_HOME", str(tmp_path))
    assert Settings.load().engine.openmp == "intel"


def test_tuning_is_a_command(scripted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in scripted.environment().items():
        monkeypatch.setenv(name, value)
    told = json.loads(hybrid(scripted.home, "doctor", "--tune", "--minutes", "0.01", "--json").stdout)
    assert told["rows"][0]["changed"] == "nothing"
    assert told["summary"]["won"] == {}
    assert told["written"] is None
