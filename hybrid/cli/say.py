"""How commands speak: words on stderr, data on stdout, progress only on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: NO_COLOR and dumb terminals are rich's business
words = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)  # adapter:bank is no emoji


def say(text: str) -> None:
    """A sentence for a person."""
    words.print(text, markup=False)


def complain(text: str) -> None:
    """A sentence about what is wrong and what to do."""
    words.print(text, style="red", markup=False)


def data(value: Any) -> None:
    """One JSON value on its own line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def text(value: str) -> None:
    """Plain data for people and pipes on stdout."""
    sys.stdout.write(value + "\n")
    sys.stdout.flush()


@contextmanager
def bar(as_json: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callback `(step, done, total)`: a bar on a terminal, a line a step elsewhere.

    With `as_json` it writes lines `{"phase", "step", "steps"}` on stdout, for programs.
    """
    if as_json:
        yield lambda step, done, total: data({"phase": step, "step": done, "steps": total})
        return
    if not words.is_terminal:
        last = ""

        def line(step: str, done: int, total: int) -> None:
            nonlocal last
            if step != last:
                last = step
                say(f"{step} …")

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=words, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)
            progress.update(tasks[step], completed=done, total=total)

        yield update
