"""A home whose base model can really be trained in seconds, and data to train it on."""

from __future__ import annotations

import json
from pathlib import Path

from server_kit import make_home
from tiny_model import make_tiny_model

from hybrid.settings import Settings

COLOURS = ("red", "green", "blue", "grey")
#: a recipe of a few steps
SHORT = {"max_steps": 6, "eval_every": 2, "batch_size": 8, "rank": 4, "precision": "float32"}
#: one that is still at work when a test comes back to it
LONG = {**SHORT, "max_steps": 50_000, "epochs": 10_000, "early_stop": False, "eval_every": 20}


def make_trainable_home(home: Path, **server: object) -> Settings:
    """As `make_home`, over the tiny model."""
    settings = make_home(home, server=server)
    make_tiny_model(home / "tiny")
    training = settings.training.model_copy(update={"checkpoint_s": 0.2})
    return settings.model_copy(update={"model": str(home / "tiny"), "training": training})


def chat_rows(count: int = 48, *, start: int = 0) -> bytes:
    """Rows in OpenAI's chat format whose answers can be learned: the colour named in the question."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"item {n} is {COLOURS[n % 4]}" + "!" * (n % 5)},
                {"role": "assistant", "content": COLOURS[n % 4]},
            ]
        }
        for n in range(start, start + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
