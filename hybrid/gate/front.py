"""What giving away quality saves: the score and the cost of a way of routing at every setting of its knob, and the area
under that front as RouterBench reports it (Hu et al. 2024, arXiv 2403.12031), beside that of the arms taken singly.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hybrid.gate.features import Numbers
from hybrid.gate.outcomes import Table
from hybrid.gate.routed import chosen, mean_cost, singles
from hybrid.types import JSON

#: how much of the expected score may be given away for a cheaper answer: the grid that a front is measured on
SLACKS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.12, 0.16, 0.25, 0.36, 0.5, 0.7, 1.0)
#: (cost, score)
Point = tuple[float, float]


def front(table: Table, score: Numbers, cost: Numbers) -> list[list[float | None]]:
    """[slack, score, cost] for every slack of the grid: what giving away expected score saves."""
    rows, weights = np.arange(len(table)), table.weights
    found: list[list[float | None]] = []
    for slack in SLACKS:
        taken = chosen(table, score, cost, slack)
        reached = float(weights @ table.score[rows, taken])
        found.append([slack, round(reached, 6), mean_cost(table.cost[rows, taken], weights)])
    return found


def areas(table: Table, rows: Iterable[list[float | None]]) -> JSON | None:
    """The average quality under a `front` of this table, `auto`, and under the arms taken singly, `singles`, which a
    router must beat (RouterBench's Zero router). None where costs do not tell the arms apart.

    Both are taken from the cost of the cheapest arm to that of the dearest.
    """
    arms = [(cost, score) for score, cost in singles(table).values() if cost is not None]
    points = [(cost, score) for _, score, cost in rows if score is not None and cost is not None]
    low, high = min((cost for cost, _ in arms), default=0.0), max((cost for cost, _ in arms), default=0.0)
    if not points or not low < high:
        return None
    return {name: round(area(of, low, high), 6) for name, of in (("auto", points), ("singles", arms))}


def area(points: Iterable[Point], low: float, high: float) -> float:
    """The mean score between two costs on the non-decreasing convex hull of points (AIQ, Hu et al. 2024).

    To choose at random between two settings gives what lies between them. Below the cheapest point that is a mixture
    with no answer at all, which costs and scores nothing; beyond the dearest point nothing more is gained.
    """
    corners = hull(points)
    costs, scores = (np.array(side) for side in zip(*corners, strict=True))
    at = np.unique(np.clip(np.append(costs, (low, high)), low, high))
    return float(np.trapezoid(np.interp(at, costs, scores), at) / (high - low))


def hull(points: Iterable[Point]) -> list[Point]:
    """The corners of the concave, non-decreasing line above points and the origin, by rising cost (Andrew 1979)."""
    corners: list[Point] = [(0.0, 0.0)]
    for cost, score in sorted(points):
        if score <= corners[-1][1]:
            continue  # dearer, and no better
        while len(corners) > 1 and _above(corners[-2], corners[-1], (cost, score)):
            corners.pop()
        if cost > corners[-1][0]:
            corners.append((cost, score))
        else:
            corners[-1] = (cost, score)
    return corners


def _above(first: Point, middle: Point, last: Point) -> bool:
    """Whether the line from the first to the last point passes over the middle one."""
    return (middle[1] - first[1]) * (last[0] - first[0]) <= (last[1] - first[1]) * (middle[0] - first[0])
