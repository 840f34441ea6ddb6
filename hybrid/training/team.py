"""Several processes on one run: each takes its share of every batch, and the sums are those of one process.

`accelerate launch -m hybrid.cli train …` starts them. A gradient is the sum of the shares' gradients over the same
denominator, so two processes make the steps that one makes, up to the order of additions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Team:
    """This process's place among `size` of them; rank 0 speaks, saves and publishes. What they say is on `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """Every `size`-th row, from this process's rank on: shares of like length, since batches are sorted."""
        return rows[self.rank :: self.size] if self.size > 1 else rows

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds up the gradients of all processes, in place, as one message; those of split weights are sums already."""
        plain = [parameter for parameter in parameters if not is_split(parameter)]
        if self.size == 1 or not plain:
            return
        import torch

        grads = []
        for parameter in plain:
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

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def most(self, value: int) -> int:
        """The greatest value of all processes."""
        if self.size == 1:
            return value
        import torch

        found = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors for rank 0 to save, split ones put together on the CPU; the others must ask too, and get none."""
        found = {}
        for name, tensor in tensors.items():
            together = tensor.full_tensor().cpu() if is_split(tensor) else tensor  # type: ignore[attr-defined]
            if self.leads:
                found[name] = together
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
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # unasked, it makes no team of processes on CPUs
    return Team(state.process_index, state.num_processes, str(state.device))


def is_split(tensor: Tensor) -> bool:
    """Whether each process holds a share of it only."""
    return hasattr(tensor, "full_tensor")


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where `like` is: on its device, and this process's share alone if that is split."""
    there = tensor.to(like.device)
    if not is_split(like):
        return there
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)  # noqa: S101  for the type checker
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
