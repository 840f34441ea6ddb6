"""Learning from preferences: pairs of answers to one prompt, of which one is the better.

`dpo` (Rafailov et al. 2023, arXiv 2305.18290) raises the probability of the better answer against a reference, which
is the model as the run starts: its log-probabilities are computed once, so there is no second model. A reward model
(`reward.py`) minimises the same loss over scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from hybrid.errors import DataError
from hybrid.training.base import check_long, forward_of, load_base, stops
from hybrid.training.batches import PACK_TOKENS, Encoded, Pack, end_of_turn, lay_out, render, shared
from hybrid.training.data import DEV_LIMIT, digest
from hybrid.training.formats import Pair
from hybrid.training.job import Fitted, Job
from hybrid.training.loop import Group, optimise
from hybrid.training.lora import adapted, canary_text, save_adapter
from hybrid.training.objective import Forward
from hybrid.training.start import take_up
from hybrid.training.supervised import run_metrics

if TYPE_CHECKING:
    from torch import Tensor

#: a forward pass of few tokens costs about as much as one of this many
PASS_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """A pair as token ids; `reference` is the log-odds of the better answer that the run started with, in nats."""

    chosen: Encoded
    rejected: Encoded
    reference: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of both as they would stand alone."""
        return self.chosen.length + self.rejected.length


#: a number for each row of a pack [rows]: a log-probability, or a score
Rate = Callable[[Pack], "Tensor"]


def fit(job: Job) -> Fitted:
    """DPO with LoRA. Raises DataError for data without pairs."""
    import torch

    torch.manual_seed(job.recipe.seed)
    base, tokenizer = load_base(job.model, job.recipe.precision)
    train, dev = encoded_pairs(tokenizer, job, end_of_turn(tokenizer, stops(base)))
    model = adapted(base, job.recipe, job.model.name)
    take_up(model, job)
    rate = answer_logprobs(forward_of(model))
    train, dev = (referenced(rate, rows) for rows in (train, dev))
    text = canary_text(job, tokenizer)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    metrics, curve = prefer(job, Preferring(rate, job.recipe.beta), weights, train, dev)
    return Fitted(metrics, curve, lambda folder: save_adapter(model.eval(), tokenizer, text, folder))


def prefer(
    job: Job, objective: Preferring, weights: Sequence[Tensor], train: Sequence[Choice], dev: Sequence[Choice]
) -> tuple[dict[str, Any], Sequence[Any]]:
    """Trains on pairs; (metrics, curve). `dev_sha256` names pairs and method: only losses of both compare."""
    groups = [Group(weights)]
    report = optimise(objective, groups, train, dev, job.recipe, job.watch)
    margins = objective.margins(dev)
    metrics = {
        "dev_loss": round(objective.total(dev) / len(dev), 5),
        "dev_preference_accuracy": round(sum(margin > 0 for margin in margins) / len(margins), 4),
        "dev_margin": round(sum(margins) / len(margins), 4),
        "dev_rows": len(dev),
        "dev_sha256": f"{digest(job.data.dev_items)}-{job.recipe.method}",
        **run_metrics(report, groups, len(train)),
    }
    return metrics, report.curve


@dataclass(frozen=True, slots=True)
class Preferring:
    """−log σ(β · (better − worse − reference)), summed over pairs: Bradley and Terry's model of a choice."""

    rate: Rate
    beta: float = 1.0

    def weight(self, rows: Sequence[Choice]) -> float:
        """Pairs."""
        return float(len(rows))

    def backward(self, rows: Sequence[Choice], scale: float) -> float:
        """One forward and backward pass a pack."""
        total = 0.0
        for group, pack in choice_packs(rows):
            loss = self._loss(group, pack) * scale
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def total(self, rows: Sequence[Choice]) -> float:
        """Summed over pairs."""
        import torch

        with torch.no_grad():
            return sum(float(self._loss(group, pack)) for group, pack in choice_packs(rows))

    def margins(self, rows: Sequence[Choice]) -> list[float]:
        """β · (better − worse − reference) of each pair, in no particular order."""
        import torch

        with torch.no_grad():
            return [margin for group, pack in choice_packs(rows) for margin in self._margin(group, pack).tolist()]

    def _loss(self, group: Sequence[Choice], pack: Pack) -> Tensor:
        import torch

        return -torch.nn.functional.logsigmoid(self._margin(group, pack)).sum()

    def _margin(self, group: Sequence[Choice], pack: Pack) -> Tensor:
        rates = self.rate(pack)
        reference = rates.new_tensor([row.reference for row in group])
        return self.beta * (rates[0::2] - rates[1::2] - reference)


def answer_logprobs(forward: Forward) -> Rate:
    """The log-probability of each row's whole answer, in nats."""
    import torch

    def rate(pack: Pack) -> Tensor:
        logits = forward(pack).float()
        losses = torch.nn.functional.cross_entropy(logits, pack.targets.to(logits.device), reduction="none")
        return -losses.new_zeros(pack.rows).index_add(0, pack.owners.to(logits.device), losses)

    return rate


def referenced(rate: Rate, rows: Sequence[Choice]) -> list[Choice]:
    """The pairs with what the model says of them now as their reference."""
    import torch

    found: dict[Choice, float] = {}
    with torch.no_grad():
        for group, pack in choice_packs(rows):
            rates = rate(pack)
            found.update(zip(group, (rates[0::2] - rates[1::2]).tolist(), strict=True))
    return [replace(row, reference=found[row]) for row in rows]


def choice_packs(rows: Sequence[Choice], limit: int = PACK_TOKENS) -> Iterator[tuple[list[Choice], Pack]]:
    """Whole pairs as forward passes, better and worse in turn. A pair shares its prompt; pairs stand together where
    what all their prompts share makes that cheaper than a pass of their own. One longer than `limit` goes alone."""
    group: list[Choice] = []
    for row in sorted(rows, key=lambda row: row.length):
        apart = _tokens(group) + _tokens([row]) + PASS_TOKENS if group else limit
        if group and _tokens([*group, row]) > min(limit, apart):
            yield group, lay_out(_rows(group))
            group = []
        group = [*group, row]
    if group:
        yield group, lay_out(_rows(group))


def _rows(group: Sequence[Choice]) -> list[Encoded]:
    return list(chain.from_iterable((row.chosen, row.rejected) for row in group))


def _tokens(group: Sequence[Choice]) -> int:
    rows = _rows(group)
    prefix = shared(rows)
    return prefix + len(rows) * (max(row.length for row in rows) - 1 - prefix)


def encoded_pairs(tokenizer: Any, job: Job, end: int) -> tuple[list[Choice], list[Choice]]:
    """Training and dev pairs as token ids. Raises DataError without pairs, BadRequest when too many are too long."""
    if not job.data.pairs:
        raise DataError(
            f"{job.recipe.method} learns from preferences, and {job.data.name} has none; give rows with `prompt`, "
            "`chosen` and `rejected`."
        )
    train, dev = (
        _encoded(tokenizer, p, end, job.recipe.max_length) for p in (job.data.pairs, job.data.dev_pairs[:DEV_LIMIT])
    )
    return train, dev


def _encoded(tokenizer: Any, pairs: Sequence[Pair], end: int, max_length: int) -> list[Choice]:
    def ids(texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return found

    prompts = ids([render(tokenizer, pair.messages) for pair in pairs])
    chosen, rejected = ids([pair.chosen for pair in pairs]), ids([pair.rejected for pair in pairs])
    rows = [
        Choice(Encoded(tuple(p), (*better, end)), Encoded(tuple(p), (*worse, end)))
        for p, better, worse in zip(prompts, chosen, rejected, strict=True)
    ]
    longest = [max(row.chosen.length, row.rejected.length) for row in rows]
    check_long(
        [pair.id for pair, length in zip(pairs, longest, strict=True) if length > max_length], len(pairs), max_length
    )
    return [row for row, length in zip(rows, longest, strict=True) if length <= max_length]
