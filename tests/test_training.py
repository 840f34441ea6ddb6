"""Training on a tiny model: the loss is the right one, it falls, and what is published is what was trained."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import hybrid
from peft import PeftModel
from training_kit import write_colours
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.adapters.preflight import check, read_base
from hybrid.adapters.store import AdapterStore
from hybrid.errors import BadRequest, DataError, Refused
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.examples import Shelf
from hybrid.models import ModelFiles, materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings
from hybrid.state import State
from hybrid.training import base as opening
from hybrid.training import lora
from hybrid.training.batches import Encoded, batches, encode, end_of_turn, packs, render
from hybrid.training.data import Dataset, read_dataset
from hybrid.training.formats import Example
from hybrid.training.job import Job
from hybrid.training.kernels import LOSS_ROWS, MANY_SCORES, fast_loss
from hybrid.training.loop import Group, Watch, optimise, rate
from hybrid.training.methods import find_method
from hybrid.training.objective import NextToken, measure
from hybrid.training.recipes import Recipe
from hybrid.training.run import train
from hybrid.types.request import Message

FAST = {"epochs": 4, "learning_rate": 2e-2, "rank": 4, "alpha": 8, "batch_size": 8, "precision": "float32"}


@cache
def the_embedder() -> Embedder:
    model = materialise(DEFAULT_EMBEDDER, Settings.load().cache)
    return Embedder(model.path, model.name)


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return the_embedder()


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Sixty questions whose answers can be learned: the colour named in the question."""
    folder = tmp_path / "colours"
    folder.mkdir()
    about = {"name": "colours", "instruction": "Name the colour.", "metric": "accuracy", "license": "CC0-1.0"}
    (folder / "task.json").write_text(json.dumps(about))
    return write_colours(folder, train=(0, 60), dev=(100, 12), test=(200, 4))


@pytest.fixture
def data(task: Path) -> Dataset:
    return read_dataset(task)


def quiet(**told: Any) -> None:
    """A progress callback that nobody watches."""


def rows_of(files: ModelFiles, data: Dataset) -> tuple[Any, list[Encoded], list[Encoded]]:
    base, tokenizer = opening.load_base(files, "float32")
    return base, *opening.encoded(tokenizer, data, Recipe(), opening.stops(base))


def fit(files: ModelFiles, data: Dataset, progress: Any = quiet, **recipe: Any) -> Any:
    return lora.fit(Job(data, Recipe(**{**FAST, **recipe}), files, Watch(progress), the_embedder()))


def reference_loss(files: ModelFiles, rows: list[Encoded]) -> float:
    """By transformers' own forward: one row at a time, all logits, everything but the answer masked."""
    reference = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    total = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        labels = torch.tensor([[*[-100] * len(row.prompt), *row.answer]])
        total += float(reference(input_ids=ids, labels=labels).loss.detach()) * len(row.answer)
    return total / sum(len(row.answer) for row in rows)


# --- the text and the loss -----------------------------------------------------------------------------------------


def test_a_row_is_the_served_prompt_then_the_answer_then_the_end_of_turn(tiny: ModelFiles, data: Dataset) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    example = data.train[1]
    (row,), long = encode(tokenizer, [example], end=end_of_turn(tokenizer, [2]), max_length=500)
    served = tokenizer.apply_chat_template(
        [message.wire() for message in example.messages], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(row.prompt) == served
    assert tokenizer.decode(row.answer) == "green<|im_end|>"
    whole = [*example.messages, Message("assistant", example.answer)]
    assert tokenizer.decode([*row.prompt, *row.answer]) + "\n" == tokenizer.apply_chat_template(
        [message.wire() for message in whole], tokenize=False
    )
    assert not long


@pytest.mark.parametrize("common", [True, False])
def test_the_loss_is_that_of_each_row_alone_over_its_answer(tiny: ModelFiles, data: Dataset, common: bool) -> None:
    base, train, _ = rows_of(tiny, data)
    rows = train[:11]
    if not common:
        rows = [replace(row, prompt=(3 + n, *row.prompt)) for n, row in enumerate(rows)]
    found = measure(opening.forward_of(base), rows)
    assert found.loss == pytest.approx(reference_loss(tiny, rows), rel=1e-5)


def test_long_rows_take_the_blocked_kernel_and_lose_the_same(tiny: ModelFiles, data: Dataset) -> None:
    base, train, _ = rows_of(tiny, data)
    rows = [Encoded((3 + n, *row.prompt * 5), row.answer) for n, row in enumerate(train[:2])]
    (pack,) = packs(rows)
    assert pack.mask.numel() > MANY_SCORES
    found = measure(opening.forward_of(base), rows)
    assert found.loss == pytest.approx(reference_loss(tiny, rows), rel=1e-5)


def test_gradients_are_pefts(tiny: ModelFiles, data: Dataset) -> None:
    """One backward pass through our layers and layout, and through PEFT's with padded rows."""
    from peft import LoraConfig, get_peft_model

    base, train, _ = rows_of(tiny, data)
    recipe = Recipe(rank=4, alpha=8)
    ours = lora.adapted(base, recipe, "tiny")
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for pack in packs(train[:6]):
        fast_loss()(opening.forward_of(ours)(pack), pack.targets, 0.5).backward()
    for row in train[:6]:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        labels = torch.tensor([[*[-100] * len(row.prompt), *row.answer]])
        (theirs(input_ids=ids, labels=labels).loss * len(row.answer) * 0.5).backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_loss_in_one_pass_is_cross_entropy() -> None:
    logits = torch.randn(LOSS_ROWS * 2 + 5, 50)
    targets = torch.randint(50, (len(logits),))
    wanted = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wanted, targets, reduction="sum") * 0.25
    loss.backward()
    ours = logits.clone().requires_grad_()
    found = fast_loss()(ours * 1, targets, 0.125)
    (found * 2).backward()
    assert float(found.detach()) * 2 == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(ours.grad, wanted.grad)


def test_exact_is_what_a_greedy_decoder_would_get_whole(tiny: ModelFiles, data: Dataset) -> None:
    base, train, _ = rows_of(tiny, data)
    reference = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    rows = []
    for n, row in enumerate(train[:6]):
        ids = torch.tensor([row.prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
        greedy = tuple(out[0, len(row.prompt) :].tolist())
        rows.append(replace(row, answer=greedy if n % 2 else (*greedy[:2], (greedy[2] + 1) % 200)))
    found = measure(opening.forward_of(base), rows)
    assert found.exact == pytest.approx(0.5)
    assert found.token_accuracy == pytest.approx(15 / 18)


def test_packs_share_the_beginning_and_hold_every_row_once(tiny: ModelFiles, data: Dataset) -> None:
    _, train, _ = rows_of(tiny, data)
    cut = list(packs(train, 400))
    assert sum(pack.rows for pack in cut) == len(train)
    assert len(cut) > 1
    for pack in cut:
        prefix, width = pack.prefix_mask.shape[2], pack.mask.shape[2]
        assert pack.ids.shape == (1, prefix + pack.rows * width)
        assert pack.ids.shape[1] <= 400
        assert prefix > 40
    targets = sorted(token for pack in cut for token in pack.targets.tolist())
    assert targets == sorted(token for row in train for token in row.answer)


def test_an_epoch_of_batches_holds_every_row_once_and_the_seed_orders_them() -> None:
    rows = [Encoded((n,) * (n % 7 + 1), (n,)) for n in range(100)]
    first, again, other = (batches(rows, 8, seed) for seed in (0, 0, 1))
    epoch = [next(first) for _ in range(13)]
    assert sorted(row.prompt[0] for batch in epoch for row in batch) == list(range(100))
    assert epoch == [next(again) for _ in range(13)]
    assert epoch != [next(other) for _ in range(13)]
    assert [next(first) for _ in range(13)] != epoch


def test_the_rate_climbs_then_falls() -> None:
    rates = [rate(step, 100, 0.1) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01


# --- runs ----------------------------------------------------------------------------------------------------------


def test_the_loss_falls_and_progress_tells(tiny: ModelFiles, data: Dataset) -> None:
    told: list[dict[str, Any]] = []
    fitted = fit(tiny, data, lambda **event: told.append(event))
    told = [event for event in told if "step" in event]
    assert [event["step"] for event in told] == list(range(1, 33))
    assert {"steps", "loss", "tokens_per_s", "eta_s"} <= told[0].keys()
    assert told[-1]["eta_s"] == 0
    first, last = (next(e["dev_loss"] for e in events if "dev_loss" in e) for events in (told, told[::-1]))
    assert last < first < told[0]["loss"]
    assert fitted.metrics["dev_loss"] < 0.5 * told[0]["loss"]
    assert fitted.metrics["tokens"] > 60 * 4 * 50


@pytest.mark.parametrize("recipe", [{"precision": "bfloat16"}, {"dropout": 0.1}, {"accumulate": 2, "batch_size": 4}])
def test_other_recipes_learn_too(tiny: ModelFiles, data: Dataset, recipe: dict[str, Any]) -> None:
    losses: list[float] = []
    fitted = fit(tiny, data, lambda **told: losses.append(told["loss"]), **recipe)
    assert fitted.metrics["dev_loss"] < 0.5 * losses[0]


def test_accumulating_batches_is_one_larger_batch(tiny: ModelFiles, data: Dataset) -> None:
    data = replace(data, train=data.train[:16])

    def first_loss(**recipe: Any) -> float:
        told: list[float] = []
        fit(tiny, data, lambda **event: told.append(event["loss"]), max_steps=2, **recipe)
        return told[0]

    assert first_loss(batch_size=16) == pytest.approx(first_loss(batch_size=8, accumulate=2), rel=1e-5)


def test_a_seed_repeats_a_run(tiny: ModelFiles, data: Dataset, tmp_path: Path) -> None:
    losses = [fit(tiny, data, seed=seed, max_steps=6).metrics["dev_loss"] for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_max_steps_ends_a_run(tiny: ModelFiles, data: Dataset) -> None:
    assert fit(tiny, data, max_steps=3).metrics["steps"] == 3


def test_early_stop_keeps_the_best_weights(tiny: ModelFiles, data: Dataset) -> None:
    """A dev split whose answers contradict the training rows: learning makes it worse, soon."""
    contrary = {"red": "green", "green": "blue", "blue": "grey", "grey": "red"}
    data = replace(data, dev=tuple(replace(e, answer=contrary[e.answer]) for e in data.dev))
    told: list[dict[str, Any]] = []
    fitted = fit(tiny, data, lambda **event: told.append(event), epochs=40, eval_every=4, patience=2)
    seen = [event["dev_loss"] for event in told if "dev_loss" in event]
    assert fitted.metrics["stopped_early"]
    assert fitted.metrics["steps"] < 320
    assert fitted.metrics["dev_loss"] == pytest.approx(min(seen), rel=1e-4)
    assert seen.index(min(seen)) == len(seen) - 3


def test_a_loss_that_is_no_number_is_an_error_that_names_the_remedy() -> None:
    weight = torch.nn.Parameter(torch.tensor(float("nan")))

    def forward(pack: Any) -> Any:
        return weight * torch.ones(len(pack.keep), 10)

    rows = [Encoded((1, 2), (3,)), Encoded((1, 4), (5,))]
    with pytest.raises(BadRequest, match="lower learning_rate"):
        optimise(NextToken(forward), [Group([weight])], rows, rows, Recipe(), Watch(quiet))


def test_rows_that_do_not_fit_are_an_error_or_are_named(
    tiny: ModelFiles, data: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError, match="No row fits 16 tokens"):
        fit(tiny, data, max_length=16)
    long = Example("giant", (Message("user", "x" * 2000),), "red", "x")
    with caplog.at_level(logging.WARNING):
        assert fit(tiny, replace(data, train=(*data.train, long)), max_steps=1).metrics["train_rows"] == 60
    assert "giant" in caplog.text
    with pytest.raises(BadRequest, match="raise max_length"):
        fit(tiny, replace(data, train=(*data.train, *[long] * 5)), max_steps=1)


def test_unknown_methods_and_modules_are_refused_by_name(tiny: ModelFiles, data: Dataset) -> None:
    with pytest.raises(BadRequest, match=r"use one of .*lora"):
        find_method("magic")
    with pytest.raises(BadRequest, match="target_modules"):
        fit(tiny, data, target_modules=("w_z",))


# --- publication ---------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def store(settings: Settings) -> AdapterStore:
    return AdapterStore(settings.rooms, State(settings.rooms.database))


def publish(task: Path, settings: Settings, store: AdapterStore, embedder: Embedder, model: ModelFiles, **more: Any):
    given = {"name": None, "overrides": {**FAST, "epochs": 2}, "progress": quiet, **more}
    return train(task, settings=settings, store=store, embedder=embedder, model=model, **given)


def test_what_is_published_is_what_was_trained(
    task: Path, settings: Settings, store: AdapterStore, embedder: Embedder, tiny: ModelFiles
) -> None:
    result = publish(task, settings, store, embedder, tiny)
    assert (result.adapter, result.version) == ("colours", 1)
    check(result.path, read_base(tiny.path, tiny.sha256), 32)
    card = store.resolve("colours@1").card
    assert card["base_sha256"] == tiny.sha256
    assert card["metrics"]["dev_loss"] == result.metrics["dev_loss"]
    assert card["data"]["rows"] == 76
    config = json.loads((result.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert "CC0-1.0" in (result.path / "README.md").read_text()

    base = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    model = PeftModel.from_pretrained(base, result.path).eval()
    losses = total = 0.0
    for example in read_dataset(task).dev:
        text = render(tokenizer, example.messages)
        prompt, answer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, example.answer))
        ids, labels = [*prompt, *answer, 2], [*[-100] * len(prompt), *answer, 2]
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
        losses += float(loss.detach()) * (len(answer) + 1)
        total += len(answer) + 1
    assert losses / total == pytest.approx(result.metrics["dev_loss"], rel=1e-4)

    recorded = card["canary"]
    ids = tokenizer(recorded["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert recorded["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)


def test_the_shelf_goes_with_the_adapter(
    task: Path, settings: Settings, store: AdapterStore, embedder: Embedder, tiny: ModelFiles
) -> None:
    result = publish(task, settings, store, embedder, tiny, name="shades")
    shelf = Shelf.load(result.path)
    assert shelf.name == "shades"
    assert shelf.embedder == embedder.query_digest
    assert (len(shelf.messages), shelf.vectors.shape, shelf.bare.shape) == (60, (60, embedder.dim), (60, embedder.dim))
    ((message, answer, similarity),) = shelf.nearest(embedder.embed_query("Name the colour.\n\nitem 8 is red!!!"), 1)
    assert message == "Name the colour.\n\nitem 8 is red!!!"
    assert (answer, round(similarity, 2)) == ("red", 1.0)


def test_the_recipe_of_the_room_counts_and_versions_follow_one_another(
    task: Path, settings: Settings, store: AdapterStore, embedder: Embedder, tiny: ModelFiles
) -> None:
    room = settings.rooms.adapters / "colours"
    room.mkdir(parents=True)
    (room / "recipe.toml").write_text('rank = 2\nmax_steps = 2\nprecision = "float32"\n')
    results = [publish(task, settings, store, embedder, tiny, overrides={"batch_size": 8}) for _ in range(2)]
    assert [r.version for r in results] == [1, 2]
    assert json.loads((results[0].path / "adapter_config.json").read_text())["r"] == 2
    assert results[0].metrics["dev_sha256"] == results[1].metrics["dev_sha256"]


def test_an_interrupted_run_publishes_nothing(
    task: Path, settings: Settings, store: AdapterStore, embedder: Embedder, tiny: ModelFiles
) -> None:
    def interrupt(**told: Any) -> None:
        if told.get("step") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(task, settings, store, embedder, tiny, progress=interrupt)
    store.refresh()
    assert store.versions() == []
    assert not [path for path in settings.rooms.adapters.rglob("*") if path.is_file()]


def test_a_bad_name_is_refused_before_anything_is_read(
    settings: Settings, store: AdapterStore, embedder: Embedder, tiny: ModelFiles
) -> None:
    with pytest.raises(Refused, match="cannot name"):
        publish(Path("/nowhere"), settings, store, embedder, tiny, name="../x")


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose base model is the tiny one; `hybrid …` runs in it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HYBRID_MODEL", str(tiny.path))
    monkeypatch.setenv("HYBRID_HOME", str(home))
    return home


SETS = [word for key, value in FAST.items() for word in ("--set", f"{key}={value}")]


def test_the_first_version_takes_the_name_and_a_worse_one_does_not(command: Path, task: Path) -> None:
    told = [
        json.loads(hybrid(command, "train", str(task), "--json", *SETS, *more).stdout.splitlines()[-1])
        for more in ([], ["--set", "learning_rate=1e-7"])
    ]
    assert [(t["adapter"], t["version"], t["promoted"]) for t in told] == [
        ("colours", 1, True),
        ("colours", 2, False),
    ]
    assert told[0]["metrics"]["dev_loss"] < told[1]["metrics"]["dev_loss"]
    assert (Path(told[1]["path"]) / "adapter_model.safetensors").is_file()


def test_an_interrupt_exits_130_and_leaves_nothing(command: Path, task: Path) -> None:
    argv = [sys.executable, "-m", "hybrid.cli", "train", str(task), "--progress-json", *SETS, "--set", "epochs=500"]
    argv += ["--set", "early_stop=false"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=command) as process:
        while "step" not in json.loads(process.stdout.readline()):
            pass
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) == 130
    assert not list((command / "adapters").rglob("*.safetensors"))
