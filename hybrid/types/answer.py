"""The fold of a request's events."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid.types.decision import Decision
from hybrid.types.event import Decided, Drafted, Event, Failed, Finished, Quoted, Retrieved, Token, Usage
from hybrid.types.passage import Passage


@dataclass(frozen=True, slots=True)
class Answer:
    """The fold of the events of one request."""

    text: str
    decision: Decision | None = None
    passages: tuple[Passage, ...] = ()
    drafts: tuple[Drafted, ...] = ()
    usage: Usage = field(default_factory=Usage)
    finish_reason: str | None = None
    error: Exception | None = None
    refused: bool = False  # the passages found were too weak to answer from
    quoted: str = ""  # how the text ends that the model did not say


def fold(events: list[Event]) -> Answer:
    """The answer that a finished list of events tells. With several choices, the text is that of choice 0."""
    text: list[str] = []
    decision: Decision | None = None
    passages: tuple[Passage, ...] = ()
    drafts: list[Drafted] = []
    usage = Usage()
    finish: str | None = None
    error: Exception | None = None
    refused, quoted = False, ""
    for event in events:
        match event:
            case Decided():
                decision = event.decision
            case Retrieved():
                passages, refused = event.passages, event.refused
            case Drafted():
                drafts.append(event)
            case Quoted():
                quoted = event.text
            case Token():
                if event.index == 0:
                    text.append(event.text)
                    finish = event.finish_reason or finish
            case Finished():
                usage = event.usage
            case Failed():
                error = event.error
    return Answer("".join(text), decision, passages, tuple(drafts), usage, finish, error, refused, quoted)
