"""Progress, told to TensorBoard too: `tensorboard --logdir .hybrid/tensorboard`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hybrid.training.loop import Progress

_SCALARS = ("loss", "dev_loss", "tokens_per_s")


@contextmanager
def told_to_tensorboard(progress: Progress, folder: Path) -> Iterator[Progress]:
    """`progress` that also writes the scalars of every step to event files in `folder`."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))

    def tell(**told: Any) -> None:
        progress(**told)
        if "step" in told:
            values = [Summary.Value(tag=tag, simple_value=told[tag]) for tag in _SCALARS if tag in told]
            writer.add_event(Event(step=told["step"], summary=Summary(value=values)))

    try:
        yield tell
    finally:
        writer.close()
