"""From a JSON body to a `Request`: which fields are ours, which pass through, which are dropped, and every bound.

A field this file does not know passes to the engine unchanged, so that each of its sampling parameters works; a field
that could move the request elsewhere, or another tenant's cache, is dropped whatever it says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hybrid.errors import BadRequest, ContextTooLong, ModelNotFound
from hybrid.server import grammar
from hybrid.server.body import kind_of
from hybrid.settings import ServerSettings
from hybrid.types import JSON
from hybrid.types.arm import Arm
from hybrid.types.request import Knobs, Message, Request

#: never forwarded: where the request goes, whose cache it shares, and tensors that would be unpickled
DROPPED = frozenset(
    [
        "lora_path",
        "lora_name",
        "lora_request",
        "api_base",
        "base_url",
        "api_key",
        "api_version",
        "api_type",
        "organization",
        "custom_llm_provider",
        "cache_salt",
        "kv_transfer_params",
        "extra_headers",
        "headers",
        "extra_body",
        "extra_query",
        "host",
        "vllm_xargs",
        "prompt_embeds",
        "request_id",
        "data_parallel_rank",
    ]
)
_OURS = frozenset(["model", "messages", "prompt", "stream", "stream_options", "hybrid"])
_STREAM_OPTIONS = frozenset(["include_usage", "include_obfuscation", "continuous_usage_stats"])

CHARS_PER_TOKEN = 64  # no tokenizer packs more on average: a longer text cannot fit, so nobody need count it
MAX_PROMPTS = 32
MAX_TOOLS = 128

Check = Callable[[str, Any], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed body: the request for the gateway, and what only concerns the answer's shape."""

    request: Request
    include_usage: bool
    explain: bool
    chat: bool


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, under which id, and the bounds in force. `context` is in tokens."""

    id: str
    caller: str
    debug: bool
    limits: ServerSettings
    context: int


def chat(body: JSON, asker: Asker) -> Asked:
    """The body of /v1/chat/completions. Raises BadRequest with `param`, ContextTooLong, ModelNotFound."""
    return _asked(body, asker, messages=_messages(body.get("messages"), asker))


def completion(body: JSON, asker: Asker) -> Asked:
    """The body of /v1/completions."""
    return _asked(body, asker, prompt=_prompt(body.get("prompt"), asker))


def _asked(body: JSON, asker: Asker, *, messages: tuple[Message, ...] = (), prompt: Any = None) -> Asked:
    sampling = {key: value for key, value in body.items() if key not in _OURS and not _dropped(key)}
    fields = _fields(asker.limits)
    if prompt is not None and sampling.get("echo") is True:  # it may be the prompt's log-probabilities that are wanted
        fields = {**fields, "max_tokens": _integer(0)}
    _check_fields(sampling, fields)
    _check_context(sampling, asker.context)
    grammar.check(sampling)
    stream = body.get("stream") or False
    _boolean("stream", stream)
    knobs = _knobs(body.get("hybrid"))
    knobs = dataclasses.replace(knobs, explain=knobs.explain or asker.debug)
    request = Request(
        id=asker.id,
        model=_model(body.get("model", "auto")),
        messages=messages,
        prompt=prompt,
        sampling=sampling,
        stream=stream,
        knobs=knobs,
        caller=asker.caller,
    )
    include_usage = _include_usage(body.get("stream_options"), stream)
    return Asked(request, include_usage, knobs.explain, prompt is None)


def _dropped(key: str) -> bool:
    name = key.lower()
    return name in DROPPED or name.startswith(("x-", "kv_"))


def _model(model: Any) -> str:
    if not isinstance(model, str) or not model:
        raise BadRequest(f'`model` is a name such as "auto", not {kind_of(model)}.', param="model")
    if len(model) > 512:
        raise ModelNotFound(f"No model has a name of {len(model):,} characters.", param="model")
    return model


# --- messages and prompts ------------------------------------------------------------------------------------------


def _messages(value: Any, asker: Asker) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRequest("`messages` is a list of at least one message.", param="messages")
    if len(value) > asker.limits.max_messages:
        raise BadRequest(f"{len(value):,} messages; the limit is {asker.limits.max_messages}.", param="messages")
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))
    _check_length(sum(len(m.text) for m in messages), asker.context, "messages")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise BadRequest(f"{where} is an object with `role` and `content`.", param=where)
    content = item.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            _part(part, f"{where}.content[{i}]")
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"{where}.content is a string or a list of parts, not {kind_of(content)}.", param=where)
    return Message(item["role"], content, {k: v for k, v in item.items() if k not in ("role", "content")})


def _part(part: Any, where: str) -> None:
    """A content part is text or inline data: the engine fetches nothing for a stranger."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(f"{where} is an object with a `type`.", param=where)
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise BadRequest(f"{where}.text is a string.", param=where)
    media = part.get(part["type"]) if part["type"].endswith("_url") else None
    url = media.get("url") if isinstance(media, dict) else media
    if url is not None and not str(url).startswith("data:"):
        raise BadRequest(f"{where}: send media inline as a data: URL; addresses are not fetched.", param=where)


def _prompt(value: Any, asker: Asker) -> Any:
    """A string, token ids, or a short list of either; returned as it came."""
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        many: list[Any] = [value]
    else:
        many = value if isinstance(value, list) else [value]
    if not 1 <= len(many) <= MAX_PROMPTS:
        raise BadRequest(f"`prompt` is one text or a list of 1 to {MAX_PROMPTS}.", param="prompt")
    for one in many:
        if isinstance(one, str):
            _check_length(len(one), asker.context, "prompt")
        elif not isinstance(one, list) or not one or not all(type(v) is int and v >= 0 for v in one):
            raise BadRequest(f"`prompt` is text or token ids, not {kind_of(one)}.", param="prompt")
        elif len(one) >= asker.context:
            raise ContextTooLong(f"{len(one):,} tokens; the model holds {asker.context:,}.", param="prompt")
    return value


def _check_length(chars: int, context: int, param: str) -> None:
    if chars > context * CHARS_PER_TOKEN:
        raise ContextTooLong(
            f"`{param}` is {chars:,} characters long, more than the model's {context:,} tokens can hold.", param=param
        )


# --- parameters ----------------------------------------------------------------------------------------------------


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise BadRequest(f"`{name}` is true or false, not {kind_of(value)}.", param=name)


def _integer(low: int, high: int | None = None) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or value < low or (high is not None and value > high):
            span = f"at least {low}" if high is None else f"from {low} to {high}"
            raise BadRequest(f"`{name}` is an integer {span}; got {str(value)[:40]}.", param=name)

    return check


def _number(low: float, high: float | None = None) -> Check:
    def check(name: str, value: Any) -> None:
        wrong = isinstance(value, bool) or not isinstance(value, (int, float))
        if wrong or value < low or (high is not None and value > high):
            span = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise BadRequest(f"`{name}` is a number {span}; got {str(value)[:40]}.", param=name)

    return check


def _array(longest: int, *, or_text: bool = False) -> Check:
    def check(name: str, value: Any) -> None:
        if or_text and isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or len(value) > longest:
            raise BadRequest(f"`{name}` is a list of at most {longest}.", param=name)
        if or_text and not all(isinstance(v, str) and len(v) <= 1024 for v in value):
            raise BadRequest(f"`{name}` holds strings of at most 1,024 characters.", param=name)

    return check


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict) or len(value) > 1024:
        raise BadRequest(f"`{name}` is an object of at most 1,024 entries, not {kind_of(value)}.", param=name)


def _logprobs(highest: int) -> Check:
    def check(name: str, value: Any) -> None:  # a switch for chat, a number for completions
        if not isinstance(value, bool):
            _integer(0, highest)(name, value)

    return check


@lru_cache(maxsize=8)
def _fields(limits: ServerSettings) -> Mapping[str, Check]:
    """The fields whose values could hurt, and what each may be. null means not sent."""
    return {
        "n": _integer(1, limits.max_n),
        "best_of": _integer(1, limits.max_n),
        "logprobs": _logprobs(limits.max_logprobs),
        "top_logprobs": _integer(0, limits.max_logprobs),
        "prompt_logprobs": _integer(0, limits.max_logprobs),
        "max_tokens": _integer(1),
        "max_completion_tokens": _integer(1),
        "min_tokens": _integer(0),
        "temperature": _number(0),
        "top_p": _number(0, 1),
        "min_p": _number(0, 1),
        "top_k": _integer(-1),
        "repetition_penalty": _number(0),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "seed": _integer(-(2**63), 2**63 - 1),
        "stop": _array(limits.max_stop, or_text=True),
        "bad_words": _array(limits.max_stop, or_text=True),
        "stop_token_ids": _array(1024),
        "allowed_token_ids": _array(65_536),
        "logit_bias": _mapping,
        "tools": _array(MAX_TOOLS),
        "response_format": _mapping,
        "structured_outputs": _mapping,
        "ignore_eos": _boolean,
        "echo": _boolean,
        "parallel_tool_calls": _boolean,
    }


def _check_fields(sampling: JSON, fields: Mapping[str, Check]) -> None:
    for name, check in fields.items():
        if sampling.get(name) is not None:
            check(name, sampling[name])


def _check_context(sampling: JSON, context: int) -> None:
    for name in ("max_tokens", "max_completion_tokens", "min_tokens"):
        if (sampling.get(name) or 0) > context:
            raise ContextTooLong(
                f"`{name}` asks for {sampling[name]:,} tokens; the model holds {context:,}, prompt included.",
                param=name,
            )


def _include_usage(options: Any, stream: bool) -> bool:
    """Whether the client wants the usage chunk; the engine is always asked for it, and the server adds the sum."""
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise BadRequest("`stream_options` is an object, and goes with `stream: true`.", param="stream_options")
    if unknown := set(options) - _STREAM_OPTIONS:
        raise BadRequest(f"Unknown stream options: {', '.join(sorted(unknown))[:200]}.", param="stream_options")
    return bool(options.get("include_usage"))


# --- knobs ---------------------------------------------------------------------------------------------------------


def _corpus(name: str, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 128:
        raise BadRequest(f"`{name}` is a name of 1 to 128 characters.", param=name)


def _arms(name: str, value: Any) -> None:
    if not isinstance(value, list) or not 1 <= len(value) <= 256 or not all(isinstance(v, str) for v in value):
        raise BadRequest(f'`{name}` is a list of arms such as "prompt" or "adapter:bank".', param=name)
    for arm in value:
        try:
            Arm.parse(arm)
        except ValueError as error:
            raise BadRequest(f"{name}: {str(error)[:120]}.", param=name) from None


_KNOBS: Mapping[str, Check] = {
    "quality_cost": _number(0, 1),
    "arms": _arms,
    "corpus": _corpus,
    "top_k": _integer(1, 50),
    "explain": _boolean,
    "session": _corpus,
}


def _knobs(value: Any) -> Knobs:
    if value is None:
        return Knobs()
    if not isinstance(value, dict):
        raise BadRequest(f"`hybrid` is an object of knobs, not {kind_of(value)}.", param="hybrid")
    if unknown := set(value) - set(_KNOBS):
        names = ", ".join(sorted(unknown))[:200]
        raise BadRequest(f"Unknown knobs in `hybrid`: {names}. Known: {', '.join(_KNOBS)}.", param="hybrid")
    given = {name: knob for name, knob in value.items() if knob is not None}
    for name, knob in given.items():
        _KNOBS[name](f"hybrid.{name}", knob)
    if "arms" in given:
        given["arms"] = tuple(given["arms"])
    return Knobs(**given)
