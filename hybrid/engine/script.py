"""What the scripted engine says: pure functions from a request to the words, faults and numbers of its answer."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.engine import WEIGHTS

_DIRECTIVE = re.compile(
    r"(?<!\S)@(tokens|delay|stall|reset|status|hang|wake)\b[ ]?(?:(\d+(?:\.\d+)?)(ms|s)?)?([^\n@]*)"
)


class BadScript(ValueError):
    """The request is answered with an error: `status` and the message."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Script:
    """The directives of one message. Steps are token positions; `delay` is in seconds."""

    tokens: int | None = None
    delay: float = 0.0
    stall: int | None = None
    reset: int | None = None
    hang: bool | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A loaded adapter: what it changes (`salt`, nothing when empty), and the answers it has learned by heart.

    `recorded` holds the log-probabilities that its trainer saw, by text: words and a hash cannot compute those, so
    they are believed.
    """

    name: str
    path: str
    salt: str
    nan: bool
    examples: Mapping[str, str]
    recorded: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, ready to be sent token by token; `echoed` are the prompt's tokens where it is to be repeated."""

    tokens: tuple[str, ...]
    finish_reason: str
    prompt_tokens: int
    prompt_logprobs: list[dict[str, Any] | None]
    script: Script
    echoed: tuple[str, ...] = ()


def words(text: str) -> list[str]:
    """The tokens of a text: its words, each with the blanks before it."""
    return re.findall(r"\s*\S+", text)


def prompts_of(body: Mapping[str, Any]) -> list[str]:
    """The prompts of a request, as text: one for a chat, one or more for a raw completion."""
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise BadScript("messages must be a list with at least one message.")
        return [" ".join(_text(m.get("content")) for m in messages)]
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        nested = [prompt] if all(isinstance(p, int) for p in prompt) else prompt
        return [p if isinstance(p, str) else " ".join(map(str, p)) for p in nested]
    raise BadScript("Either prompt or prompt_embeds must be provided and non-empty.")


def answers(
    body: Mapping[str, Any], adapter: Adapter | None, max_model_len: int, loaded: Iterable[Adapter] = ()
) -> list[Answer]:
    """The choices of a request, `n` for each prompt. Raises BadScript where vLLM would answer with an error.

    A text that some adapter `loaded` has on record counts its trainer's tokens, with whatever adapter it is asked.
    """
    n = body.get("n") or 1
    limit = body.get("max_completion_tokens") or body.get("max_tokens", None if "messages" in body else 16)
    echo = bool(body.get("echo"))
    if limit is not None and (not isinstance(limit, int) or limit < (0 if echo else 1)):
        raise BadScript(f"max_tokens must be at least 1, got {limit}.")
    out: list[Answer] = []
    for prompt in prompts_of(body):
        seen = words(prompt)
        if len(seen) + (limit or 1) > max_model_len:
            raise BadScript(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
                f"{len(seen)} input tokens. Please reduce the length of the input prompt."
            )
        question = _question(body, prompt)
        script = read_script(question)
        room = max_model_len - len(seen) if limit is None else limit
        tokens, reason = _spoken(body, _say(question, script, adapter), room) if room else ((), "length")
        records = [other.recorded[prompt] for other in loaded if prompt in other.recorded]
        logprobs = _as_recorded(records[0], prompt, adapter) if records else _prompt_logprobs(seen, adapter)
        out += [Answer(tokens, reason, len(seen), logprobs, script, tuple(seen) if echo else ())] * n
    return out


def read_script(text: str) -> Script:
    """The directives in a message. Raises BadScript for `@status`."""
    found: dict[str, Any] = {}
    for name, number, unit, rest in _DIRECTIVE.findall(text):
        if name == "status":
            raise BadScript(rest.strip() or "scripted error", int(number or 400))
        if name in ("hang", "wake"):
            found["hang"] = name == "hang"
        elif name == "delay":
            found["delay"] = float(number or 0) * (0.001 if unit == "ms" else 1.0)
        else:
            found[name] = int(float(number or 0))
    return Script(**found)


def logprob(adapter: Adapter | None, position: int, token: str) -> float:
    """A made-up log-probability, the same for the same weights, position and token."""
    if adapter and adapter.nan:
        return float("nan")
    salt = adapter.salt if adapter else ""
    return -5.0 * zlib.crc32(f"{salt}|{position}|{token}".encode()) / 2**32


def read_adapter(name: str, folder: Path, max_rank: int) -> Adapter:
    """Reads a PEFT folder. Raises FileNotFoundError, or ValueError with vLLM's words."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config["r"] > max_rank:
        raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {max_rank}.")
    salt, nan = _effect(folder / WEIGHTS)
    examples: dict[str, str] = {}
    recorded = folder / "examples.jsonl"
    if recorded.is_file():
        rows = (json.loads(line) for line in recorded.read_text(encoding="utf-8").splitlines() if line.strip())
        examples = {row["input"]: row["reference"] for row in rows}
    return Adapter(name, str(folder), salt, nan, examples, _recorded(folder / "card.json"))


def _recorded(card: Path) -> dict[str, tuple[float, ...]]:
    """The recording on the card of an adapter that was really trained: the card tells its recipe."""
    told = json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {}
    canary = told.get("canary")
    if not told.keys() & {"recipe", "merge"} or not isinstance(canary, dict):
        return {}
    return {str(canary["prompt"]): tuple(float(value) for value in canary["logprobs"])}


def _effect(weights: Path) -> tuple[str, bool]:
    """(a digest of lora_B, empty when it is all zeros; whether any weight is NaN)."""
    raw = weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    salt, nan = "", False
    for name, fact in sorted(header.items()):
        begin, end = (8 + size + offset for offset in fact["data_offsets"])
        if end > len(raw):
            raise ValueError("Error while deserializing header: incomplete metadata, file not fully covered")
        changes, broken = _look(raw[begin:end], fact["dtype"])
        nan = nan or broken
        if "lora_B" in name and changes:
            salt += f"{zlib.crc32(raw[begin:end]):08x}"
    return salt, nan


#: dtype → (bytes, where the exponent's bits are): NaN has them all set, and some bit of the fraction; zero has none
_FLOATS = {"F16": (2, 0x7C00), "BF16": (2, 0x7F80), "F32": (4, 0x7F800000)}


def _look(data: bytes, dtype: str) -> tuple[bool, bool]:
    """(whether any value is not zero, whether any is NaN), without a library that knows bfloat16."""
    import numpy as np

    width, exponent = _FLOATS[dtype]
    bits = np.frombuffer(data, dtype=f"<u{width}") & (exponent | (exponent & -exponent) - 1)  # without the sign
    return bool(bits.any()), bool((bits > exponent).any())


def _say(question: str, script: Script, adapter: Adapter | None) -> list[str]:
    if script.tokens is not None:
        return [f" t{i}" if i else "t0" for i in range(script.tokens)]
    if adapter and question in adapter.examples:
        return words(adapter.examples[question])
    start = " ".join(question.split()[:12])
    return words(f"{adapter.name} answers: {start}" if adapter else f"The base model read: {start}")


def _spoken(body: Mapping[str, Any], tokens: list[str], limit: int) -> tuple[tuple[str, ...], str]:
    """The tokens that are sent after `ignore_eos`, `stop` and `max_tokens`, and the finish reason."""
    if body.get("ignore_eos"):
        tokens = (tokens * (limit // max(len(tokens), 1) + 1))[:limit]
    stop = body.get("stop") or []
    text = "".join(tokens)
    cut = min((text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text), default=len(text))
    kept = words(text[:cut]) if cut < len(text) else tokens
    if len(kept) > limit or (body.get("ignore_eos") and len(kept) == limit):
        return tuple(kept[:limit]), "length"
    return tuple(kept) or ("",), "stop"


def _prompt_logprobs(seen: list[str], adapter: Adapter | None) -> list[dict[str, Any] | None]:
    values: list[dict[str, Any] | None] = [
        {str(zlib.crc32(t.encode()) % 50000): {"logprob": logprob(adapter, i, t), "rank": 1, "decoded_token": t}}
        for i, t in enumerate(seen)
    ]
    return [None, *values[1:]]


def _as_recorded(record: tuple[float, ...], prompt: str, adapter: Adapter | None) -> list[dict[str, Any] | None]:
    """What the trainer saw, with its adapter; a nat less a token without."""
    own = adapter.recorded.get(prompt) if adapter else None
    values = own or tuple(value - 1.0 for value in record)
    return [None, *({str(i): {"logprob": value, "rank": 1, "decoded_token": ""}} for i, value in enumerate(values))]


def _question(body: Mapping[str, Any], prompt: str) -> str:
    for message in reversed(body.get("messages") or []):
        if message.get("role") == "user":
            return _text(message.get("content"))
    return prompt


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict) and p.get("type") == "text")
    return content if isinstance(content, str) else ""
