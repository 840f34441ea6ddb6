"""A model that is too big for one device, split over the team: FSDP2 (Zhao et al. 2023, arXiv 2304.11277), like ZeRO-3.

Each process holds its share of every weight, gradient and moment; a block's weights come together for its own forward
and backward alone. Gradients are sums over the processes, as in data parallel, so the steps are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import BadRequest
from hybrid.training.batches import Encoded, Pack, lay_out, packs
from hybrid.training.rates import depth_of
from hybrid.training.supervised import Cut, Learner
from hybrid.training.team import Team

if TYPE_CHECKING:
    from torch import Tensor


def needs_team(team: Team) -> None:
    """Raises BadRequest for a team of one, which has nobody to share with."""
    if team.size == 1:
        raise BadRequest(
            "shard splits a model over several processes, and this is one; start it as "
            "`accelerate launch --multi_gpu --num_processes 2 -m hybrid.cli train …`, or leave shard out.",
            param="shard",
        )  # fmt: skip


def spread(model: Any, team: Team, dtype: Any = None) -> None:
    """Splits the weights of `model`, in place: each block by itself, the rest with the root.

    Call it before the groups are made: every parameter is another afterwards, a DTensor. `dtype` is what weights are
    multiplied in where they are held in another. Gradients are summed in float32.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(team.device).type, (team.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*_blocks(model), model]:
        # the root too gives its weights back after a forward: what was gathered to measure must not outlive a step
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_force_sum_reduction_for_comms(True)  # gloo can neither average nor scale
        module.set_gradient_divide_factor(1.0)  # the loss is over the whole batch's denominator already


def _blocks(model: Any) -> list[Any]:
    import torch

    depth = depth_of(model)
    return next(
        list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    )


def in_team(
    learner: Learner,
    team: Team,
    rows: Sequence[Encoded],
    anew: Callable[[], Any],
    save: Callable[[Any, Path], dict[str, Any]],
) -> Learner:
    """The learner of a split model: in step with the team, its trained weights brought together after training.

    It is measured as it stands, split. `anew()` makes, in the process that saves, the model as it was before training
    and whole; `save(model, folder)` saves it with the trained weights in it. `rows` are those of training.
    """

    def finish() -> Learner:
        trained = {name: weight for name, weight in learner.model.named_parameters() if weight.requires_grad}
        weights = team.gather({name: weight.detach() for name, weight in trained.items()})
        return replace(learner, finish=None, save=lambda folder: save(_filled(anew(), weights), folder))

    return replace(learner, finish=finish, cut=_in_step(packs, team, min(rows, key=lambda row: row.length)))


def _filled(model: Any, weights: Mapping[str, Tensor]) -> Any:
    there = dict(model.named_parameters())
    for name, tensor in weights.items():
        there[name].data.copy_(tensor)
    return model


def _in_step(cut: Cut, team: Team, spare: Encoded) -> Cut:
    """`cut`, with as many packs in every process: a forward or backward of a split model needs all of them.

    Who has fewer packs repeats `spare` without a place to learn from: its loss and its gradients are zero.
    """

    def even(rows: Sequence[Encoded]) -> Iterator[Pack]:
        own = list(cut(rows)) if rows else []
        passes = team.most(len(own))  # before the first of them: processes ask and answer in one order
        yield from [*own, *[_idle(spare)] * (passes - len(own))]

    return even


def _idle(row: Encoded) -> Pack:
    pack = lay_out([row])
    return replace(pack, keep=pack.keep[:0], targets=pack.targets[:0], owners=pack.owners[:0])
