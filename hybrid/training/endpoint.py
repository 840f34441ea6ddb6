"""Any OpenAI-compatible endpoint as a source of answers: a stronger model, another server, or our own."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hybrid.errors import EngineError, EngineRejected
from hybrid.types.request import Message

#: requests at a time; the client retries what a retry can mend
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, and the mean probability of its tokens (None where the endpoint tells none)."""

    text: str
    confidence: float | None


class Endpoint:
    """A model behind a URL that ends in /v1. The key is `OPENAI_API_KEY`, which local servers do without."""

    def __init__(self, url: str, model: str) -> None:
        from openai import AsyncOpenAI

        self.url = url
        self.model = model
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = AsyncOpenAI(base_url=url, api_key=key, max_retries=3)
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], **sampling: Any) -> Said:
        """One answer. Raises EngineRejected for what the endpoint refuses, EngineError where it cannot be reached."""
        from openai import APIError, APIStatusError

        wire: Any = [message.wire() for message in messages]
        try:
            async with self._room:
                answer = await self._client.chat.completions.create(model=self.model, messages=wire, **sampling)
        except APIStatusError as error:
            raise EngineRejected(f"{self.url} refused: {error.message}", status=error.status_code) from error
        except APIError as error:
            raise EngineError(f"{self.url} does not answer: {error.message}. Check the URL and the server.") from error
        choice = answer.choices[0]
        tokens = choice.logprobs.content if choice.logprobs else None
        chances = [math.exp(token.logprob) for token in tokens or ()]
        return Said((choice.message.content or "").strip(), sum(chances) / len(chances) if chances else None)

    async def ask_all(self, conversations: Sequence[Sequence[Message]], **sampling: Any) -> list[Said]:
        """The answers in the order of the conversations; the first failure ends all."""
        try:
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(self.ask(messages, **sampling)) for messages in conversations]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in asked]
