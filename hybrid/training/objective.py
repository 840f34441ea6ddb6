"""What a run minimises: a loss over rows, its gradient, and how both are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hybrid.training.batches import Encoded, Pack, packs
from hybrid.training.kernels import fast_loss

if TYPE_CHECKING:
    from torch import Tensor

#: logits [A, vocabulary] of a pack's answer places
Forward = Callable[[Pack], "Tensor"]


class Objective(Protocol):
    """A loss that is a sum over rows divided by a sum of weights, so that shares of a batch add up to the batch."""

    def weight(self, rows: Sequence[Any]) -> float:
        """What the summed loss of these rows is divided by: their answer tokens, or their number."""

    def backward(self, rows: Sequence[Any], scale: float) -> float:
        """Adds the gradient of `scale` times the summed loss, and returns that number."""

    def total(self, rows: Sequence[Any]) -> float:
        """The summed loss, without gradients."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """Cross-entropy of the answer tokens, in nats."""

    forward: Forward
    cut: Callable[[Sequence[Encoded]], Iterable[Pack]] = packs

    def weight(self, rows: Sequence[Encoded]) -> float:
        """Answer tokens."""
        return float(sum(len(row.answer) for row in rows))

    def backward(self, rows: Sequence[Encoded], scale: float) -> float:
        """One forward and backward pass a pack."""
        total = 0.0
        for pack in self.cut(rows):
            logits = self.forward(pack)
            loss = fast_loss()(logits, pack.targets.to(logits.device), scale)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def total(self, rows: Sequence[Encoded]) -> float:
        """Summed over answer tokens."""
        return measure(self.forward, rows, self.cut).loss * self.weight(rows)


@dataclass(frozen=True, slots=True)
class Measured:
    """How well answers are predicted, teacher-forced. `exact` is the share of rows a greedy decoder would get whole."""

    loss: float
    token_accuracy: float
    exact: float


def measure(
    forward: Forward, rows: Sequence[Encoded], cut: Callable[[Sequence[Encoded]], Iterable[Pack]] = packs
) -> Measured:
    """Mean loss in nats an answer token, the share of tokens right, the share of answers all right; 0 of none."""
    import torch

    loss = right = whole = 0.0
    tokens = sum(len(row.answer) for row in rows) or 1
    with torch.no_grad():
        for pack in cut(rows):
            logits = forward(pack).float()
            targets = pack.targets.to(logits.device)
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            hits = (logits.argmax(-1) == targets).cpu()
            right += float(hits.sum())
            got = torch.zeros(pack.rows).scatter_reduce(0, pack.owners, hits.float(), "amin", include_self=False)
            whole += float(got.sum())
    return Measured(loss / tokens, right / tokens, whole / (len(rows) or 1))
