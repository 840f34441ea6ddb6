"""What the tests of objectives share: a home with one verb, small samples of real tasks, and pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hybrid.adapters.store import AdapterStore
from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles
from hybrid.settings import Settings
from hybrid.state import State
from hybrid.training.batches import Encoded
from hybrid.training.data import Dataset
from hybrid.training.job import Job
from hybrid.training.loop import Watch
from hybrid.training.preference import Choice
from hybrid.training.recipes import Recipe
from hybrid.training.run import TrainResult, train

FAST = {"rank": 4, "alpha": 8, "batch_size": 8, "learning_rate": 1e-2, "precision": "float32", "max_steps": 8}


class House:
    """A home with the tiny base, and one verb."""

    def __init__(self, home: Path, tiny: ModelFiles, embedder: Embedder) -> None:
        retrieval = {"top_k": 2, "passage_budget_tokens": 500}
        self.settings = Settings.load(home=home, retrieval=retrieval)
        self.store = AdapterStore(self.settings.rooms, State(self.settings.rooms.database), tiny.sha256)
        self.tiny, self.embedder, self.told = tiny, embedder, []

    def train(self, source: Path | Sequence[Path], name: str = "new", **overrides: Any) -> TrainResult:
        result = train(
            source, settings=self.settings, name=name, overrides={**FAST, **overrides},
            progress=lambda **told: self.told.append(told), store=self.store, embedder=self.embedder, model=self.tiny,
        )  # fmt: skip
        assert result is not None
        return result

    def job(self, data: Dataset, recipe: Recipe, name: str) -> Job:
        return Job(data, recipe, self.tiny, Watch(lambda **_: None), self.embedder, self.settings, name)

    def card(self, result: TrainResult) -> dict[str, Any]:
        return json.loads((result.path / "card.json").read_text())


def rows(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    with (folder / f"{split}.jsonl").open() as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def write(folder: Path, **splits: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def sample(data: Path, task: str, folder: Path, train: int = 48, dev: int = 12) -> Path:
    """A task folder with the first rows of a real one."""
    write(folder, train=rows(data / task, "train", train), dev=rows(data / task, "dev", dev))
    about = json.loads((data / task / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(about))
    return folder


def preferences(data: Path, folder: Path, train: int = 24, dev: int = 8) -> Path:
    """Real questions with the right label, and as the worse answer a longer text that is no label."""

    def pairs(split: str, count: int) -> list[dict[str, Any]]:
        found = rows(data / "intent_banking77", split, count)
        return [
            {"id": r["id"], "prompt": r["input"][:60], "chosen": r["reference"], "rejected": f"I do not know, {n}."}
            for n, r in enumerate(found)
        ]

    return write(folder, train=pairs("train", train), dev=pairs("dev", dev))


def choices(tiny: ModelFiles, count: int = 7) -> list[Choice]:
    """Pairs of random tokens, some with a common beginning, of different lengths."""
    dice = torch.Generator().manual_seed(3)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (n,), generator=dice).tolist())

    start = tokens(9)
    made = []
    for n in range(count):
        prompt = (start if n % 2 else ()) + tokens(4 + n)
        made.append(
            Choice(Encoded(prompt, (*tokens(3 + n), 2)), Encoded(prompt, (*tokens(8 - n), 2)), reference=0.3 * n - 1)
        )
    return made


def padded(found: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) [n, longest], padded on the right."""
    width = max(map(len, found))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in found])
    return ids, torch.tensor([[*[1] * len(row), *[0] * (width - len(row))] for row in found])


def plain_logprobs(model: Any, found: Sequence[Encoded]) -> torch.Tensor:
    """Of whole answers, by padded rows and transformers' own attention."""
    ids, mask = padded([[*row.prompt, *row.answer] for row in found])
    logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    each = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return torch.stack([
        each[n, len(row.prompt) - 1 : len(row.prompt) + len(row.answer) - 1].sum() for n, row in enumerate(found)
    ])  # fmt: skip
