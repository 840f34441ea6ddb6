"""Ways of answering: one file each, and the one table that everything else reads.

A strategy is a function `run(request, arm, tools)` that yields events. It never constructs, looks up or imports an
engine, an index or another strategy: the verbs are passed in.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

from hybrid.strategies import adapter, few_shot, head, mix, moa, prompt, rag
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.event import Event
from hybrid.types.request import Request

Run = Callable[[Request, Arm, Tools], AsyncIterator[Event]]

#: strategy name → its function
STRATEGIES: Mapping[str, Run] = {
    "base": prompt.base,
    "prompt": prompt.run,
    "few_shot": few_shot.run,
    "head": head.run,
    "mix": mix.run,
    "moa": moa.run,
    "self_moa": moa.run,
    "rag": rag.run,
    "adapter": adapter.run,
    "adapter+rag": rag.run,
}
