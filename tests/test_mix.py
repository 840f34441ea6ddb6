"""Weighted mixes: one adapter whose update is the weighted sum of others', made once and found again."""

from __future__ import annotations

import asyncio
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters_kit import filling, make_adapter, make_base
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jobs_kit import make_trainable_home
from safetensors.numpy import load_file, save_file
from server_kit import TOKEN, Running, chat, make_home, running, until
from tiny_model import make_tiny_model
from training_kit import write_colours
from typer.testing import CliRunner

from hybrid.adapters.listing import AdapterVersion
from hybrid.adapters.mix import concatenated, parse_weights, quantised, read_factors, write_factors
from hybrid.adapters.preflight import BaseFacts, check, read_base
from hybrid.adapters.store import AdapterStore
from hybrid.cli import app
from hybrid.errors import BadRequest
from hybrid.gate.sparse import balanced, load_balance, top_k_softmax
from hybrid.knowledge.examples import Shelf
from hybrid.models import ModelFiles
from hybrid.rooms import Home, write_json
from hybrid.state import State
from hybrid.training.merge import Merge, merge
from hybrid.types.arm import Arm

KINDS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFacts:
    return make_base(tmp_path_factory.mktemp("base") / "model")


async def publish(server: Running, name: str, seed: int, **more: Any) -> AdapterVersion:
    """An adapter that has passed its checks."""
    fill = filling(read_base(Path(server.settings.model)), seed=seed, **more)
    version = await asyncio.to_thread(server.gateway.store.publish, name, fill)
    return await server.gateway.loader.load_now(version.id)


@st.composite
def adapter_specs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.sampled_from([1, 4, 16, 31.5])),
        "use_rslora": draw(st.booleans()),
        "target_modules": draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True)),
        "seed": draw(st.integers(0, 99)),
        "weight": draw(st.floats(0.05, 3)),
    }


def write(folder: Path, base: BaseFacts, spec: dict[str, Any]) -> Path:
    """A PEFT folder as the specification says, on some modules only."""
    config = {key: value for key, value in spec.items() if key not in ("seed", "weight")}
    make_adapter(folder, base, rank=spec["r"], **config)
    random = np.random.default_rng(spec["seed"])
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {
        name: random.normal(size=tensor.shape).astype(np.float32)
        for name, tensor in weights.items()
        if any(f".{kind}." in name for kind in spec["target_modules"])
    }
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def updates(folder: Path) -> dict[str, np.ndarray]:
    """ΔW by module, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        module: scale * tensors[f"{module}.lora_B.weight"].astype(float) @ tensors[f"{module}.lora_A.weight"]
        for module in modules
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=st.lists(adapter_specs(), min_size=2, max_size=4))
def test_A12_the_update_of_a_mix_is_the_weighted_sum(
    base: BaseFacts, tmp_path_factory: pytest.TempPathFactory, specs: list[dict[str, Any]]
) -> None:
    room = tmp_path_factory.mktemp("mix")
    folders = [write(room / str(n), base, spec) for n, spec in enumerate(specs)]
    (room / "mix").mkdir()
    members = [(spec["weight"], read_factors(folder)) for spec, folder in zip(specs, folders, strict=True)]
    write_factors(room / "mix", concatenated(members))
    check(room / "mix", base, max_rank=64)  # what serves passes preflight
    mixed = updates(room / "mix")
    wanted: dict[str, Any] = {}
    for spec, folder in zip(specs, folders, strict=True):
        for module, update in updates(folder).items():
            wanted[module] = wanted.get(module, 0) + spec["weight"] * update
    assert mixed.keys() == wanted.keys()
    for module, update in wanted.items():
        np.testing.assert_allclose(mixed[module], update, rtol=1e-4, atol=1e-4 * abs(update).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_members_of_every_dtype_are_read(base: BaseFacts, tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    folder = make_adapter(tmp_path / "a", base)
    tensors = {
        name: torch.from_numpy(tensor).to(getattr(torch, dtype))
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    save_torch(tensors, folder / "adapter_model.safetensors")
    for module, (a, b) in read_factors(folder).by_module.items():
        np.testing.assert_array_equal(a, tensors[f"base_model.model.{module}.lora_A.weight"].float().numpy())
        np.testing.assert_array_equal(b, tensors[f"base_model.model.{module}.lora_B.weight"].float().numpy() * 4)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(1e-300, 1e300), min_size=1, max_size=50))
def test_A12_kept_weights_are_twentieths_that_sum_to_one_and_a_spec_has_one_key(weights: dict[str, float]) -> None:
    kept = quantised(weights)
    total = math.fsum(weights.values())
    assert math.isclose(sum(kept.values()), 1)
    assert all(abs(kept.get(name, 0) - weight / total) < 1 / 20 for name, weight in weights.items())
    assert kept == quantised(dict(reversed(weights.items()))) == quantised(kept)
    assert list(kept) == sorted(kept)


@given(st.sets(st.integers(1, 19), min_size=1, max_size=3))
def test_weights_in_twentieths_are_kept_as_they_are(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), 20]
    weights = {str(n): (end - start) / 20 for n, (start, end) in enumerate(pairwise(edges))}
    assert quantised(weights) == weights == quantised({name: 7 * weight for name, weight in weights.items()})


rows = st.integers(2, 6).flatmap(
    lambda arms: st.lists(st.lists(st.floats(-9, 9), min_size=arms, max_size=arms), min_size=1, max_size=40)
)


@given(rows, st.integers(1, 7), st.floats(0.1, 5))
def test_sparse_weights_are_a_softmax_of_the_best(scores: list[list[float]], k: int, temperature: float) -> None:
    given_ = np.array(scores)
    weights = top_k_softmax(given_, k, temperature)
    count = min(k, given_.shape[1])
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    for row, scored in zip(weights, given_, strict=True):
        taken = row > 0
        assert taken.sum() <= count
        best = np.sort(scored)[-count:]
        np.testing.assert_allclose(np.sort(row)[-count:], np.exp(best / temperature) / np.exp(best / temperature).sum())


@given(rows, st.integers(1, 3), st.floats(0, 5))
@example([[0.0, 0.0]], 1, 5e-324)
def test_balancing_never_makes_the_load_less_even(scores: list[list[float]], k: int, strength: float) -> None:
    given_ = np.array(scores)
    bias = balanced(given_, k, strength)
    even = np.zeros_like(given_)  # with equal scores every chosen arm weighs the same: the load is what is left
    assert np.abs(bias).max() <= strength

    def load(by: np.ndarray) -> float:
        chosen = top_k_softmax(given_, k, bias=by) > 0
        return load_balance(even + chosen)

    assert load(bias) <= load(np.zeros(given_.shape[1])) + 1e-12


def test_balancing_evens_a_load_that_one_arm_takes() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(400, 4)) + np.array([2, 0, 0, 0])
    before, after = (top_k_softmax(scores, 1, bias=bias) for bias in (None, balanced(scores, 1, 3.0)))
    assert load_balance(before) > 0.5
    assert load_balance(after) < 0.05
    assert load_balance(np.eye(4)) == 0
    assert load_balance(np.array([[1.0, 0, 0, 0]])) == 3


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a=1",
        "a=.5,b",
        "a=.5,b=",
        "a=0,b=1",
        "a=0,b=0",
        "a=-1,b=1",
        "a=nan,b=1",
        "a=inf,b=1",
        "=1,b=1",
        "a=1,a=2",
        "",
    ],
)
def test_A12_a_spec_that_is_no_mix_is_refused_in_words(text: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        parse_weights(text)
    assert refusal.value.message.endswith(".")
    assert parse_weights("b=0.3, a@2=7e-1") == {"b": 0.3, "a@2": 0.7}


async def selected(server: Running, model: str, **more: Any) -> str:
    """The version that answered, as the headers tell."""
    status, body, headers = await server.post("/v1/chat/completions", chat("hello there", model=model, **more))
    assert status == 200, body
    assert body["choices"][0]["message"]["content"]
    return f"{headers['x-hybrid-selected-adapter']}@{headers['x-hybrid-selected-version']}"


async def refusal(server: Running, model: str) -> tuple[int, str, str]:
    status, body, _ = await server.post("/v1/chat/completions", chat("hello", model=model))
    return status, body["error"]["code"], body["error"]["message"]


async def test_A12_a_mix_is_made_once_and_answers(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    async with running(home) as server:
        first = await publish(server, "a", 1)
        second = await publish(server, "b", 2)
        made = await selected(server, "mix:a=0.7,b=0.3")
        assert made == "mix@1"
        others = (
            "mix:b=0.3,a=0.7",
            "mix:a=7,b=3",
            "mix:a@1=0.71,b@1=0.29",
            "mix:a=1.4e308,b=6e307",
            "hybrid/mix:a=7,b=3",
        )
        for same in others:
            assert await selected(server, same) == made
        assert await selected(server, "mix:a=0.3,b=0.7") == "mix@2"
        assert await selected(server, "mix@2") == "mix@2"
        mix = server.gateway.store.resolve("mix@1")
        assert mix.card["mix"] == {"a@1": 0.7, "b@1": 0.3}
        assert (mix.state, mix.card["rank"]) == ("candidate", 8)
        for module, update in updates(mix.ref.path).items():
            wanted = 0.7 * updates(first.ref.path)[module] + 0.3 * updates(second.ref.path)[module]
            np.testing.assert_allclose(update, wanted, atol=1e-4)
        ids = {model["id"] for model in (await server.get("/v1/models"))[1]["data"]}
        assert "mix" in ids
        assert not {id for id in ids if id.startswith("mix@")}
        _, status, _ = await server.get("/v1/status")
        assert {version["name"] for version in status["adapters"]} == set(status["aliases"]) == {"a", "b"}
        digest = mix.ref.sha256
    async with running(home) as server:  # the same spec is the same artefact after a restart
        assert await selected(server, "mix:a=0.7,b=0.3") == made
        await publish(server, "a", 3)  # a new version of a member is another mix; the old one is named by its number
        assert server.gateway.store.resolve("a").version == 2
        assert await selected(server, "mix:a=0.7,b=0.3") == "mix@3"
        assert await selected(server, "mix:a@1=0.7,b=0.3") == made
    (tmp_path / "again").mkdir()
    async with running(make_home(tmp_path / "again")) as server:  # and in another home it has the same bytes
        await publish(server, "b", 2)
        await publish(server, "a", 1)
        assert await selected(server, "mix:b=0.3,a=0.7") == "mix@1"
        assert server.gateway.store.resolve("mix@1").ref.sha256 == digest


async def test_A12_what_cannot_be_mixed_is_refused_in_words(tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server:
        await publish(server, "a", 1)
        assert "mix" not in {model["id"] for model in (await server.get("/v1/models"))[1]["data"]}
        await publish(server, "b", 2)
        await publish(server, "wide", 3, rank=30)
        assert (await refusal(server, "mix:a=0.5,nobody=0.5"))[:2] == (404, "model_not_found")
        assert (await refusal(server, "mix:a=0.5,b@7=0.5"))[:2] == (404, "model_not_found")
        assert (await refusal(server, "mix:a=0.5,b=0.5:c"))[:2] == (404, "model_not_found")
        assert (await refusal(server, "mix"))[:2] == (404, "model_not_found")  # the gate has learned of neither
        for malformed in ("mix:a=1", "mix:a", "mix:a=0.5,b=0", "mix:a=0.5,b=-1", "mix:a=0.5,a@1=0.5"):
            assert (await refusal(server, malformed))[:2] == (400, "invalid_request_error"), malformed
        assert "leave it out" in (await refusal(server, "mix:a=99,b=1"))[2]
        status, _, words = await refusal(server, "mix:a=0.5,wide=0.5")
        assert status == 400
        assert "4 + 30" in words
        assert "engine.max_lora_rank" in words
        status, _, _ = await server.post("/v1/load_lora_adapter", {"lora_name": "mix", "lora_path": str(tmp_path)})
        assert status == 422
        assert not server.gateway.store.versions("mix")


async def test_A12_of_fifty_adapters_as_many_are_mixed_as_weights_can_tell_apart(tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server:
        names = [f"n{i:02}" for i in range(50)]
        base = read_base(Path(server.settings.model))
        for seed, name in enumerate(names):
            await asyncio.to_thread(server.gateway.store.publish, name, filling(base, seed=seed, rank=1))
        await asyncio.gather(*(server.gateway.loader.load_now(f"{name}@1") for name in names))
        status, code, words = await refusal(server, "mix:" + ",".join(f"{name}=1" for name in names))
        assert (status, code) == (400, "invalid_request_error")
        assert "leave it out" in words
        assert await selected(server, "mix:" + ",".join(f"{name}=1" for name in names[:20])) == "mix@1"
        store = server.gateway.store
        members = [updates(store.resolve(f"{name}@1").ref.path) for name in names[:20]]
        for module, update in updates(store.resolve("mix@1").ref.path).items():
            np.testing.assert_allclose(update, sum(member[module] for member in members) / 20, atol=1e-4)


async def test_few_mixes_are_kept_and_none_that_answers_goes(tmp_path: Path) -> None:
    async with running(make_home(tmp_path, engine={"max_mixes": 2})) as server:
        store = server.gateway.store
        await publish(server, "a", 1)
        await publish(server, "b", 2)
        slow = asyncio.create_task(server.post("/v1/chat/completions", chat("@stall 1", model="mix:a=0.1,b=0.9")))
        await until(lambda: any(server.gateway.in_use(v.ref.engine_name) for v in store.versions("mix")))
        for number, model in ((2, "mix:a=0.2,b=0.8"), (3, "mix:a=0.3,b=0.7")):
            assert await selected(server, model) == f"mix@{number}"
        assert [v.id for v in store.versions("mix")] == ["mix@1", "mix@3"]
        assert not (tmp_path / "adapters" / "mix" / "2").exists()
        loaded = await server.gateway.engine.loaded()
        assert sorted(name.partition("-")[0] for name in loaded if name.startswith("mix")) == ["mix@1", "mix@3"]
        slow.cancel()
        await until(lambda: not server.inflight)
        assert await selected(server, "mix:a=0.2,b=0.8") == "mix@4"
        assert [v.id for v in store.versions("mix")] == ["mix@3", "mix@4"]


def tiny_adapters(home: Path) -> tuple[ModelFiles, AdapterStore]:
    """A home on the tiny model with the checked adapters `a`, `b` of rank 4 and `wide` of rank 8, on other modules."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = make_tiny_model(home / "tiny")
    store = AdapterStore(Home(home), State(home / ".hybrid" / "state.db"), model.sha256)
    plans = {"a": (4, ["q_proj", "v_proj"]), "b": (4, ["q_proj", "v_proj"]), "wide": (8, ["v_proj", "down_proj"])}
    for seed, (name, (rank, targets)) in enumerate(plans.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=12, target_modules=targets, init_lora_weights=False)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model.path), config)

        def fill(folder: Path, peft: Any = peft) -> dict[str, Any]:
            peft.save_pretrained(str(folder))
            return {"base_sha256": model.sha256}

        store.mark(store.publish(name, fill).id, "candidate")
        store.promote(name, 1)
    return model, store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFiles, AdapterStore]:
    return tiny_adapters(tmp_path_factory.mktemp("tiny"))


def answers_of(model: ModelFiles, *folders: Path, weights: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """What PEFT computes with several adapters at once, each weighted: logits [tokens, vocabulary]."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model.path)
    peft = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="0")
    for n, folder in enumerate(folders[1:], 1):
        peft.load_adapter(str(folder), adapter_name=str(n))
    peft.base_model.set_adapter([str(n) for n in range(len(folders))])
    for layer in peft.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling.update({n: scale * weights[int(n)] for n, scale in layer.scaling.items()})
    with torch.no_grad():
        return peft.eval()(torch.arange(3, 40)[None]).logits[0].numpy()


def test_peft_computes_the_same_with_the_mix_as_with_all_members(tiny: Any, tmp_path: Path) -> None:
    model, store = tiny
    folders = [store.resolve(name).ref.path for name in ("a", "b", "wide")]
    weights = (0.5, 0.2, 0.3)
    write_factors(tmp_path, concatenated([(w, read_factors(f)) for w, f in zip(weights, folders, strict=True)]))
    ours, theirs = answers_of(model, tmp_path), answers_of(model, *folders, weights=weights)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(ours - answers_of(model, folders[0])).max() > 0.01 * np.abs(theirs).max()


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties", "dare_ties", "magnitude_prune"])
def test_a_merge_is_published_with_what_it_is(tiny: Any, method: str) -> None:
    model, store = tiny
    name = f"merged-{method}"
    for version in (1, 2):  # again the same: nothing is silently left undone
        made = merge(Merge(name=name, weights={"a": 0.7, "b": 0.3}, method=method, rank=8),
                     store=store, model=model, max_rank=32)  # fmt: skip
        assert (made.adapter, made.version) == (name, version)
    first, second = (store.resolve(f"{name}@{version}") for version in (1, 2))
    assert first.ref.sha256 == second.ref.sha256
    told = first.card["merge"]
    assert told["members"] == {"a@1": 0.7, "b@1": 0.3}
    check(first.ref.path, read_base(model.path, model.sha256), max_rank=32)
    wanted = {
        module: 0.7 * update + 0.3 * updates(store.resolve("b").ref.path)[module]
        for module, update in updates(store.resolve("a").ref.path).items()
    }
    found = updates(first.ref.path)
    apart = sum(((found[m] - wanted[m]) ** 2).sum() for m in wanted) / sum((wanted[m] ** 2).sum() for m in wanted)
    assert told["relative_error"] == pytest.approx(apart**0.5, abs=1e-3)
    exact = method in ("cat", "svd")  # two ranks of four are kept whole by a rank of eight
    assert (told["relative_error"] < 1e-3) == exact


def test_learned_weights_are_better_than_those_begun_with(tiny: Any, tmp_path: Path) -> None:
    model, store = tiny
    task = write_colours(tmp_path, train=(0, 40), dev=(100, 8))
    (task / "task.json").write_text(json.dumps({"name": "colours", "instruction": "", "metric": "accuracy"}))
    losses = {}
    for method in ("cat", "learned"):
        order = Merge(name=f"hub-{method}", weights={"a": 0.5, "wide": 0.5}, method=method, task=task)
        losses[method] = merge(order, store=store, model=model, max_rank=32).metrics["dev_loss"]
    assert losses["learned"] < losses["cat"]
    assert store.resolve("hub-learned@1").card["merge"]["members"].keys() == {"a@1", "wide@1"}


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ({"method": "blend"}, "use one of"),
        ({"method": "learned"}, "--task"),
        ({"method": "ties", "weights": {"a": 1.0, "wide": 1.0}}, "svd"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"weights": {"a": 1.0, "wide": 1.0}}, "max_lora_rank"),
    ],
)
def test_a_merge_that_cannot_be_is_refused_in_words(tiny: Any, order: dict[str, Any], words: str) -> None:
    model, store = tiny
    with pytest.raises(BadRequest, match=words):
        merge(Merge(**{"name": "never", "weights": {"a": 1.0, "b": 1.0}} | order), store=store, model=model, max_rank=8)
    assert not store.versions("never")


TOPICS = {
    "flowers": ["when do I water the roses", "which soil do tulips like", "how do I prune a lilac", "plant the bulbs"],
    "ships": ["when does the ferry leave", "which harbour has a dock", "how do I moor a boat", "raise the anchor"],
}


async def publish_topic(server: Running, name: str) -> None:
    """An adapter with examples, so that the gate learns of it."""
    base, embedder = read_base(Path(server.settings.model)), server.gateway.library.embedder
    texts = tuple(f"{text} {more}" for text in TOPICS[name] for more in ("today", "please", "in May", "again"))

    def fill(folder: Path) -> dict[str, Any]:
        vectors = embedder.embed(list(texts))
        Shelf(name, texts, texts, vectors, vectors, embedder=embedder.query_digest).write(folder)
        return filling(base, seed=len(name))(folder)

    version = await asyncio.to_thread(server.gateway.store.publish, name, fill)
    await server.gateway.loader.load_now(version.id)


async def test_mix_without_weights_takes_those_of_the_gate(tmp_path: Path) -> None:
    gate = {"deadline_ms": 60_000, "mix_balance": 0.1}
    async with running(make_home(tmp_path, gate=gate)) as server:
        for name in TOPICS:
            await publish_topic(server, name)
        await until(lambda: {f"adapter:{name}" for name in TOPICS} <= set(map(str, server.gateway.decider.gate.arms())))
        both = "water the roses on the ferry before it leaves the harbour"
        answers = []
        for text in (TOPICS["flowers"][0], TOPICS["ships"][0], both):
            status, body, headers = await server.post("/v1/chat/completions", chat(text, model="mix"))
            assert status == 200, body
            answers.append(Arm.parse(headers["x-hybrid-selected-arm"]))
            version = f"{headers['x-hybrid-selected-adapter']}@{headers['x-hybrid-selected-version']}"
            mixed = server.gateway.store.resolve(version).card.get("mix", {version: 1})
            weights = parse_weights(answers[-1].args[0]) if answers[-1].strategy == "mix" else {answers[-1].args[0]: 1}
            assert mixed == {f"{name}@1": weight for name, weight in sorted(weights.items())}
        assert answers[0].adapters[0] == "flowers"
        assert set(answers[2].adapters) == set(TOPICS)
        for _ in range(16):  # a slight balance leaves a clear choice alone
            _, told, _ = await server.post("/v1/route", chat(TOPICS["flowers"][0], model="mix"))
            assert Arm.parse(told["decision"]["arm"]).adapters[0] == "flowers"
        hybrid = {"arms": ["adapter:ships"]}
        _, told, _ = await server.post("/v1/route", chat(TOPICS["flowers"][0], model="mix", hybrid=hybrid))
        assert told["decision"]["arm"] == "adapter:ships"
        assert not {str(arm) for arm in server.gateway.decider.gate.arms()} & {"mix", "adapter:mix"}


async def test_a_merge_by_command_answers_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_trainable_home(tmp_path)
    for name, value in home.environment().items():
        monkeypatch.setenv(name, value)
    async with running(home) as server:
        where = {"url": server.url, "pid": os.getpid(), "token": TOKEN}
        write_json(home.rooms.server_file, where)
        await publish(server, "a", 1)
        await publish(server, "b", 2)
        command = ["adapters", "merge", "a=0.7", "b=0.3", "--name", "both", "--method", "ties", "--json"]
        done = await asyncio.to_thread(CliRunner().invoke, app, command, catch_exceptions=False)
        told = json.loads(done.stdout.splitlines()[-1])
        assert (told["adapter"], told["version"], told["promoted"]) == ("both", 1, True)
        assert told["merge"]["members"] == {"a@1": 0.7, "b@1": 0.3}
        assert told["merge"]["relative_error"] > 0
        assert await selected(server, "both") == "both@1"
        assert "both" in {model["id"] for model in (await server.get("/v1/models"))[1]["data"]}
