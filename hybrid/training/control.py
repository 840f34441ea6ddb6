"""What a running training is told from outside: go on, pause, or stop."""

from __future__ import annotations

from typing import Literal, Protocol

from hybrid.errors import HybridError

Wanted = Literal["run", "pause", "cancel"]


class Control(Protocol):
    """Asked before every step; must be cheap."""

    def wanted(self) -> Wanted: ...


class _Run:
    def wanted(self) -> Wanted:
        return "run"


#: nobody interferes
RUN: Control = _Run()


class Stopped(HybridError):
    """The run ended at a step boundary because it was told to. After a pause the same call goes on where it stopped."""

    code = "stopped"
    exit_code = 130

    def __init__(self, wanted: Wanted, step: int) -> None:
        done = "paused; the same command goes on from there" if wanted == "pause" else "cancelled"
        super().__init__(f"Training was {done} at step {step}.")
        self.wanted = wanted
        self.step = step
