"""Every method is a word: it trains on real rows, and what it publishes is what was measured, whoever opens it."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.adapters.kinds import check_other
from hybrid.adapters.preflight import check, read_base
from hybrid.adapters.store import AdapterStore, AdapterVersion
from hybrid.errors import BadRequest, ModelNotFound
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.batches import encode, end_of_turn
from hybrid.training.data import read_dataset
from hybrid.training.lora import adapted
from hybrid.training.methods import METHODS
from hybrid.training.rates import groups
from hybrid.training.recipes import DEFAULTS, ONLY, Recipe, load_recipe
from hybrid.training.run import train

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"epochs": 2, "batch_size": 4, "eval_every": 8, "precision": "float32", "max_length": 2048}
RANKED = {"rank": 4, "alpha": 8, "learning_rate": 1e-2}
#: how each is trained here: the tiny base is random, so that its rates are not those of a real one
TRAINED: dict[str, dict[str, Any]] = {
    "lora": RANKED,
    "rslora": {**RANKED, "alpha": 4},
    "lora_plus": {**RANKED, "learning_rate": 1e-3},
    "dora": RANKED,
    "qlora": RANKED,
    "ia3": {"learning_rate": 5e-2},
    "prompt_tuning": {"virtual_tokens": 4},
    "prefix_tuning": {"virtual_tokens": 16, "learning_rate": 0.5, "epochs": 3},
    "full": {"learning_rate": 2e-3, "layer_decay": 0.8, "embedding_rate": 0.5},
    "last_layers": {"learning_rate": 2e-3, "layers": 1},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows of one task, few of them, of its first labels."""
    source, folder = data / "intent_banking77", tmp_path_factory.mktemp("task")
    about = json.loads((source / "task.json").read_text())
    about |= {"instruction": "Name the intent.", "labels": about["labels"][:8]}
    (folder / "task.json").write_text(json.dumps(about))
    for split, count in (("train", 16), ("dev", 8)):
        with (source / f"{split}.jsonl").open() as lines:
            fitting = (line for line in lines if json.loads(line)["reference"] in about["labels"])
            (folder / f"{split}.jsonl").write_text("".join(islice(fitting, count)))
    return folder


@pytest.fixture
def publish(task: Path, tiny: ModelFiles, embedder: Embedder, tmp_path: Path) -> Any:
    """Trains a method and returns the store with what it published."""
    settings = Settings.load(home=tmp_path)

    def run(method: str, **recipe: Any) -> tuple[AdapterStore, AdapterVersion]:
        store = AdapterStore(settings.rooms, State(settings.rooms.database), tiny.sha256)
        overrides = {**QUICK, "method": method, **recipe}
        done = train(
            task, settings=settings, name="bank", overrides=overrides, progress=lambda **_: None, store=store,
            embedder=embedder, model=tiny,
        )  # fmt: skip
        assert done is not None
        return store, store.resolve(f"{done.adapter}@{done.version}")

    return run


def loss_of(model: Any, tiny: ModelFiles, task: Path) -> float:
    """The dev loss by the library's own forward: one row at a time, everything but the answer masked."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    rows, _ = encode(tokenizer, read_dataset(task).dev, end=end_of_turn(tokenizer, [2]), max_length=4096)
    total = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(row.answer) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer), reduction="sum"))
    return total / sum(len(row.answer) for row in rows)


def reopened(version: AdapterVersion, tiny: ModelFiles, dtype: torch.dtype = torch.float32) -> Any:
    """What the field's library makes of the published folder."""
    path = version.ref.path
    if version.card["kind"] == "weights":
        return AutoModelForCausalLM.from_pretrained(path / "model", dtype="auto").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny.path, dtype=dtype)
    return PeftModel.from_pretrained(base, str(path)).eval()


@pytest.fixture(scope="module")
def untrained(tiny: ModelFiles, task: Path) -> float:
    return loss_of(AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32).eval(), tiny, task)


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_learns_and_publishes_what_it_measured(
    method: str, publish: Any, tiny: ModelFiles, task: Path, untrained: float
) -> None:
    store, version = publish(method, **TRAINED[method])
    card = version.card
    assert card["metrics"]["dev_loss"] < untrained
    assert card["metrics"]["dev_loss"] == pytest.approx(loss_of(reopened(version, tiny), tiny, task), rel=1e-3)
    assert card["kind"] in METHODS[method].makes.split(" or ")
    base = read_base(tiny.path, tiny.sha256)
    readme = (version.ref.path / "README.md").read_text()
    header = yaml.safe_load(readme.split("---")[1])
    assert header["library_name"] == ("transformers" if card["kind"] == "weights" else "peft")
    assert "![" in readme
    assert (version.ref.path / "curve.png").is_file()
    if card["kind"] == "lora":
        check(version.ref.path, base, 64)
        return
    check_other(version.ref.path, card, base)
    assert card["serve_with"] in readme
    assert not store.desired()
    with pytest.raises(ModelNotFound, match=re.escape(card["serve_with"])):
        store.model(version.id)


def test_every_method_of_these_families_is_tried() -> None:
    here = {name for name, row in METHODS.items() if row.family in ("prompting", "parameter-efficient", "full")}
    assert here == {*TRAINED, "zero_shot", "few_shot", "prompt_search"}


# --- what each promises ---------------------------------------------------------------------------------------------


def test_rslora_is_scaled_as_peft_scales_it(publish: Any, tiny: ModelFiles) -> None:
    """The scale alpha / sqrt(rank) is in the saved alpha, where an engine that knows LoRA alone finds it."""
    _, version = publish("rslora", max_steps=1, rank=16, alpha=4)
    config = json.loads((version.ref.path / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tiny.path)
    theirs = adapted(base, Recipe(rank=16, alpha=4), "tiny", plain=False, use_rslora=True)
    scale = theirs.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert not config["use_rslora"]
    assert config["lora_alpha"] / config["r"] == pytest.approx(scale) == 1.0


def test_lora_plus_lets_b_learn_faster(tiny: ModelFiles) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(tiny.path), Recipe(layer_decay=0.5), "tiny")
    found = groups(model, 0.5, lambda name, _: 16.0 if ".lora_B." in name else 1.0)
    assert sorted(group.rate for group in found) == [0.5, 1.0, 8.0, 16.0]


def test_a_dora_that_is_a_lora_is_published_as_one(publish: Any, tiny: ModelFiles, task: Path) -> None:
    _, version = publish("dora", **{**RANKED, "learning_rate": 1e-6})
    assert version.card["kind"] == "lora"
    check(version.ref.path, read_base(tiny.path, tiny.sha256), 64)
    assert version.card["metrics"]["dev_loss"] == pytest.approx(loss_of(reopened(version, tiny), tiny, task), rel=1e-3)


def test_qlora_without_its_library_says_what_to_use(publish: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # as where it is not installed
    with pytest.raises(BadRequest, match=r"cannot hold weights in four bits .* use --method lora"):
        publish("qlora")


def test_a_fine_tuned_model_is_one_that_the_next_server_opens(publish: Any, tmp_path: Path) -> None:
    _, version = publish("full", max_steps=1, precision="bfloat16")
    folder = version.ref.path / "model"
    files = materialise(str(folder), tmp_path / "cache")
    assert files.sha256 == version.ref.sha256
    assert read_base(folder).shapes
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_mixed_precision_learns_and_is_saved_as_it_computes(
    publish: Any, tiny: ModelFiles, task: Path, untrained: float
) -> None:
    """Steps smaller than bfloat16 can hold add up, and the model on disk is bfloat16 with the loss on the card."""
    _, version = publish("full", precision="bfloat16", learning_rate=2e-3)
    model = reopened(version, tiny)
    assert model.dtype == torch.bfloat16
    assert version.card["metrics"]["dev_loss"] < untrained - 0.1
    assert version.card["metrics"]["dev_loss"] == pytest.approx(loss_of(model, tiny, task), rel=2e-2)


def test_below_the_last_layers_nothing_moves_and_no_graph_is_kept(publish: Any, tiny: ModelFiles) -> None:
    grad: list[bool] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: grad.append(args[0].requires_grad) if module.training and _is_layer(module, 1) else None
    )
    try:
        _, version = publish("last_layers", layers=1, max_steps=2, learning_rate=2e-3)
    finally:
        hook.remove()
    assert grad
    assert not any(grad)
    before = AutoModelForCausalLM.from_pretrained(tiny.path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(version.ref.path / "model").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.layers.1.") or name == "model.norm.weight" for name in moved)


def _is_layer(module: Any, number: int) -> bool:
    return type(module).__name__ == "LlamaDecoderLayer" and module.self_attn.layer_idx == number


@pytest.mark.parametrize("method", ["zero_shot", "few_shot"])
def test_prompting_is_measured_like_the_rest(method: str, publish: Any, untrained: float) -> None:
    _, version = publish(method, max_length=4096)
    card = version.card
    assert card["kind"] == "prompt"
    assert card["metrics"]["trained_parameters"] == 0
    assert json.loads((version.ref.path / "prompt.json").read_text())["instruction"] == "Name the intent."
    if method == "zero_shot":
        assert card["metrics"]["dev_loss"] == pytest.approx(untrained, rel=1e-3)
    assert card["serve_with"] in (version.ref.path / "README.md").read_text()


def test_the_best_instruction_is_chosen_on_one_half_and_judged_on_the_other(publish: Any, task: Path) -> None:
    _, version = publish("prompt_search", candidates=["Which of the bank's intents is it?"])
    prompt = json.loads((version.ref.path / "prompt.json").read_text())
    losses = [tried["loss"] for tried in prompt["scores"]]
    tried = [tried["instruction"] for tried in prompt["scores"]]
    assert losses == sorted(losses)
    assert prompt["instruction"] == tried[0]
    assert {"Name the intent.", "", "Which of the bank's intents is it?"} <= set(tried)
    assert version.card["metrics"]["dev_sha256"] != read_dataset(task).dev_sha256
    assert prompt["chosen_on"] == prompt["judged_on"] == version.card["metrics"]["dev_rows"] == 4


# --- the recipe and the page ----------------------------------------------------------------------------------------


def test_a_key_of_another_method_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match=r"layers: method 'lora' has no such knob; it is for last_layers\."):
        load_recipe(None, {"layers": 1})
    assert load_recipe(None, {"method": "zero_shot", "rank": 8}).rank == 8  # a common key is never one too many
    assert {name for names in ONLY.values() for name in names} | set(DEFAULTS) <= set(METHODS)


def test_a_method_has_its_own_defaults_and_is_overruled() -> None:
    assert load_recipe(None, {"method": "full"}).learning_rate == DEFAULTS["full"]["learning_rate"]
    assert load_recipe(None, {"method": "full", "learning_rate": 1e-3}).learning_rate == 1e-3


def test_methods_md_is_the_table() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    assert rows == [
        f"| `{name}` | {row.family} | {row.cost} | {row.use} | {row.makes} | {row.served} |"
        for name, row in METHODS.items()
    ]
    keys = dict(re.findall(r"^\| `(\w+)` \| for (.+?) \|", page, re.MULTILINE))
    assert keys == {key: " ".join(f"`{name}`" for name in names) for key, names in ONLY.items()}
