"""What a strategy yields, from the decision to the end, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.types import JSON
from hybrid.types.decision import Decision
from hybrid.types.passage import Passage


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and engine calls; `a + b` sums them, so that an answer can own up to every hidden call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.calls + other.calls,
        )

    def wire(self) -> JSON:
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True)
class Decided:
    """The first event of every answer."""

    decision: Decision


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Passages were found; they are what the answer may cite.

    `answerable` is the probability that they hold an answer, 0 to 1, where the corpus's own questions taught to tell;
    `refused` says that they were found too weak, and the answer is just that; `query` is what was searched for.
    """

    passages: tuple[Passage, ...]
    answerable: float | None = None
    refused: bool = False
    query: str = ""


@dataclass(frozen=True, slots=True)
class Drafted:
    """A hidden answer (a proposer's draft, an example used): shown to the curious, never to the client's parser.

    `note` says in words what became of it: chosen, dropped, of which layer.
    """

    arm: str
    text: str
    usage: Usage = Usage()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Quoted:
    """What follows the model's own words: `text` quotes the passage at place `at`, from 0. It is part of the text of
    the last tokens, and of no count of them."""

    text: str
    at: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer as it arrives.

    `raw` is the engine's own JSON, as bytes: a stream chunk, or the whole body when the request does not stream. The
    server forwards it unparsed; `text`, `index` and `finish_reason` are read from it for those who fold.
    `usage` is set on the piece that carries it (the last).
    """

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    raw: bytes = b""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete. `usage` sums every call made for it."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The strategy failed; `error` is one of `hybrid.errors`. Nothing follows."""

    error: Exception


Event = Decided | Retrieved | Drafted | Quoted | Token | Finished | Failed
