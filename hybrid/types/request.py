"""What is asked: messages, knobs, and the request that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hybrid.types import JSON
from hybrid.types.rights import Rights


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `extra` keeps what we do not read (`name`, `tool_calls`, …) as it was sent."""

    role: str
    content: str | list[JSON] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The words of the message: the text parts joined, nothing for a message without any."""
        if isinstance(self.content, list):
            return "\n".join(str(p.get("text", "")) for p in self.content if p.get("type") == "text")
        return self.content or ""

    def wire(self) -> JSON:
        """The message as OpenAI spells it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What `extra_body.hybrid` may set. `arms` limits the gate's choice; `quality_cost` is 0 (cheapest) to 1 (best)."""

    quality_cost: float | None = None
    arms: tuple[str, ...] | None = None
    corpus: str | None = None
    top_k: int | None = None
    explain: bool = False
    session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One question to the gateway. Exactly one of `messages` (chat) and `prompt` (raw completion) is set.

    `sampling` holds every engine parameter as the client spelled it (`max_tokens`, `tools`, `top_k`, …): it passes
    through unchanged. `caller` is the tenant: the id of the API key, or "local" where no key exists. `about` is the
    question where the last user message holds more than that: drafts of others, say. `rights` are set by the gateway.
    """

    id: str
    model: str = "auto"
    messages: tuple[Message, ...] = ()
    prompt: Any = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    knobs: Knobs = field(default_factory=Knobs)
    caller: str = "local"
    about: str = ""
    rights: Rights = field(default_factory=Rights)

    @property
    def query(self) -> str:
        """The text the gate and the retriever look at: the last user message, or the raw prompt."""
        if self.about:
            return self.about
        for message in reversed(self.messages):
            if message.role == "user":
                return message.text
        return self.prompt if isinstance(self.prompt, str) else ""
