"""The verbs a strategy is handed; the gateway binds them to one request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from hybrid.knowledge.answerable import Found
from hybrid.knowledge.quote import Quote
from hybrid.strategies.panel import Panel
from hybrid.types.arm import Arm
from hybrid.types.event import Event, Token
from hybrid.types.passage import Passage
from hybrid.types.request import Message


class Tools(Protocol):
    """The verbs a strategy may use, bound to one request."""

    def generate(
        self, messages: Sequence[Message] | None = None, *, prompt: Any = None, adapter: str | None = None
    ) -> AsyncIterator[Token]:
        """The engine's answer, with the request's own sampling and streaming. `adapter` is `name` or `name@version`."""
        ...

    def answer(
        self,
        arm: Arm,
        messages: Sequence[Message] | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        stream: bool = False,
    ) -> AsyncIterator[Event]:
        """The events of another arm that answers the same question, then Finished with what it cost.

        `messages` and `sampling` replace the request's own. Raises the arm's error. Its usage counts in this answer's,
        and it ends when this answer does.
        """
        ...

    async def search(self, corpus: str | None, query: str, k: int) -> Found:
        """The `k` passages that are best for `query` and that the caller may see, with whether they are too weak to
        answer from. `corpus=None` searches all of them."""
        ...

    async def quote(self, query: str, passage: Passage) -> Quote | None:
        """The sentence of a passage that `query` asks for; None where answers are left as they are."""
        ...

    async def examples(self, task: str | None, query: str, k: int) -> tuple[tuple[str, str], ...]:
        """The `k` training examples (user message, answer) nearest to `query`, nearest last."""
        ...

    async def classify(self, text: str) -> tuple[tuple[str, float], ...]:
        """What the chosen head says of `text`: (label, probability 0 to 1), the likeliest first."""
        ...

    async def rate(self, answers: Sequence[str]) -> Sequence[float]:
        """How good each answer to the request is to the panel's reward model; numbers that compare with one another.

        Raises what keeps it from rating, in words.
        """
        ...

    def fit(self, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        """As many of the passages, best first, as the prompt has room for beside the conversation and its answer."""
        ...

    def count(self, text: str) -> int:
        """How many tokens a text is to the base model."""
        ...

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the model holds."""
        ...

    @property
    def passage_budget(self) -> int:
        """Tokens of passages in one prompt at most."""
        ...

    @property
    def panel(self) -> Panel:
        """Who confers on this request."""
        ...

    @property
    def top_k(self) -> int:
        """How many passages to ask for."""
        ...

    @property
    def refusal(self) -> str:
        """What is said where the passages are too weak to answer from; nothing where the model answers all the same."""
        ...

    @property
    def few_shot_k(self) -> int:
        """How many worked examples to ask for."""
        ...

    @property
    def instruction(self) -> str:
        """What the chosen adapter was trained to be told, where the gate chose it; nothing where the caller did."""
        ...

    @property
    def system_prompt(self) -> str:
        """The house's system prompt, or nothing."""
        ...
