"""Several processes on one run: each takes its share of every batch, and the sums are those of one process.

`accelerate launch -m hybrid.cli train …` starts them. A gradient is the sum of the shares' gradients over the same
denominator, so two processes make the steps that one makes, up to the order of additions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among `size` of them; rank 0 speaks, saves and publishes."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """Every `size`-th row, from this process's rank on: shares of like length, since batches are sorted."""
        return rows[self.rank :: self.size] if self.size > 1 else rows

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds up the gradients of all processes, in place, as one message."""
        if self.size == 1:
            return
        import torch

        grads = []
        for parameter in parameters:
            if parameter.grad is None:  # this process had no row in a last, small batch
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over all processes."""
        if self.size == 1:
            return list(values)
        import torch

        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def agree(self, value: Any) -> Any:
        """What rank 0 has, for all."""
        if self.size == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]


def join_team() -> Team:
    """The team that a launcher set up in the environment; a team of one without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    from accelerate import PartialState

    state = PartialState()
    return Team(state.process_index, state.num_processes)
