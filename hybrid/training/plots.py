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
