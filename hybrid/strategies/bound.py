"""The verbs of `Tools`, bound to one request: the only place where a strategy's words become calls."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from hybrid.adapters.heads import Verdict
from hybrid.engine import Engine
from hybrid.errors import BadRequest, ModelNotFound, NotFound, NotReady
from hybrid.knowledge.answerable import Found
from hybrid.knowledge.examples import Shelf
from hybrid.knowledge.quote import Quote
from hybrid.knowledge.search import Library
from hybrid.prompts import within_budget
from hybrid.settings import Settings
from hybrid.strategies import STRATEGIES
from hybrid.strategies.moa import MARGIN
from hybrid.strategies.panel import Panel, Rater
from hybrid.types.arm import Arm
from hybrid.types.event import Event, Finished, Token, Usage
from hybrid.types.passage import Passage
from hybrid.types.request import Message, Request
from hybrid.types.rights import Rights

#: tokens kept for an answer whose length the request leaves open
ANSWER = 256
#: tokens of passages that are shown at least; a conversation that has no room for them is the engine's to refuse
LEAST = 64


class Bound:
    """`Tools` for one request. `adapters` maps the names a strategy may say to the engine's immutable names; `head`
    reads with the chosen head, `rater` with the reward model of the panel; `member` makes the tools of another arm that
    is asked the request it is given."""

    def __init__(
        self,
        request: Request,
        *,
        settings: Settings,
        engine: Engine,
        library: Library,
        shelves: Callable[[str | None, Rights], Sequence[Shelf]],
        count_tokens: Callable[[str], int],
        adapters: Mapping[str, str],
        instruction: str,
        top_k: int,
        quotes: bool,
        cache_salt: str,
        member: Callable[[Request, Arm], Bound],
        head: Callable[[str], Verdict] | None = None,
        panel: Panel | None = None,
        rater: Rater | None = None,
    ) -> None:
        self.instruction = instruction
        self.top_k = top_k
        self._quotes = quotes
        self.usage = Usage()
        self._request = request
        self._settings = settings
        self._engine = engine
        self._library = library
        self._shelves = shelves
        self._count_tokens = count_tokens
        self._adapters = adapters
        self._cache_salt = cache_salt
        self._member = member
        self._head = head
        self._panel = panel
        self._rater = rater
        self._asked = 0
        self._open: list[AsyncIterator[Any]] = []

    @property
    def context(self) -> int:
        return self._engine.status().max_model_len or self._settings.engine.max_model_len

    @property
    def passage_budget(self) -> int:
        return self._settings.retrieval.passage_budget_tokens

    @property
    def panel(self) -> Panel:
        if self._panel is None:
            raise BadRequest("No panel was convened for this request; ask for moa or self_moa.", param="model")
        return self._panel

    @property
    def refusal(self) -> str:
        return self._settings.retrieval.refusal

    @property
    def few_shot_k(self) -> int:
        return self._settings.gate.few_shot_k

    @property
    def system_prompt(self) -> str:
        return self._settings.system_prompt

    async def play(self, arm: Arm) -> AsyncGenerator[Event]:
        """The events of the arm's strategy, then Finished. Nothing that it opened outlives them."""
        events = STRATEGIES[arm.strategy](self._request, arm, self)
        self._open.append(events)
        try:
            async for event in events:
                yield event
            yield Finished(self.usage)
        finally:
            await self.aclose()

    def answer(
        self,
        arm: Arm,
        messages: Sequence[Message] | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> AsyncIterator[Event]:
        self._asked += 1
        asked = dataclasses.replace(
            self._request,
            id=f"{self._request.id}-{self._asked}",  # an engine may hold no two answers of one name
            messages=self._request.messages if messages is None else tuple(messages),
            sampling=self._request.sampling if sampling is None else sampling,
            stream=stream,
            about=self._request.query,
        )
        events = self._answer(arm, self._member(asked, arm))
        self._open.append(events)
        return events

    async def _answer(self, arm: Arm, tools: Bound) -> AsyncIterator[Event]:
        events = tools.play(arm)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
            self.usage += tools.usage

    def generate(
        self, messages: Sequence[Message] | None = None, *, prompt: Any = None, adapter: str | None = None
    ) -> AsyncIterator[Token]:
        stream = self._generate(messages, prompt, adapter)
        self._open.append(stream)
        return stream

    async def _generate(
        self, messages: Sequence[Message] | None, prompt: Any, adapter: str | None
    ) -> AsyncIterator[Token]:
        tokens = self._engine.generate(
            messages,
            prompt=prompt,
            adapter=self._adapters[adapter] if adapter else None,
            sampling=self._request.sampling,
            stream=self._request.stream,
            request_id=self._request.id,
            cache_salt=self._cache_salt,
        )
        self._open.append(tokens)
        usage = Usage(calls=1)
        try:
            async for token in tokens:
                if token.usage is not None:
                    usage = Usage(token.usage.prompt_tokens, token.usage.completion_tokens, 1)
                yield token
        finally:
            self.usage += usage

    async def search(self, corpus: str | None, query: str, k: int) -> Found:
        def found() -> Found:
            seen = self._library.look_up(corpus, query, k, rights=self._request.rights)
            return dataclasses.replace(seen, passages=self._library.around(seen.passages))

        return await asyncio.to_thread(found)

    async def quote(self, query: str, passage: Passage) -> Quote | None:
        if not self._quotes:
            return None
        try:
            return await asyncio.to_thread(self._library.quote, query, passage)
        except NotFound:  # its corpus went while the answer was made
            return None

    async def examples(self, task: str | None, query: str, k: int) -> tuple[tuple[str, str], ...]:
        shelves = self._shelves(task, self._request.rights)

        def nearest() -> tuple[tuple[str, str], ...]:
            vector = self._library.embedder.embed_query(query)
            hits = [hit for shelf in shelves for hit in shelf.nearest(vector, k)]
            best = sorted(hits, key=lambda hit: hit[2], reverse=True)[:k]
            return tuple((message, answer) for message, answer, _ in reversed(best))

        return await asyncio.to_thread(nearest)

    async def classify(self, text: str) -> tuple[tuple[str, float], ...]:
        if self._head is None:
            raise ModelNotFound("No head was chosen for this request; ask for head:NAME.", param="model")
        verdict = await asyncio.to_thread(self._head, text)
        self.usage += Usage(self._count_tokens(text), self._count_tokens(verdict.label))
        return verdict.ranked

    async def rate(self, answers: Sequence[str]) -> Sequence[float]:
        reward = self.panel.reward
        if reward is None or self._rater is None:
            raise NotReady("no reward model can be asked from here")
        return await asyncio.to_thread(self._rater, reward.ref.path, self._request.messages, answers)

    def count(self, text: str) -> int:
        return self._count_tokens(text)

    def fit(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        return within_budget(passages, max(min(self.passage_budget, self._room()), LEAST), self._count_tokens)

    def _room(self) -> int:
        """Tokens that the context leaves beside the conversation and its answer."""
        sampling = self._request.sampling
        answer = sampling.get("max_completion_tokens") or sampling.get("max_tokens") or ANSWER
        asked = [self.instruction, *(message.text for message in self._request.messages)]
        return self.context - sum(map(self._count_tokens, asked)) - int(answer) - MARGIN

    async def aclose(self) -> None:
        """Ends what is still open, the strategy before its calls: a client that left must not keep the engine busy."""
        for stream in self._open:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
