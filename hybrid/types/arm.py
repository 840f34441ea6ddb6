"""An arm: a strategy with its arguments filled in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["base", "prompt", "few_shot", "rag", "adapter", "adapter+rag", "mix", "moa", "self_moa", "head"]

_ARM = re.compile(
    r"^(?P<strategy>base|prompt|few_shot|rag|adapter\+rag|adapter|mix|moa|self_moa|head)(?::(?P<args>.+))?$"
)


@dataclass(frozen=True, slots=True, order=True)
class Arm:
    """A strategy with its arguments filled in; `str(arm)` is its one spelling: `adapter:bank`, `rag:handbook`."""

    strategy: str
    args: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ":".join((self.strategy, *self.args))

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm that `text` spells. Raises ValueError when its strategy is unknown."""
        match = _ARM.match(text)
        if match is None:
            raise ValueError(f"{text!r} names no strategy")
        args = match["args"]
        return cls(match["strategy"], tuple(args.split(":")) if args else ())

    @property
    def adapter(self) -> str | None:
        """The adapter this arm answers with (`name` or `name@version`), if it is an adapter's arm."""
        return self.args[0] if self.strategy in ("adapter", "adapter+rag") and self.args else None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Every adapter this arm answers with (`name` or `name@version`): of a mix, its members without weights."""
        if self.strategy == "mix":
            parts = (part.partition("=")[0].strip() for arg in self.args for part in arg.split(","))
            return tuple(dict.fromkeys(part for part in parts if part))
        return (self.adapter,) if self.adapter else ()

    @property
    def corpus(self) -> str | None:
        """The one corpus this arm searches, if it names one."""
        return self.args[-1] if "rag" in self.strategy and len(self.args) == (2 if self.adapter else 1) else None

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """What a caller must be allowed for this arm: (strategy, name or ""). `base` and `prompt` are for all."""
        parts = [("adapter", name.partition("@")[0]) for name in self.adapters]
        if "rag" in self.strategy:
            parts.append(("rag", self.corpus or ""))
        elif self.strategy in ("few_shot", "head", "moa", "self_moa"):
            parts.append((self.strategy, self.args[0].partition("@")[0] if self.args else ""))
        return tuple(parts)

    @property
    def confers(self) -> bool:
        """Whether it asks other arms: such an arm is never a member of another."""
        return self.strategy in ("moa", "self_moa")


PROMPT = Arm("prompt")
