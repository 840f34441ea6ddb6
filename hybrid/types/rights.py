"""What a caller may use and see."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid.types.arm import Arm


@dataclass(frozen=True, slots=True, kw_only=True)
class Rights:
    """What a caller may use and see; the owner of the home, everything.

    `arms` are the words of its key: a strategy (`rag`) or one arm of it (`rag:handbook`, `adapter:bank`); None allows
    all. `hidden` are the corpora it may not see, `own` those it made. `groups` are those its key belongs to.
    """

    caller: str = "local"
    admin: bool = True
    groups: frozenset[str] = frozenset()
    arms: frozenset[str] | None = None
    hidden: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()

    def may(self, arm: Arm) -> bool:
        """Whether it may ask an arm: each adapter, head, task and corpus that the arm names must be its to use."""
        if self.admin:
            return True
        corpus = arm.corpus
        return all(self._named(*part) for part in arm.parts) and (corpus is None or self.sees(corpus))

    def sees(self, corpus: str) -> bool:
        """Whether it may search a corpus."""
        if self.admin or corpus in self.own:
            return True
        return corpus not in self.hidden and self._named("rag", corpus)

    def reads(self, owner: str, groups: Iterable[str]) -> bool:
        """Whether it may read what has this owner and these groups; what has neither is for all."""
        groups = frozenset(groups)
        return (
            self.admin or (bool(owner) and owner == self.caller) or bool(groups & self.groups) or not (owner or groups)
        )

    def _named(self, strategy: str, name: str) -> bool:
        if self.arms is None or strategy in self.arms:
            return True
        return f"{strategy}:{name}" in self.arms if name else any(a.startswith(f"{strategy}:") for a in self.arms)
