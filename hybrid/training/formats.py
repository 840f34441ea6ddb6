"""The shapes a training row can have, found by looking at its keys.

| keys of the row | known as |
|---|---|
| `chosen`, `rejected` | a preference pair after `prompt`, `messages` or `input` (text, or TRL's messages) |
| `input`, `preferred_output`, `non_preferred_output` | OpenAI's preference pair (`input.messages`) |
| `messages` | OpenAI chat (`weight: 0` leaves an assistant turn out, as OpenAI does) |
| `conversations` | ShareGPT (`from`, `value`) |
| `input`, `reference` | a task row |
| `instruction`, `output` | Alpaca (`input` optional) |
| `prompt`, `completion` | prompt and completion (text, or lists of messages as TRL writes them) |
| `text`, `label` | a labelled text |
| `text` | plain text: nothing is asked, all of it is learned |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hybrid.prompts import task_message
from hybrid.types.request import Message

Row = Mapping[str, Any]
Key = tuple[tuple[str, str], ...]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Example:
    """What is learned from: `answer` is the assistant's words after `messages`.

    `bare` is the input alone, without a task's instruction; `place` is the file and line it was read from.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    bare: str
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)

    @property
    def question(self) -> str:
        """The words of the last message before the answer."""
        return self.messages[-1].text

    @property
    def key(self) -> Key:
        """Equal for rows that ask the same in the same conversation."""
        return tuple((message.role, message.text) for message in self.messages)

    @property
    def reply(self) -> str:
        """What the row teaches: rows of equal key and reply are the same row."""
        return self.answer


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: after `messages`, `chosen` is the better answer and `rejected` the worse."""

    id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    bare: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> Key:
        """Equal for rows that ask the same in the same conversation."""
        return tuple((message.role, message.text) for message in self.messages)

    @property
    def reply(self) -> str:
        """What the row teaches: both answers."""
        return f"{self.chosen}\0{self.rejected}"

    @property
    def preferred(self) -> Example:
        """The better answer alone, as an example to learn from."""
        return Example(self.id, self.messages, self.chosen, self.bare, self.meta, self.place)


@dataclass(frozen=True, slots=True)
class Text:
    """A plain text: all of it is learned, nothing is asked."""

    id: str
    text: str
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)

    @property
    def key(self) -> Key:
        """Equal for equal texts."""
        return (("text", self.text),)

    @property
    def reply(self) -> str:
        """Nothing: a text answers no question."""
        return ""

    @property
    def bare(self) -> str:
        """The text."""
        return self.text


Item = Example | Pair | Text


class RowError(Exception):
    """A row that cannot be used: the field, and what to do about it."""

    def __init__(self, field: str, remedy: str) -> None:
        super().__init__(f"field {field!r}: {remedy}")


def items_of(row: object, identity: str, instruction: str = "") -> Sequence[Item]:
    """What a row teaches: one item, or one for each assistant turn of a conversation, with the row's `meta`.

    `identity` names the row where it has no `id`. Raises RowError.
    """
    if not isinstance(row, Mapping):
        raise RowError("(row)", f"is {type(row).__name__}; write one JSON object a line")
    meta = row.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise RowError("meta", f"is {type(meta).__name__}; write an object there, or leave it out")
    for keys, read in FORMATS.items():
        if all(key in row for key in keys):
            items = read(row, str(row.get("id", identity)), instruction)
            return [replace(item, meta=meta) for item in items] if meta else items
    shapes = ", ".join(" + ".join(keys) for keys in FORMATS)
    raise RowError("(row)", f"has the keys {', '.join(map(str, row)) or 'none'}; use one of: {shapes}")


def row_of(item: Item, instruction: str = "") -> dict[str, Any]:
    """A row that reads back as this item under the same instruction: a task row where it is one."""
    meta = {"meta": dict(item.meta)} if item.meta else {}
    if isinstance(item, Text):
        return {"id": item.id, "text": item.text, **meta}
    turns = [{"role": m.role, "content": m.text} for m in item.messages]
    if isinstance(item, Pair):
        return {"id": item.id, "messages": turns, "chosen": item.chosen, "rejected": item.rejected, **meta}
    if item.key == (("user", task_message(instruction, item.bare)),):
        return {"id": item.id, "input": item.bare, "reference": item.answer, **meta}
    muted = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in turns]
    return {"id": item.id, "messages": [*muted, {"role": "assistant", "content": item.answer}], **meta}


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


def _labelled(row: Row, identity: str, instruction: str) -> list[Example]:
    bare = _text(row, "text")
    return _single(identity, task_message(instruction, bare), _text(row, "label"), bare)


def _plain(row: Row, identity: str, instruction: str) -> list[Text]:
    return [Text(identity, _text(row, "text"))]


def _preference(row: Row, identity: str, instruction: str) -> list[Pair]:
    asked, bare = _asked(row, instruction)
    return _pair(identity, asked, bare, (row["chosen"], "chosen"), (row["rejected"], "rejected"))


def _openai_preference(row: Row, identity: str, instruction: str) -> list[Pair]:
    given = row["input"]
    if not isinstance(given, Mapping):
        raise RowError("input", 'is no object; write {"messages": [...]} as OpenAI does')
    asked = _turns(given.get("messages"), "input.messages")
    better, worse = ((row[field], field) for field in ("preferred_output", "non_preferred_output"))
    return _pair(identity, asked, "", better, worse)


def _asked(row: Row, instruction: str) -> tuple[list[Message], str]:
    """The conversation that a preference row continues, and its bare input; nothing where the answers contain it."""
    for name in ("messages", "prompt"):
        if isinstance(row.get(name), list):
            return _turns(row[name], name), ""
    if "prompt" in row:
        return [Message("user", _text(row, "prompt"))], ""
    if "input" in row:
        bare = _text(row, "input")
        return [Message("user", task_message(instruction, bare))], bare
    return [], ""


def _pair(
    identity: str, asked: list[Message], bare: str, better: tuple[Any, str], worse: tuple[Any, str]
) -> list[Pair]:
    """`better` and `worse` are (answer, field): text, or turns of which the last is the answer."""
    lead, chosen = _answer(*better)
    other, rejected = _answer(*worse)
    if lead != other:
        raise RowError(worse[1], f"continues another conversation than {better[1]!r}; both must answer the same turns")
    messages = (*asked, *lead)
    if not messages or messages[-1].role == "assistant":
        raise RowError(better[1], "answers nothing; put the question in 'prompt' or 'messages'")
    if chosen == rejected:
        raise RowError(worse[1], f"equals {better[1]!r}; a preference needs two different answers")
    return [Pair(identity, messages, chosen, rejected, bare or messages[-1].text)]


def _answer(value: Any, field: str) -> tuple[list[Message], str]:
    if isinstance(value, list):
        turns = _turns(value, field)
        if turns[-1].role != "assistant":
            raise RowError(field, "does not end with an assistant turn; put the answer last")
        return turns[:-1], turns[-1].text
    return [], _text({field: value}, field)


def _turns(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(field, "is no list of turns; write one object a turn")
    return [_turn(turn, "role", "content", f"{field}[{n}]") for n, turn in enumerate(value)]


#: the keys that tell a shape → how it is read; the first whose keys are all there wins
FORMATS: Mapping[tuple[str, ...], Callable[[Row, str, str], Sequence[Item]]] = {
    ("chosen", "rejected"): _preference,
    ("input", "preferred_output", "non_preferred_output"): _openai_preference,
    ("messages",): _openai,
    ("conversations",): _sharegpt,
    ("input", "reference"): _task,
    ("instruction", "output"): _alpaca,
    ("prompt", "completion"): _completion,
    ("text", "label"): _labelled,
    ("text",): _plain,
}
