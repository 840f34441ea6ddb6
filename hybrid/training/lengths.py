"""How many tokens the rows have, as the trainer counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.errors import SetupError
from hybrid.models import ModelFiles
from hybrid.training.batches import render
from hybrid.training.formats import Example, Item, Pair, Text


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of each row, prompt and answer and the token that ends it; `limit` is the recipe's `max_length`."""

    tokens: tuple[int, ...]
    limit: int

    @property
    def over(self) -> int:
        """How many rows are longer than the limit."""
        return sum(n > self.limit for n in self.tokens)

    def quantile(self, share: float) -> int:
        """The length that `share` of the rows do not exceed."""
        ordered = sorted(self.tokens)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def wire(self) -> dict[str, Any]:
        """The statistics; `share_over` is of the rows."""
        return {
            "p50": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "max": max(self.tokens, default=0),
            "total": sum(self.tokens),
            "max_length": self.limit,
            "over": self.over,
            "share_over": round(self.over / max(1, len(self.tokens)), 4),
        }


def open_tokenizer(files: ModelFiles) -> Any:
    """The base model's tokenizer, without its weights. Raises SetupError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SetupError(f"The tokenizer of {files.name} cannot be opened: {error}.") from error


def lengths(tokenizer: Any, items: Sequence[Item], limit: int) -> Lengths:
    """The token counts of the items, rendered with the model's chat template; of a pair the longer answer counts."""
    texts = [text for item in items for text in _texts(tokenizer, item)]
    counts = iter([len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else [])
    found = [max(next(counts), next(counts)) if isinstance(item, Pair) else next(counts) for item in items]
    return Lengths(tuple(found), limit)


def _texts(tokenizer: Any, item: Item) -> list[str]:
    if isinstance(item, Text):
        return [item.text]
    prompt = render(tokenizer, item.messages)
    answers = [item.answer] if isinstance(item, Example) else [item.chosen, item.rejected]
    return [prompt + answer for answer in answers]
