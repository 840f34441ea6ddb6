"""One answer as the page sees it: the fold of a stream of chunks into a `Turn`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybrid.errors import HybridError
from hybrid.types import JSON
from hybrid.ui.client import Client

#: a browser need not be told more often than it can paint
_PAINT_S = 0.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person may set for an answer. `history_chars` bounds the earlier turns that are sent along."""

    model: str = "auto"
    temperature: float = 0.0
    max_tokens: int = 512
    history_chars: int = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question, its answer as far as it has come, and all that is known about how it was made.

    `detail` is the gateway's object `hybrid` (the decision, its passages and drafts); times are milliseconds as the
    page measured them.
    """

    question: str
    model: str
    answer: str = ""
    arm: str = ""
    adapter: str = ""
    decision_id: str = ""
    detail: JSON = field(default_factory=dict)
    usage: JSON = field(default_factory=dict)
    first_ms: float = 0.0
    total_ms: float = 0.0
    done: bool = False
    error: str = ""

    @property
    def passages(self) -> list[JSON]:
        """What the answer could cite, in the order of its numbers: `filename`, `title`, `quote`, `score`, `corpus`."""
        return self.detail.get("passages") or []

    @property
    def drafts(self) -> list[JSON]:
        """Hidden answers and the examples used: `arm` and `text`."""
        return self.detail.get("drafts") or []


def request_body(question: str, past: Sequence[Turn], options: Options) -> JSON:
    """The chat request: as many of the newest earlier turns as fit, then the question."""
    messages: list[JSON] = [{"role": "user", "content": question}]
    room = options.history_chars - len(question)
    for turn in reversed(past):
        room -= len(turn.question) + len(turn.answer)
        if room < 0:
            break
        if turn.answer and not turn.error:
            messages[:0] = [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
    return {
        "model": options.model,
        "messages": messages,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "hybrid": {"explain": True},
    }


async def answers(
    client: Client, key: str, question: str, past: Sequence[Turn], options: Options
) -> AsyncIterator[Turn]:
    """The turn as it grows: at once, then as often as a page can paint, then whole (`done`). Errors become its text."""
    turn = Turn(question=question, model=options.model)
    yield turn
    started = painted = time.perf_counter()
    try:
        async with client.chat(key, request_body(question, past, options)) as (headers, chunks):
            turn = _with_headers(turn, headers)
            yield turn
            async for chunk in chunks:
                now = time.perf_counter()
                turn = _with_chunk(turn, chunk, (now - started) * 1000)
                if now - painted >= _PAINT_S:
                    painted = now
                    yield turn
    except HybridError as error:
        turn = dataclasses.replace(turn, error=error.message)
    yield dataclasses.replace(turn, done=True, total_ms=(time.perf_counter() - started) * 1000)


def stopped(turn: Turn) -> Turn:
    """The turn as it stands when nobody waits for the rest of it."""
    if turn.done:
        return turn
    return dataclasses.replace(turn, done=True, error="" if turn.answer else "Stopped before the first word.")


def _with_headers(turn: Turn, headers: Mapping[str, str]) -> Turn:
    adapter, version = headers.get("x-hybrid-selected-adapter", ""), headers.get("x-hybrid-selected-version", "")
    return dataclasses.replace(
        turn,
        arm=headers.get("x-hybrid-selected-arm", ""),
        adapter=f"{adapter}@{version}" if adapter and version else adapter,
        decision_id=headers.get("x-hybrid-decision-id", ""),
    )


def _with_chunk(turn: Turn, chunk: JSON, elapsed_ms: float) -> Turn:
    changes: dict[str, Any] = {}
    text = "".join(
        choice.get("delta", {}).get("content") or ""
        for choice in chunk.get("choices") or []
        if choice.get("index", 0) == 0
    )
    if text:
        changes["answer"] = turn.answer + text
        changes["first_ms"] = turn.first_ms or elapsed_ms
    if chunk.get("usage"):
        changes["usage"] = chunk["usage"]
    if detail := chunk.get("hybrid"):
        changes["detail"] = detail
        changes["adapter"] = detail.get("adapter") or ""
    return dataclasses.replace(turn, **changes) if changes else turn
