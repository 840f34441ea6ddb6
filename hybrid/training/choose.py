"""Active learning: which unlabelled rows are most worth labelling, and a simulation of what choosing is worth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid.knowledge.embed import Vectors
from hybrid.training.probe import Probe

_RANDOM_RUNS = 3
#: the share of the rows that a simulation begins with, and the shares at which it measures
_START, BUDGETS = 0.05, (0.1, 0.2, 0.4)


@dataclass(frozen=True, slots=True)
class Choice:
    """A row to label: its position in the pool, how unsure the head is (0 to 1), how far it lies from what is labelled
    or chosen (cosine distance).
    """

    position: int
    uncertainty: float
    distance: float


def choose(train: Vectors, answers: Sequence[str] | None, pool: Vectors, n: int) -> list[Choice]:
    """The `n` rows of `pool` most worth labelling, the best first; vectors are unit length, [rows, dim].

    With the `answers` of a closed task: margin sampling, one minus the lead of the likeliest label over the next
    (Scheffer et al. 2001; strong against newer rules in Bahri et al. 2022, arXiv 2210.03822), times the distance from
    what is chosen already, so that no two chosen rows ask the same. Without: farthest first from training and chosen
    rows (the k-center rule of Sener & Savarese 2018, arXiv 1708.00489).
    """
    unsure = np.ones(len(pool)) if answers is None else _unsure(Probe(train, answers), pool)
    from_train = 1.0 - (pool @ train.T).max(axis=1) if len(train) else np.ones(len(pool))
    distance = from_train if answers is None else np.ones(len(pool))
    free = np.ones(len(pool), bool)
    chosen: list[Choice] = []
    for _ in range(min(n, len(pool))):
        best = int(np.where(free, unsure * distance, -1.0).argmax())
        free[best] = False
        chosen.append(Choice(best, float(unsure[best]), float(min(distance[best], from_train[best]))))
        distance = np.minimum(distance, np.maximum(1.0 - pool @ pool[best], 0.0))
    return chosen


def _unsure(probe: Probe, pool: Vectors) -> npt.NDArray[np.float64]:
    chances = np.sort(probe.probabilities(pool), axis=1)
    if chances.shape[1] < 2:
        return np.ones(len(pool))
    return np.asarray(1.0 - (chances[:, -1] - chances[:, -2]))


def simulate(
    train: Vectors, answers: Sequence[str] | None, dev: Vectors, dev_answers: Sequence[str], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Hides the labels of training rows and buys them back, chosen and at random (mean of three runs).

    One row a budget: `labelled` rows; `chosen` and `random` are the head's dev accuracy for a closed task, else the
    mean cosine of a dev row to the nearest labelled one; `gain` is their difference.
    """
    dice = random.Random(seed)
    order = list(range(len(train)))
    dice.shuffle(order)
    budgets = sorted({max(2, round(share * len(train))) for share in BUDGETS})
    labelled = order[: max(1, min(round(_START * len(train)), budgets[0] - 1))]
    start = list(labelled)
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        rest = [n for n in order if n not in set(labelled)]
        known = None if answers is None else [answers[n] for n in labelled]
        picked = choose(train[labelled], known, train[rest], budget - len(labelled))
        labelled += [rest[choice.position] for choice in picked]
        at_random = []
        for _ in range(_RANDOM_RUNS):
            others = [n for n in order if n not in set(start)]
            drawn = start + dice.sample(others, budget - len(start))
            at_random.append(_worth(train, answers, dev, dev_answers, drawn))
        chosen, mean = _worth(train, answers, dev, dev_answers, labelled), float(np.mean(at_random))
        rows.append(
            {"labelled": budget, "chosen": round(chosen, 4), "random": round(mean, 4), "gain": round(chosen - mean, 4)}
        )
    return rows


def _worth(
    train: Vectors, answers: Sequence[str] | None, dev: Vectors, dev_answers: Sequence[str], rows: list[int]
) -> float:
    if answers is None:
        return float((dev @ train[rows].T).max(axis=1).mean())
    return Probe(train[rows], [answers[n] for n in rows]).accuracy(dev, dev_answers)
