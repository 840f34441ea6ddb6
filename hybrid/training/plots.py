"""Pictures of a run, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_curve(curve: Sequence[Mapping[str, float]], best_step: int, path: Path) -> None:
    """Training and dev loss over the steps, the best step marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in curve]
    axes.plot(steps, [point["loss"] for point in curve], marker=".", label="training")
    axes.plot(steps, [point["dev_loss"] for point in curve], marker=".", label="dev")
    axes.axvline(best_step, color="grey", linewidth=0.8, linestyle="--", label=f"kept: step {best_step}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def draw_growth(points: Sequence[Mapping[str, float]], predicted: Sequence[Mapping[str, float]], path: Path) -> None:
    """Dev loss over the number of training rows, both logarithmic, and where the curve would go on to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog([p["rows"] for p in points], [p["dev_loss"] for p in points], marker="o", label="measured")
    if predicted:
        ahead = [points[-1], *predicted]
        rows, losses = [p["rows"] for p in ahead], [p["dev_loss"] for p in ahead]
        axes.loglog(rows, losses, marker="o", linestyle="--", label="predicted by the power law through them")
    axes.set_xlabel("training rows")
    axes.set_ylabel("dev loss, nats a token")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
