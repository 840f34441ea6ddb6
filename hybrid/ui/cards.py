"""A version's card as Markdown, and losses as the rows of a plot: pure functions; nothing is markup but ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hybrid.training.cards import facts
from hybrid.types import JSON
from hybrid.ui.house import version_id

#: (step, "training" or "dev", loss)
Point = tuple[int, str, float]
#: a screen shows no more
MAX_POINTS = 400

_MARKUP = re.compile(r"[^\w\s-]|_")


def plain(value: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(str(value).split()))


def card_markdown(adapter: JSON) -> str:
    """All that is known of a version, as `/v1/status` tells it."""
    card = adapter.get("card") or {}
    record = adapter.get("measured") or {}
    parts = [
        f"### {plain(version_id(adapter))}",
        f"{plain(adapter.get('kind', 'lora'))}, {plain(adapter.get('state', ''))}"
        + (f", made with `{card['method']}`" if re.fullmatch(r"[a-z_]+", str(card.get("method"))) else "")
        + (", **in use**: it answers for the bare name" if adapter.get("alias") else ""),
        *[plain(why) for why in _reasons(adapter) if why],
        *_measured(record),
        *_made(adapter, card),
        *([f"**Instruction**\n\n> {plain(card['instruction'])}"] if card.get("instruction") else []),
    ]  # fmt: skip
    return "\n\n".join(parts)


def _reasons(adapter: JSON) -> Iterable[Any]:
    """Why it is where it is, each said once."""
    record = adapter.get("measured") or {}
    return dict.fromkeys([adapter.get("reason"), record.get("reason"), record.get("error")])


def _made(adapter: JSON, card: JSON) -> Iterator[str]:
    """What its training run said of itself; adopted adapters come without."""
    if not {"recipe", "data"} <= card.keys():
        return
    whole = {**card, "metrics": adapter.get("metrics") or {}}
    yield _grid(("how it was made", ""), [(label, said) for label, said in facts(whole) if said])


def _measured(record: JSON) -> Iterator[str]:
    """Its score and what it cost elsewhere."""
    if arms := record.get("arms"):
        rows = [
            (arm, f"{row['score']:.3f}", "{:.2f} to {:.2f}".format(*row["ci95"]), row["n"])
            for arm, row in sorted(arms.items(), key=lambda item: -item[1]["score"])
        ]
        yield _grid(("asked on its dev split", record.get("metric", "score"), "95 %", "rows"), rows)
    if forgetting := record.get("forgetting"):
        rows = [(what, f"{r['before']:.3f}", f"{r['after']:.3f}", r["n"]) for what, r in forgetting.items()]
        yield _grid(("asked elsewhere", "base", "this adapter", "rows"), rows)
    if skew := record.get("skew"):
        yield (
            f"Skew, 0 none to 1 all: its answers lie {skew.get('answers', 0):.3f} from the labels it was trained on, "
            f"the right answers {skew.get('right', 0):.3f}\\."
        )


def _grid(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads)]
    return "\n".join(
        f"| {' | '.join(cell if cell == '---' else plain(cell) for cell in map(str, line))} |"
        for line in [*lines, *rows]
    )


def curve_points(curve: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The losses that a card keeps, or that the events of a job tell."""
    names = (("training", ("loss", "train_loss")), ("dev", ("dev_loss", "valid_loss")))
    return [
        (int(point["step"]), name, float(point[key]))
        for point in curve
        for name, keys in names
        for key in keys
        if isinstance(point.get(key), (int, float))
    ]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MAX_POINTS of them: dev losses and the last one stay."""
    every = max(1, len(points) // MAX_POINTS)
    return [p for n, p in enumerate(points) if p[1] == "dev" or not n % every or n == len(points) - 1]


def loss_plot() -> Any:
    """An empty plot of losses over steps; it is shown once there is something to see."""
    import gradio as gr

    return gr.LinePlot(
        x="step", y="loss", color="of", label="Loss over the steps: training in teal, dev in amber", height=240,
        visible=False, x_title="", y_title="", color_map={"training": "#0d9488", "dev": "#d97706"}, colors_in_legend=[],
        buttons=[],
    )  # fmt: skip


def plotted(points: Sequence[Point]) -> Any:
    """The same plot with these points."""
    import gradio as gr
    import pandas as pd  # type: ignore[import-untyped]

    if len(points) < 2:
        return gr.LinePlot(visible=False)
    return gr.LinePlot(pd.DataFrame(thinned(points), columns=["step", "of", "loss"]), visible=True)
