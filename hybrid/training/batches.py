"""Rows as tokens: exactly the tokens that vLLM's chat endpoint will see, with the loss on the answer alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid.errors import DataError
from hybrid.training.formats import Example

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Row:
    """One example as token ids: `prompt` is what is asked, `answer` what is learned, its end mark included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows. `ids`, `mask` are int64 [rows, longest]; `at` [n, 2] says where (row, position) an answer token is
    predicted, `labels` [n] which token it is."""

    ids: Tensor
    mask: Tensor
    at: Tensor
    labels: Tensor
    tokens: int


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> tuple[list[Row], int]:
    """The rows that fit `max_length` tokens, and how many did not. Raises DataError when none does.

    The chat template is the model's own, with its generation prompt, as the server applies it.
    """
    end = tokenizer.eos_token_id
    rows: list[Row] = []
    for example in examples:
        text = tokenizer.apply_chat_template(
            [message.wire() for message in example.messages], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        rows.append(Row(tuple(prompt), (*answer, end)))
    kept = [row for row in rows if len(row) <= max_length]
    if not kept:
        raise DataError(f"No row fits max_length={max_length} tokens; raise it with --set max_length=…")
    return kept, len(rows) - len(kept)


def batches(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    """One epoch: rows of like length together (little padding), the batches in random order."""
    noisy = sorted(rows, key=lambda row: len(row) + rng.random() * 8)
    cut = [list(noisy[i : i + size]) for i in range(0, len(noisy), size)]
    rng.shuffle(cut)
    yield from cut


def collate(rows: Sequence[Row], pad: int) -> Batch:
    """Pads rows on the right. The last answer token predicts nothing and is left out."""
    import torch

    longest = max(len(row) for row in rows) - 1
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    at: list[tuple[int, int]] = []
    labels: list[int] = []
    for i, row in enumerate(rows):
        tokens = (*row.prompt, *row.answer)[:-1]
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        first = len(row.prompt) - 1
        at += [(i, first + k) for k in range(len(row.answer))]
        labels += row.answer
    return Batch(ids, mask, torch.tensor(at), torch.tensor(labels), sum(len(row) for row in rows))
