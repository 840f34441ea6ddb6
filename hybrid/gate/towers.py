"""Two towers: one turns a request into a point, the other an arm, and their product is how well the arm will do.

The arm's tower begins with what is known of an arm before any row (its strategy, mean score and cost) and adds what
its own rows teach, so that an arm with few rows lies near arms like it (as in two-tower recommenders, Yi et al. 2019;
for routing, matrix factorisation in RouteLLM, Ong et al. 2024, arXiv 2406.18665). Soft targets: the scores themselves,
by cross-entropy. Torch fits; numpy serves.

A few hundred noisy outcomes are easily learned by heart. So the towers begin as the arms' mean scores and move away
from them step by step (early stopping is a ridge), a straight path beside the hidden layer learns what a straight line
can tell, and what serves is the average of the last steps (Polyak & Juditsky 1992) and not where the last one fell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import numpy.typing as npt

from hybrid.gate.columns import Columns
from hybrid.gate.features import Numbers
from hybrid.gate.memory import AROUND, Memory, Places
from hybrid.gate.study import Asked, Study, Tensors, fill
from hybrid.knowledge.embed import one_thread
from hybrid.types.arm import Arm, Strategy

#: after how many steps of training on a thousand rows the towers are tried; steps grow with the root of the rows
STEPS = (30, 90, 270, 810)
_ROWS = 1000
_BATCH, _HIDDEN, _WIDTH = 256, 64, 32
_RATE, _DECAY, _DROPOUT = 1.5e-3, 1.0, 0.3
#: what of the average a step leaves as it was
_KEPT = 0.95
#: an arm's strategy as one of so many columns; `base` is not among what a gate chooses from
_KINDS_OF_ARM = tuple(name for name in get_args(Strategy) if name != "base")


@dataclass(frozen=True, eq=False, slots=True)
class Towers:
    """The request's tower, a `straight` path [columns, width] beside a hidden layer, `inner` [columns, hidden] and
    `outer` [hidden, width], and what the arms' tower makes of every arm: `arms` [width, arms], `bias` [arms]."""

    kind: ClassVar[str] = "towers"

    columns: Columns
    straight: Numbers
    inner: Numbers
    inner_bias: Numbers
    outer: Numbers
    place: Numbers
    arms: Numbers
    bias: Numbers

    @classmethod
    def trials(cls, study: Study) -> Iterator[tuple[float, Numbers]]:
        tried: list[list[tuple[Places, Numbers]]] = [[] for _ in STEPS]
        for fold in study.folds:
            for parts, towers in zip(tried, _trained(study, fold.fitted, STEPS), strict=True):
                parts.append((fold.tried, towers.raw(fold.asked)))
        for steps, parts in zip(STEPS, tried, strict=True):
            yield float(steps), fill(len(study.table), parts)

    @classmethod
    def fit(cls, study: Study, setting: float) -> Towers:
        return next(_trained(study, np.arange(len(study.table)), (int(setting),)))

    def raw(self, asked: Asked) -> Numbers:
        x = self.columns(asked.vectors, asked.form)
        point = x @ self.straight + np.maximum(x @ self.inner + self.inner_bias, 0.0) @ self.outer + self.place
        return 1 / (1 + np.exp(-np.clip(point @ self.arms + self.bias, -30, 30)))

    @property
    def reach(self) -> int:
        return AROUND

    def tensors(self) -> Tensors:
        return {**self.columns.tensors(), **{name: getattr(self, name) for name in _LAYERS}}

    @classmethod
    def load(cls, tensors: Mapping[str, npt.NDArray[Any]], memory: Memory) -> Towers:
        return cls(Columns.load(tensors), *(tensors[name] for name in _LAYERS))


_LAYERS = ("straight", "inner", "inner_bias", "outer", "place", "arms", "bias")


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


@dataclass(frozen=True, eq=False, slots=True)
class _Scale:
    """Columns as a network learns them fastest: about zero on average, and varying by about one."""

    middle: Numbers
    by: float

    @classmethod
    def of(cls, x: Numbers) -> _Scale:
        """Measured on the columns [n, columns] of the rows that are fitted."""
        return cls(x.mean(axis=0), 1 / max(float(np.sqrt(x.var(axis=0).mean())), 1e-6))

    def __call__(self, x: Numbers) -> Numbers:
        """[n, columns]."""
        return (x - self.middle) * self.by

    def folded(self, weight: Numbers) -> tuple[Numbers, Numbers]:
        """(weight, bias) that make of the columns as they are what `weight` makes of the scaled ones."""
        scaled = weight * self.by
        return scaled, -(self.middle @ scaled)


def _trained(study: Study, rows: Places, settings: Sequence[int]) -> Iterator[Towers]:
    """The towers after the steps of each setting (they rise), of AdamW on the given rows."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, dropout, relu
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    columns = Columns.of(study.asked.form[rows])
    seen = columns(study.asked.vectors[rows], study.asked.form[rows])
    scale = _Scale.of(seen)
    x = torch.tensor(scale(seen), dtype=torch.float32)
    score = torch.tensor(study.table.score[rows], dtype=torch.float32)
    measured, target = ~score.isnan(), score.nan_to_num()
    known = torch.tensor(
        describe(study.table.arms, study.table.score[rows], study.table.cost[rows]), dtype=torch.float32
    )
    dice = torch.Generator().manual_seed(study.seed)

    def drawn(*shape: int) -> Any:
        return (torch.randn(shape, generator=dice) / math.sqrt(shape[0])).requires_grad_()

    def zero(*shape: int) -> Any:
        return torch.zeros(shape, requires_grad=True)

    mean = ((target.sum(0) + 0.5) / (measured.sum(0) + 1)).clamp(0.02, 0.98)
    straight, inner, outer = drawn(x.shape[1], _WIDTH), drawn(x.shape[1], _HIDDEN), drawn(_HIDDEN, _WIDTH)
    told, own = zero(known.shape[1], _WIDTH), zero(len(known), _WIDTH)
    inner_bias, place, bias = zero(_HIDDEN), zero(_WIDTH), torch.logit(mean).requires_grad_()
    weights, biases = [straight, inner, outer, told, own], [inner_bias, place, bias]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": _DECAY}, {"params": biases, "weight_decay": 0.0}], lr=_RATE
    )
    averaged = [part.detach().clone() for part in (*weights, *biases)]
    average = get_ema_multi_avg_fn(_KEPT)  # type: ignore[no-untyped-call]
    stops = [max(1, round(setting * math.sqrt(len(x) / _ROWS))) for setting in settings]
    with torch.random.fork_rng(devices=[]), one_thread(torch.get_num_threads()):
        torch.manual_seed(study.seed)  # dropout draws from the one generator that there is
        for step in range(1, stops[-1] + 1):
            batch = torch.randint(len(x), (min(_BATCH, len(x)),), generator=dice)
            hidden = dropout(relu(x[batch] @ inner + inner_bias), _DROPOUT)
            point = x[batch] @ straight + hidden @ outer + place
            logits = point @ (known @ told + own).T / math.sqrt(_WIDTH) + bias
            asked = measured[batch]
            loss = binary_cross_entropy_with_logits(logits[asked], target[batch][asked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average(averaged, [part.detach() for part in (*weights, *biases)], step)
            for _ in range(stops.count(step)):
                yield _served(columns, scale, known.numpy(), [part.numpy().astype(np.float64) for part in averaged])


def _served(columns: Columns, scale: _Scale, known: Numbers, parts: Sequence[Numbers]) -> Towers:
    """The towers as numpy computes them, the scaling of the columns folded into the weights."""
    straight, inner, outer, told, own, inner_bias, place, bias = parts
    straight, straight_bias = scale.folded(straight)
    inner, moved = scale.folded(inner)
    arms = (known @ told + own).T / math.sqrt(_WIDTH)
    return Towers(columns, straight, inner, inner_bias + moved, outer, place + straight_bias, arms, bias)
