"""The field in which a person says what should answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def choices(models: Sequence[str]) -> list[tuple[str, str]]:
    """The entries for these model names; the gate's own says what it does."""
    return [("auto: the gate picks the arm" if name == "auto" else name, name) for name in models]


def picker(label: str, value: str, **layout: Any) -> Any:
    """A list to choose from that takes any name the API takes: a version, a mix. Filled when the names are known."""
    import gradio as gr

    return gr.Dropdown(choices([value]), value=value, label=label, allow_custom_value=True, **layout)
