"""The report's pictures as SVG that takes the page's own text colour, so that one file reads in light and dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid.types import JSON

_INK = "#010203"  # replaced by the page's colour
_POINT, _GATE = "#4878cf", "#d65f5f"
_LABELLED = 8


def pareto_plot(costs: JSON, cost: str, label: str) -> str:
    """Score over cost, the front joined by a line. `cost` is "tokens" or "latency_ms"."""
    figure, axes = _figure(f"pareto-{cost}", (5.4, 3.6))
    points = {arm: (_cost(row, cost), row["score"]) for arm, row in costs.items()}
    front = sorted(points[arm] for arm, row in costs.items() if row["pareto" if cost == "tokens" else "fast"])
    axes.plot(*zip(*front, strict=True), color=_POINT, linewidth=1, drawstyle="steps-post", alpha=0.6)
    for arm, (x, y) in points.items():
        axes.scatter([x], [y], s=28, color=_GATE if arm == "auto" else _POINT, zorder=3)
    if min(x for x, _ in points.values()) > 0:
        axes.set_xscale("log")
        _plain(axes.xaxis)
    axes.margins(x=0.18, y=0.12)
    for arm in _apart(axes, points, _worth_naming(costs, cost)):
        axes.annotate(arm, points[arm], xytext=(5, 4), textcoords="offset points", fontsize=10, color=_INK)
    axes.set_xlabel(label)
    axes.set_ylabel("score, the mean over tasks")
    return _svg(figure, f"pareto-{cost}")


def _cost(row: JSON, cost: str) -> float:
    return float(sum(row["tokens"].values()) if cost == "tokens" else row["latency_ms"]["p50"])


def _worth_naming(costs: JSON, cost: str) -> list[str]:
    """The front, the gate, and the best of the others."""
    mark = "pareto" if cost == "tokens" else "fast"
    best = sorted(costs, key=lambda arm: -costs[arm]["score"])
    first = [arm for arm in best if costs[arm][mark] or arm == "auto"]
    rest = [arm for arm in best if arm not in first]
    return [*first, *rest[: max(0, _LABELLED - len(first))]]


def _apart(axes: Any, points: Mapping[str, tuple[float, float]], names: Sequence[str]) -> list[str]:
    """The names, in their order, whose labels do not lie on one before them."""
    axes.autoscale_view()
    kept: dict[str, tuple[float, float]] = {}
    for name in names:
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(points[name]))
        if all(abs(x - u) > 0.25 or abs(y - v) > 0.06 for u, v in kept.values()):
            kept[name] = (x, y)
    return list(kept)


def reliability_plot(calibration: JSON) -> str:
    """How often the gate was right, over how sure it was; the diagonal is a gate that knows."""
    figure, axes = _figure("reliability", (4.6, 4.2))
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="--", alpha=0.6)
    for bin_ in calibration["bins"]:
        low, high = bin_["ci95"]
        axes.plot([bin_["confidence"]] * 2, [low, high], color=_POINT, linewidth=1.2)
        size = 20 + 160 * bin_["n"] / calibration["n"]
        axes.scatter([bin_["confidence"]], [bin_["right"]], s=size, color=_POINT, zorder=3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence of the gate")
    axes.set_ylabel("share of choices that were right")
    return _svg(figure, "reliability")


def growth_plot(training: JSON) -> str:
    """Dev loss over training rows of every adapter whose card holds a learning curve; "" where none does."""
    curves = {name: row["growth"] for name, row in training.items() if (row.get("growth") or {}).get("points")}
    if not curves:
        return ""
    figure, axes = _figure("growth", (7, 4.2))
    for i, (name, growth) in enumerate(curves.items()):
        points: Sequence[Mapping[str, float]] = [p for p in growth["points"] if "dev_loss" in p]
        ahead = [*points[-1:], *growth.get("predicted", ())]
        axes.plot(*_line(points), marker="o", markersize=4, color=f"C{i}", label=name)
        axes.plot(*_line(ahead), marker="o", markersize=4, color=f"C{i}", linestyle="--", alpha=0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.set_xlabel("training rows (dashed: predicted)")
    axes.set_ylabel("dev loss, nats a token")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    return _svg(figure, "growth")


def _plain(axis: Any) -> None:
    """A logarithmic axis that says 200 instead of 2×10²."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _line(points: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [p["rows"] for p in points], [p["dev_loss"] for p in points]


_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "text.color": _INK, "axes.labelcolor": _INK,
    "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip


def _figure(name: str, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Any, name: str) -> str:
    """The picture alone: no XML head, no metadata, no fixed size; its ids begin with its name."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name, "svg.id": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
