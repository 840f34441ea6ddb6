"""Rows as token ids, and the layout that makes training them cheap.

A batch is one sequence: the tokens that all its prompts begin with, once, then every row's own tokens, padded to the
longest of them. Rows see the shared beginning and themselves, never one another, so the loss is exactly that of the
rows trained one by one, while a task's instruction is computed once a batch instead of once a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hybrid.errors import DataError, SetupError
from hybrid.training.formats import Example
from hybrid.types.request import Message

if TYPE_CHECKING:
    from torch import Tensor

#: tokens of one forward pass at most, shared beginning and padding included: bounds the memory of a step
PACK_TOKENS = 1024
#: rows are sorted by length within this many batches: little padding, and an order that is still random
WINDOW = 16
#: rows that are looked at whatever they cost
FEWEST = 32


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids. `answer` ends with the token that ends a turn."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the row as it would stand alone."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass, T = prefix + rows · width tokens.

    `ids`, `positions` [1, T]; `mask` [1, 1, width, prefix + width] and `prefix_mask` [1, 1, prefix, prefix], 0 where a
    token may look and -inf where not;
    `keep` [A] the places whose logits predict an answer token; `targets` [A] those tokens; `owners` [A] their rows.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    prefix_mask: Tensor
    keep: Tensor
    targets: Tensor
    owners: Tensor
    rows: int


def render(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The prompt as the engine's chat endpoint makes it: the model's own template, ready for the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise SetupError("The base model has no chat template, so it cannot be served as a chat; choose another model.")
    wire = [{"role": message.role, "content": message.text} for message in messages]
    return str(tokenizer.apply_chat_template(wire, tokenize=False, add_generation_prompt=True))


def end_of_turn(tokenizer: Any, eos: Sequence[int]) -> int:
    """The token that ends an answer: what the template writes after one, if the engine stops there."""
    turn = [Message("user", "a"), Message("assistant", "b")]
    wire = [{"role": message.role, "content": message.text} for message in turn]
    text = str(tokenizer.apply_chat_template(wire, tokenize=False))
    after: list[int] = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False)["input_ids"]
    stops = [token for token in after if token in eos]
    return stops[0] if stops else int(tokenizer.eos_token_id)


def encode(
    tokenizer: Any, examples: Sequence[Example], *, end: int, max_length: int
) -> tuple[list[Encoded], list[Example]]:
    """The rows that fit `max_length` tokens, and the examples that do not. Raises DataError when none fits."""
    prompts = [render(tokenizer, example.messages) for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    rows = [Encoded(tuple(p), (*a, end)) for p, a in zip(prompt_ids, answer_ids, strict=True)]
    fitting = [row for row in rows if row.length <= max_length]
    if not fitting:
        raise DataError(f"No row fits {max_length} tokens; raise max_length or shorten the rows.")
    return fitting, [e for e, row in zip(examples, rows, strict=True) if row.length > max_length]


class Sized(Protocol):
    """A row of any objective: `length` is its tokens, by which batches are sorted and throughput is counted."""

    @property
    def length(self) -> int: ...


Row = TypeVar("Row", bound=Sized)


def first(rows: Sequence[Row], tokens: int, *, most: int | None = None) -> Sequence[Row]:
    """The first rows, as many as `tokens` hold and `most` allows; at least `FEWEST`, if there are so many.

    What is measured beside training is bounded by what it costs, since long rows cost as much to look at as to learn.
    """
    total = 0
    for n, row in enumerate(rows[:most]):
        total += row.length
        if total > tokens and n >= FEWEST:
            return rows[:n]
    return rows[:most]


def batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches of `size` rows of like length, for ever: a new order each epoch, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        order = list(rows)
        rng.shuffle(order)
        for start in range(0, len(order), size * WINDOW):
            window = sorted(order[start : start + size * WINDOW], key=lambda row: row.length)
            cut = [window[n : n + size] for n in range(0, len(window), size)]
            rng.shuffle(cut)
            yield from cut


def packs(rows: Sequence[Encoded], limit: int = PACK_TOKENS) -> Iterator[Pack]:
    """The rows in as many forward passes as `limit` tokens ask for; a row that is longer than that goes alone."""
    left = sorted(rows, key=lambda row: row.length)
    while left:
        prefix = shared(left)
        take = 1
        while take < len(left) and prefix + (take + 1) * (left[take].length - 1 - prefix) <= limit:
            take += 1
        # shares of like size: sixteen rows that need two passes are eight and eight
        take = -(-len(left) // -(-len(left) // take))
        yield lay_out(left[:take])
        left = left[take:]


def shared(rows: Sequence[Encoded]) -> int:
    """How many tokens all prompts begin with; the last one stays each row's own, because it predicts the answer."""
    low, high = min(row.prompt for row in rows), max(row.prompt for row in rows)  # what these share, all share
    limit = min(len(row.prompt) for row in rows) - 1
    return next((n for n in range(limit) if low[n] != high[n]), limit)


def lay_out(rows: Sequence[Encoded]) -> Pack:
    """One pass over all the rows, in their order; `owners` are their places in it."""
    import torch

    prefix = shared(rows)
    width = max(row.length for row in rows) - 1 - prefix
    ids = list(rows[0].prompt[:prefix])
    keep: list[int] = []
    for row in rows:
        own = [*row.prompt[prefix:], *row.answer[:-1]]  # the last token predicts nothing
        first = len(ids) + len(row.prompt) - prefix - 1
        keep += range(first, first + len(row.answer))
        ids += own + [0] * (width - len(own))
    positions = [*range(prefix), *list(range(prefix, prefix + width)) * len(rows)]
    owners = [n for n, row in enumerate(rows) for _ in row.answer]
    return Pack(
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        mask=torch.full((1, 1, width, prefix + width), -torch.inf).triu_(prefix + 1),
        prefix_mask=torch.full((1, 1, prefix, prefix), -torch.inf).triu_(1),
        keep=torch.tensor(keep),
        targets=torch.tensor([token for row in rows for token in row.answer]),
        owners=torch.tensor(owners),
        rows=len(rows),
    )
