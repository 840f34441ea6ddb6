"""Two towers: one turns a request into a point, the other an arm, and their product is how well the arm will do.

The arm's tower begins with what is known of an arm before any row (its strategy, mean score and cost) and adds what
its own rows teach, so that an arm with few rows lies near arms like it (as in two-tower recommenders, Yi et al. 2019;
for routing, matrix factorisation in RouteLLM, Ong et al. 2024, arXiv 2406.18665). Soft targets: the scores themselves,
by cross-entropy. Torch fits; numpy serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import numpy.typing as npt

from hybrid.gate.features import Numbers
from hybrid.gate.linear import Columns
from hybrid.gate.memory import AROUND, Memory, Places
from hybrid.gate.study import Asked, Study, Tensors, fill
from hybrid.types import Arm, Strategy

#: after how many steps of training the towers are tried
STEPS = (40, 120, 360)
_BATCH, _HIDDEN, _WIDTH = 256, 64, 32
_RATE, _DECAY, _DROPOUT = 3e-3, 3e-2, 0.1
#: an arm's strategy as one of so many columns; `base` is not among what a gate chooses from
_KINDS_OF_ARM = tuple(name for name in get_args(Strategy) if name != "base")


@dataclass(frozen=True, eq=False, slots=True)
class Towers:
    """The request's tower as two layers, and what the arms' tower makes of every arm: `arms` [width, arms], `bias`."""

    kind: ClassVar[str] = "towers"

    columns: Columns
    first: Numbers
    first_bias: Numbers
    second: Numbers
    second_bias: Numbers
    arms: Numbers
    bias: Numbers

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        tried: list[list[tuple[Places, Numbers]]] = [[] for _ in STEPS]
        for fitted, held in study.splits:
            asked = Asked(study.asked.vectors[held], study.asked.form[held], study.asked.near.part(held))
            for n, towers in enumerate(_trained(study, fitted, STEPS)):
                tried[n].append((held, towers.raw(asked)))
        for steps, parts in zip(STEPS, tried, strict=True):
            yield float(steps), fill(len(study.table), parts)

    @classmethod
    def fit(cls, study: Study, setting: float) -> Towers:
        return next(_trained(study, np.arange(len(study.table)), (int(setting),)))

    def raw(self, asked: Asked) -> Numbers:
        hidden = np.maximum(_scaled(self.columns(asked)) @ self.first + self.first_bias, 0.0)
        place = hidden @ self.second + self.second_bias
        return 1 / (1 + np.exp(-np.clip(place @ self.arms + self.bias, -30, 30)))

    @property
    def reach(self) -> int:
        return AROUND

    def tensors(self) -> Tensors:
        return {
            "middle": self.columns.middle, "spread": self.columns.spread,
            "first": self.first, "first_bias": self.first_bias,
            "second": self.second, "second_bias": self.second_bias,
            "arms": self.arms, "bias": self.bias,
        }  # fmt: skip

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> Towers:
        layers = ("first", "first_bias", "second", "second_bias", "arms", "bias")
        return cls(Columns(tensors["middle"], tensors["spread"]), *(tensors[name] for name in layers))


def describe(arms: Sequence[str], score: Numbers, cost: Numbers) -> Numbers:
    """[arms, columns]: strategy, mean score and log cost of every arm, from what was measured [n, arms] of it."""
    rows = []
    spent = [_mean(cost[:, a]) for a in range(len(arms))]
    typical = _mean(np.array([c for c in spent if not math.isnan(c)]))
    overall = float(np.nanmean(score))
    for name, seen, paid in zip(arms, score.T, spent, strict=True):
        known = seen[~np.isnan(seen)]
        mean = (known.sum() + overall) / (len(known) + 1)
        dear = math.log((paid + 1e-12) / (typical + 1e-12)) / 4 if paid == paid and typical == typical else 0.0
        rows.append([*(float(_strategy(name) == s) for s in _KINDS_OF_ARM), 4 * (mean - overall), dear, 1.0])
    return np.array(rows, dtype=np.float64)


def _mean(values: Numbers) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _strategy(name: str) -> str:
    try:
        return Arm.parse(name).strategy
    except ValueError:
        return ""


def _scaled(x: Numbers) -> Numbers:
    """Columns of a unit vector are small; a network learns faster from ones of about one."""
    return x * math.sqrt(x.shape[1])


def _trained(study: Study, rows: Places, steps: Sequence[int]) -> Iterator[Towers]:
    """The towers after each of so many steps (they rise) of AdamW on the given rows."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, dropout, relu

    columns = Columns.of(study.asked.form[rows])
    every = Asked(study.asked.vectors[rows], study.asked.form[rows], study.asked.near.part(rows))
    x = torch.tensor(_scaled(columns(every)), dtype=torch.float32)
    score = torch.tensor(study.table.score[rows], dtype=torch.float32)
    measured, target = ~score.isnan(), score.nan_to_num()
    known = torch.tensor(
        describe(study.table.arms, study.table.score[rows], study.table.cost[rows]), dtype=torch.float32
    )
    dice = torch.Generator().manual_seed(study.seed)

    def drawn(*shape: int) -> Any:
        return (torch.randn(shape, generator=dice) / math.sqrt(shape[0])).requires_grad_()

    first, second, told = drawn(x.shape[1], _HIDDEN), drawn(_HIDDEN, _WIDTH), drawn(known.shape[1], _WIDTH)
    first_bias, second_bias, own, bias = (
        torch.zeros(shape, requires_grad=True) for shape in ((_HIDDEN,), (_WIDTH,), (len(known), _WIDTH), (len(known),))
    )
    with torch.no_grad():
        mean = (target.sum(0) + 0.5) / (measured.sum(0) + 1)
        bias += torch.logit(mean.clamp(0.02, 0.98))
    weights = [first, second, told, own]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": _DECAY}, {"params": [first_bias, second_bias, bias], "weight_decay": 0.0}],
        lr=_RATE,
    )
    rising = list(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(study.seed)  # dropout draws from the one generator that there is
        for step in range(1, max(rising) + 1):
            batch = torch.randint(len(x), (min(_BATCH, len(x)),), generator=dice)
            hidden = dropout(relu(x[batch] @ first + first_bias), _DROPOUT)
            logits = (hidden @ second + second_bias) @ ((known @ told + own) / math.sqrt(_WIDTH)).T + bias
            asked = measured[batch]
            loss = binary_cross_entropy_with_logits(logits[asked], target[batch][asked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step in rising:
                arms = ((known @ told + own) / math.sqrt(_WIDTH)).T
                learned = (first, first_bias, second, second_bias, arms, bias)
                yield Towers(columns, *(part.detach().numpy().astype(np.float64) for part in learned))
