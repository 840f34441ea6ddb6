"""The vocabulary: the frozen nouns every other file speaks. Imports nothing of ours.

    Request ──gate──► scores ──policy──► Decision(arm) ──strategy──► Event … Event ──fold──► Answer

An `Answer` is the fold of a stream of `Event`s: the server turns the same stream into SSE, the UI into panels,
the evaluator into an `Outcome`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JSON = dict[str, Any]


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


@dataclass(frozen=True, slots=True)
class Scores:
    """What each stage of a search made of a passage: the cosine, BM25 (0 where no word is shared), the two together,
    the closer look, and what made it the next one that is unlike those before it (None where a stage is off)."""

    dense: float
    lexical: float = 0.0
    fused: float = 0.0
    rerank: float | None = None
    mmr: float | None = None

    def wire(self) -> JSON:
        """As a search shows them."""
        values = {name: getattr(self, name) for name in ("dense", "lexical", "fused", "rerank", "mmr")}
        return {name: None if value is None else round(value, 4) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a corpus. `score` is the cosine similarity to the query, -1 to 1 (0 where none was asked); `alike` is
    how many others that were found say almost the same and are left out."""

    id: str
    title: str
    text: str
    score: float = 0.0
    corpus: str = ""
    document: str = ""
    scores: Scores | None = field(default=None, compare=False)
    alike: int = field(default=0, compare=False)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Which arm answers and why. `scores` are the gate's, one an arm, higher is better, 0 to 1.

    `chosen_by` is "gate", "caller" (the model was named) or "fallback"; `fallback` says in a word why the gate was
    not followed (`deadline`, `error`, `abstained`), and is None where it was.
    """

    id: str
    arm: Arm
    scores: Mapping[str, float] = field(default_factory=dict)
    confidence: float = 1.0
    reason: str = ""
    chosen_by: str = "gate"
    fallback: str | None = None
    adapter: str | None = None  # the immutable name@version that answers
    route_ms: float = 0.0
    neighbours: tuple[Mapping[str, Any], ...] = ()
    #: the query's unit vector as float16 bytes, for the log alone; None where it was not computed or not to be kept
    vector: bytes | None = field(default=None, repr=False)
    #: a cheaper arm that is asked first and answers if it is sure (a cascade)
    first: Arm | None = None
    #: the probability with which the gate takes this arm for such a request, above 0; 1 without exploration
    propensity: float = 1.0
    #: how far feedback moved the scores, by arm
    adjusted: Mapping[str, float] = field(default_factory=dict)
    #: the version of the taught gate that scored; None without one
    gate: int | None = None

    def wire(self) -> JSON:
        """The public record: what `/v1/route` and `/v1/decisions/{id}` return."""
        return {
            "id": self.id,
            "arm": str(self.arm),
            "scores": dict(self.scores),
            "confidence": self.confidence,
            "reason": self.reason,
            "fallback": self.fallback,
            "chosen_by": self.chosen_by,
            "adapter": self.adapter,
            "route_ms": self.route_ms,
            "neighbours": [dict(n) for n in self.neighbours],
            "propensity": self.propensity,
            "adjusted": dict(self.adjusted),
            "gate": self.gate,
        }


# --- events: what a strategy yields --------------------------------------------------------------------------------


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


Event = Decided | Retrieved | Drafted | Token | Finished | Failed


@dataclass(frozen=True, slots=True)
class Answer:
    """The fold of the events of one request."""

    text: str
    decision: Decision | None = None
    passages: tuple[Passage, ...] = ()
    drafts: tuple[Drafted, ...] = ()
    usage: Usage = Usage()
    finish_reason: str | None = None
    error: Exception | None = None
    refused: bool = False  # the passages found were too weak to answer from


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One (example, arm) measured: a row of `outcomes.jsonl`."""

    task: str
    id: str
    arm: str
    score: float
    answer: str
    latency_ms: float
    prompt_tokens: int
    completion_tokens: int
    calls: int
    adapter: str | None = None
    passages: tuple[str, ...] = ()
    error: str | None = None
    chosen: str | None = None  # the arm that answered, where the gate chose
    confidence: float | None = None  # the gate's, where it chose
    grounded: Mapping[str, float] = field(default_factory=dict)  # supported share of words, numbers, names, where shown


def fold(events: list[Event]) -> Answer:
    """The answer that a finished list of events tells. With several choices, the text is that of choice 0."""
    text: list[str] = []
    decision: Decision | None = None
    passages: tuple[Passage, ...] = ()
    drafts: list[Drafted] = []
    usage = Usage()
    finish: str | None = None
    error: Exception | None = None
    refused = False
    for event in events:
        match event:
            case Decided():
                decision = event.decision
            case Retrieved():
                passages, refused = event.passages, event.refused
            case Drafted():
                drafts.append(event)
            case Token():
                if event.index == 0:
                    text.append(event.text)
                    finish = event.finish_reason or finish
            case Finished():
                usage = event.usage
            case Failed():
                error = event.error
    return Answer("".join(text), decision, passages, tuple(drafts), usage, finish, error, refused)
