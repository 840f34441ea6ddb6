"""The vocabulary: the frozen nouns that every other file speaks, one module a noun. It imports nothing of ours.

    Request ──gate──► scores ──policy──► Decision(arm) ──strategy──► Event … Event ──fold──► Answer

An `Answer` is the fold of a stream of `Event`s: the server turns the same stream into SSE, the UI into panels,
the evaluator into an `Outcome`.
"""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]
