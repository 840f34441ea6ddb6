"""Thumbs and votes: what a person thought of an answer goes to the gateway, which learns from it."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid.errors import HybridError
from hybrid.ui.client import Client


async def vote(client: Client, key: str, scores: Mapping[str, float]) -> None:
    """Posts a score, 0 to 1, for each decision id, and tells the person so. Answers without an id are passed over."""
    import gradio as gr

    try:
        for decision_id, score in scores.items():
            if decision_id:
                await client.feedback(key, decision_id, score)
    except HybridError as error:
        gr.Warning(error.message)
    else:
        gr.Info("Noted. The gate can learn from it.", duration=3)
