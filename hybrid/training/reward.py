"""A reward model: how good an answer is, as one number, learned from preferences (Bradley and Terry 1952; Ouyang et al.
2022, arXiv 2203.02155), and best-of-n by it, the practical face of learning from human feedback.

LoRA in the body, and in place of the output embeddings one row that reads the last token of the answer. It scores
answers; it writes none, so no engine loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.adapters.preflight import read_card
from hybrid.errors import Refused
from hybrid.models import ModelFiles
from hybrid.training.base import forward_of, load_base, stops
from hybrid.training.batches import Encoded, Pack, end_of_turn, packs, render
from hybrid.training.job import Fitted, Job
from hybrid.training.lora import adapted
from hybrid.training.objective import Forward
from hybrid.training.preference import Choice, Preferring, Rate, encoded_pairs, prefer
from hybrid.training.start import take_up
from hybrid.types.request import Message

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "reward.safetensors"
SERVE_WITH = "scores answers and writes none: hybrid.training.reward.Scorer opens it, and best_of chooses by it"


def fit(job: Job) -> Fitted:
    """Trains a reward model. Raises DataError for data without pairs."""
    import torch

    torch.manual_seed(job.recipe.seed)
    base, tokenizer = load_base(job.model, job.recipe.precision)
    end = end_of_turn(tokenizer, stops(base))
    train, dev = ([scored(row) for row in rows] for rows in encoded_pairs(tokenizer, job, end))
    model = adapted(base, job.recipe, job.model.name)
    take_up(model, job)
    head = with_head(model)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    metrics, curve = prefer(job, Preferring(scores(forward_of(model))), weights, train, dev)

    def save(folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        model.save_pretrained(str(folder), save_embedding_layers=False)
        save_file({"weight": head.weight.detach().cpu()}, folder / HEAD)
        return {}

    return Fitted(metrics, curve, save, "peft", SERVE_WITH)


def scored(row: Choice) -> Choice:
    """The pair as texts of which the last token is read: a place whose output, the score, predicts nothing."""
    return replace(row, chosen=_whole(row.chosen), rejected=_whole(row.rejected))


def _whole(row: Encoded) -> Encoded:
    return Encoded((*row.prompt, *row.answer), row.answer[-1:])


def scores(forward: Forward) -> Rate:
    """The score of each row of a pack [rows]."""

    def rate(pack: Pack) -> Tensor:
        return forward(pack)[:, 0]

    return rate


def with_head(model: Any) -> Any:
    """Puts a score of zero for everything in the place of the output embeddings, in float32, and returns it."""
    base = model.get_base_model()
    head = _head()(base.config.hidden_size).to(base.device)
    base.set_output_embeddings(head)
    return head


@cache
def _head() -> type:
    import torch

    class Head(torch.nn.Linear):
        """Hidden states [1, n, hidden] to scores [1, n, 1]."""

        def __init__(self, hidden: int) -> None:
            super().__init__(hidden, 1, bias=False)
            torch.nn.init.zeros_(self.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    return Head


@dataclass(frozen=True, slots=True)
class Scorer:
    """A published reward model, open."""

    tokenizer: Any
    forward: Forward
    end: int

    @classmethod
    def open(cls, folder: Path, base: ModelFiles, precision: str = "bfloat16") -> Scorer:
        """The reward model of a version folder, on its base. Raises Refused for another base or another artefact."""
        from peft import PeftModel
        from safetensors.torch import load_file

        card = read_card(folder)
        if card.get("method") != "reward" or card.get("base_sha256") != base.sha256:
            raise Refused(
                f"{folder.parent.name}/{folder.name} is no reward model of {base.name}; train one with --method reward."
            )
        body, tokenizer = load_base(base, precision)
        end = end_of_turn(tokenizer, stops(body))
        model = PeftModel.from_pretrained(body, str(folder)).eval()
        with_head(model).load_state_dict(load_file(folder / HEAD))
        return cls(tokenizer, forward_of(model), end)

    def score(self, messages: Sequence[Message], answer: str) -> float:
        """How good the answer is: a number that compares with those of other answers to the same messages alone."""
        return self.scores(messages, [answer])[0]

    def scores(self, messages: Sequence[Message], answers: Sequence[str]) -> list[float]:
        """The score of each answer; the messages are read once."""
        import torch

        prompt = self.tokenizer(render(self.tokenizer, messages), add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        rows = [Encoded((*prompt, *answer, self.end), (self.end,)) for answer in ids]
        order = sorted(range(len(rows)), key=lambda n: rows[n].length)  # as packs() takes them
        with torch.no_grad():
            found = [score for pack in packs(rows) for score in scores(self.forward)(pack).tolist()]
        by_row = dict(zip(order, found, strict=True))
        return [by_row[n] for n in range(len(rows))]


def best_of(scorer: Scorer, messages: Sequence[Message], answers: Sequence[str]) -> str:
    """The answer with the highest score (best-of-n, Stiennon et al. 2020, arXiv 2009.01325)."""
    rated = scorer.scores(messages, answers)
    return answers[max(range(len(answers)), key=rated.__getitem__)]
