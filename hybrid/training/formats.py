"""The shapes a training row can have, found by looking at its keys.

| keys of the row | known as |
|---|---|
| `messages` | OpenAI chat (`weight: 0` leaves an assistant turn out, as OpenAI does) |
| `conversations` | ShareGPT (`from`, `value`) |
| `input`, `reference` | a task row |
| `instruction`, `output` | Alpaca (`input` optional) |
| `prompt`, `completion` | prompt and completion (text, or lists of messages as TRL writes them) |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid.prompts import task_message
from hybrid.types import Message

Row = Mapping[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Example:
    """What is learned from: `answer` is the assistant's words after `messages`.

    `bare` is the input alone, without a task's instruction.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    bare: str

    @property
    def question(self) -> str:
        """The words of the last message before the answer."""
        return self.messages[-1].text

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        """Equal for rows that ask the same in the same conversation."""
        return tuple((message.role, message.text) for message in self.messages)


class RowError(Exception):
    """A row that cannot be used: the field, and what to do about it."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(f"field {field!r}: {remedy}")


def examples_of(row: object, identity: str, instruction: str = "") -> list[Example]:
    """The examples in a row: one, or one for each assistant turn of a conversation.

    `identity` names the row where it has no `id`. Raises RowError.
    """
    if not isinstance(row, Mapping):
        raise RowError("(row)", f"is {type(row).__name__}; write one JSON object a line")
    for keys, read in FORMATS.items():
        if all(key in row for key in keys):
            return read(row, str(row.get("id", identity)), instruction)
    shapes = ", ".join(" + ".join(keys) for keys in FORMATS)
    raise RowError("(row)", f"has the keys {', '.join(map(str, row)) or 'none'}; use one of: {shapes}")


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        told = "is empty" if isinstance(value, str) else f"is {type(value).__name__}"
        raise RowError(field, f"{told}; put text there")
    return value


def _single(identity: str, prompt: str, answer: str, bare: str) -> list[Example]:
    return [Example(identity, (Message("user", prompt),), answer, bare)]


def _task(row: Row, identity: str, instruction: str) -> list[Example]:
    bare = _text(row, "input")
    return _single(identity, task_message(instruction, bare), _text(row, "reference"), bare)


def _alpaca(row: Row, identity: str, instruction: str) -> list[Example]:
    asked = _text(row, "instruction")
    bare = row.get("input") or ""
    prompt = task_message(asked, _text(row, "input")) if bare else asked
    return _single(identity, prompt, _text(row, "output"), str(bare) or asked)


def _completion(row: Row, identity: str, instruction: str) -> list[Example]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], "role", "content", "completion", identity)
    return _single(identity, _text(row, "prompt"), _text(row, "completion"), _text(row, "prompt"))


def _openai(row: Row, identity: str, instruction: str) -> list[Example]:
    return _conversation(row["messages"], "role", "content", "messages", identity)


def _sharegpt(row: Row, identity: str, instruction: str) -> list[Example]:
    return _conversation(row["conversations"], "from", "value", "conversations", identity)


def _conversation(turns: Any, role_key: str, text_key: str, field: str, identity: str) -> list[Example]:
    if not isinstance(turns, list) or not turns:
        raise RowError(field, "is no list of turns; write one object a turn")
    messages = [_turn(turn, role_key, text_key, f"{field}[{n}]") for n, turn in enumerate(turns)]
    learned = [
        n
        for n, (turn, message) in enumerate(zip(turns, messages, strict=True))
        if message.role == "assistant" and turn.get("weight", 1) != 0
    ]
    if not learned:
        raise RowError(field, "has no assistant turn to learn; end the conversation with the answer you want")
    for n in learned:
        if n == 0 or messages[n - 1].role == "assistant":
            raise RowError(f"{field}[{n}]", "answers nothing; put a user turn before it")
    return [_learn(messages, n, identity if n == learned[-1] else f"{identity}#{n}") for n in learned]


def _learn(messages: list[Message], n: int, identity: str) -> Example:
    return Example(identity, tuple(messages[:n]), messages[n].text, messages[n - 1].text)


def _turn(turn: Any, role_key: str, text_key: str, field: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(field, f"is {type(turn).__name__}; write an object with {role_key!r} and {text_key!r}")
    role = _ROLES.get(str(turn.get(role_key)))
    if role is None:
        raise RowError(f"{field}.{role_key}", f"is {turn.get(role_key)!r}; use one of {', '.join(_ROLES)}")
    content = turn.get(text_key)
    text = Message(role, content).text if isinstance(content, list) else content
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{field}.{text_key}", "holds no text; tool calls and pictures cannot be trained on yet")
    return Message(role, text)


#: the keys that tell a shape → how it is read; the first whose keys are all there wins
FORMATS: Mapping[tuple[str, ...], Callable[[Row, str, str], list[Example]]] = {
    ("messages",): _openai,
    ("conversations",): _sharegpt,
    ("input", "reference"): _task,
    ("instruction", "output"): _alpaca,
    ("prompt", "completion"): _completion,
}
