"""A run on a terminal: its progress, and what Ctrl-C does to it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from hybrid.cli.say import data, say, words
from hybrid.training.control import Control, Wanted


class _Interrupts:
    """Pauses the run at the first signal."""

    def __init__(self) -> None:
        self._wanted: Wanted = "run"

    def wanted(self) -> Wanted:
        return self._wanted

    def __call__(self, _signal: int, _frame: Any) -> None:
        if self._wanted == "pause":
            raise KeyboardInterrupt
        self._wanted = "pause"
        say("Saving a checkpoint; press Ctrl-C again to quit at once.")


@contextmanager
def interruptible() -> Iterator[Control]:
    """A control that pauses the run at the first SIGINT or SIGTERM; a second one interrupts at once."""
    interrupts = _Interrupts()
    before = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def reporter(as_json: bool) -> Iterator[Callable[..., None]]:
    """A progress callback: JSON lines on stdout, a bar on a terminal, a line now and then elsewhere."""
    if as_json:
        yield lambda **told: data(told)
        return
    if not words.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"))
    with Progress(*columns, console=words, transient=True) as progress:
        task = progress.add_task("", total=None)

        def update(**told: Any) -> None:
            if "step" in told:
                progress.update(task, completed=told["step"], total=told["steps"], description=_sentence(told))

        yield update


def _lines(every: int = 10) -> Callable[..., None]:
    def update(**told: Any) -> None:
        if "step" in told and (told["step"] % every == 0 or told["step"] == told["steps"]):
            say(f"step {told['step']}/{told['steps']}  {_sentence(told)}")

    return update


def _sentence(told: dict[str, Any]) -> str:
    dev = f"  dev {told['dev_loss']:.3f}" if "dev_loss" in told else ""
    return f"loss {told['loss']:.3f}{dev}  {told['tokens_per_s']:.0f} tokens/s  {told['eta_s']:.0f} s left"
