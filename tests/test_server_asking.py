"""What a body may hold: every bound of a request, without a server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import BadRequest, ContextTooLong, HybridError, ModelNotFound
from hybrid.server import asking, grammar
from hybrid.server.asking import Asker
from hybrid.server.body import parse
from hybrid.settings import ServerSettings

ASKER = Asker(id="req_1", caller="key_1", debug=False, limits=ServerSettings(), context=2048)
HELLO = [{"role": "user", "content": "hello"}]


def status_of(work: Callable[[], object]) -> int:
    """The status that the work would be answered with; anything but an error of ours fails the test."""
    try:
        work()
    except HybridError as error:
        return error.status
    return 200


def ask(**body):
    return asking.chat({"model": "auto", "messages": HELLO, **body}, ASKER)


def test_the_engines_parameters_pass_through_unchanged() -> None:
    sampling = {
        "temperature": 0.3,
        "top_k": 40,
        "ignore_eos": True,
        "seed": 7,
        "tools": [{"type": "function"}],
        "new": [1],
    }
    asked = ask(**sampling, stream=True, stream_options={"include_usage": True}, hybrid={"explain": True, "top_k": 2})
    assert dict(asked.request.sampling) == sampling
    assert asked.request.stream
    assert asked.include_usage
    assert asked.explain
    assert asked.request.knobs.top_k == 2
    assert asked.request.caller == "key_1"


def test_S9_fields_that_could_move_a_request_are_dropped() -> None:
    moving = {
        **dict.fromkeys(asking.DROPPED, "http://evil.example"),
        "Host": "evil.example",
        "X-Forwarded-For": "10.0.0.1",
        "kv_anything": 1,
        "API_BASE": "http://evil.example",
    }
    assert dict(ask(**moving, temperature=0).request.sampling) == {"temperature": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9), ("n", 0), ("n", 1.0), ("n", True), ("n", "2"),
        ("best_of", 10**9),
        ("logprobs", 10**6),
        ("top_logprobs", 10**6),
        ("prompt_logprobs", 10**6),
        ("stop", ["x"] * 5000), ("stop", [1]), ("stop", "x" * 5000), ("stop", {"a": 1}),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", "many"), ("max_completion_tokens", 0.5),
        ("temperature", "hot"), ("temperature", -1), ("top_p", 2), ("top_k", 1.5), ("seed", 2**70),
        ("tools", [{}] * 1000), ("tools", "all"),
        ("response_format", "json"),
        ("logit_bias", [1]),
        ("stream", "yes"), ("stream", 1),
        ("stream_options", {"include_usage": True}),  # without stream
        ("hybrid", {"no_such_knob": 1}), ("hybrid", []), ("hybrid", "fast"),
        ("model", 3), ("model", ""), ("model", None), ("model", ["auto"]),
        ("messages", []), ("messages", "hello"), ("messages", None), ("messages", HELLO * 10_000),
    ],
)  # fmt: skip
def test_S15_a_value_out_of_bounds_is_named(field: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        ask(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("quality_cost", 1.1),
        ("arms", []),
        ("arms", ["rm -rf"]),
        ("corpus", 1),
        ("top_k", 0),
        ("explain", "yes"),
        ("session", ""),
    ],
)
def test_S15_a_knob_out_of_bounds_is_named(knob: str, value: object) -> None:
    with pytest.raises(BadRequest) as caught:
        ask(hybrid={knob: value})
    assert caught.value.param == f"hybrid.{knob}"


def test_null_means_not_sent() -> None:
    asked = ask(n=None, stop=None, max_tokens=None, stream=None, stream_options=None, hybrid=None, tools=None)
    assert not asked.request.stream


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_S15_more_tokens_than_the_context_holds(field: str) -> None:
    with pytest.raises(ContextTooLong) as caught:
        ask(**{field: 2049})
    assert caught.value.param == field


def test_S15_a_text_that_cannot_fit_is_refused_before_it_is_counted() -> None:
    with pytest.raises(ContextTooLong):
        ask(messages=[{"role": "user", "content": "word " * 100_000}])
    with pytest.raises(ContextTooLong):
        asking.completion({"prompt": [1] * 3000}, ASKER)


@pytest.mark.parametrize(
    "message",
    [
        1,
        {"content": "no role"},
        {"role": 1, "content": "x"},
        {"role": "user", "content": 1},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"type": "text", "text": 1}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]},
    ],
)
def test_S15_a_message_that_is_none(message: object) -> None:
    with pytest.raises(BadRequest):
        ask(messages=[message])


@pytest.mark.parametrize("prompt", ["text", ["a", "b"], [1, 2, 3], [[1], [2, 3]]])
def test_a_raw_prompt_is_text_or_token_ids(prompt: object) -> None:
    assert asking.completion({"prompt": prompt}, ASKER).request.prompt == prompt


@pytest.mark.parametrize("prompt", [None, 1, [], [[]], [{}], [1, "a"], ["a"] * 100, [[-1]], {"a": 1}])
def test_S15_a_raw_prompt_that_is_neither(prompt: object) -> None:
    with pytest.raises(BadRequest):
        asking.completion({"prompt": prompt}, ASKER)


def test_a_model_name_of_a_megabyte_is_no_model() -> None:
    with pytest.raises(ModelNotFound):
        ask(model="x" * 1_000_000)


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b'"text"', b"null", b"{", b"{'a': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}',
        b'{"a": "\xff"}', b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"a": [' + b"[]," * 300_000 + b"[]]}",
        b"--boundary\r\n" * 10_000,
    ],
    ids=range(16),
)  # fmt: skip
def test_S15_a_body_that_is_not_one_sane_object(raw: bytes) -> None:
    began = time.perf_counter()
    with pytest.raises(BadRequest):
        parse(raw)
    assert time.perf_counter() - began < 5  # a hang, not a benchmark


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text() | st.floats(), st.lists, max_leaves=5).map(repr).map(str.encode)
)
def test_S15_any_bytes_give_an_object_or_a_400(raw: bytes) -> None:
    assert status_of(lambda: parse(raw)) in (200, 400)


@given(
    st.dictionaries(
        st.sampled_from(
            ["model", "messages", "stream", "n", "stop", "hybrid", "tools", "logprobs", "stream_options", "x"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        ),
    )
)
def test_S15_any_object_is_a_request_or_a_clear_error(body: dict) -> None:
    assert status_of(lambda: asking.chat(parse(json.dumps(body).encode()), ASKER)) in (200, 400, 404)


# --- what engines compile -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regex",
    [
        "(a+)+$",
        "(?:a*)*",
        "^(([a-z]+))*b",
        "((a+)?)+",
        "(?P<x>\\d+)+",
        "(a{1,1000}){1,1000}",
        "a{100000}",
        "(((a{99}){99}){99})",
        "a" * 5000,
    ],
)
def test_S15_a_regex_that_could_explode_is_refused(regex: str) -> None:
    for body in (
        {"structured_outputs": {"regex": regex}},
        {"guided_regex": regex},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": regex}}}},
    ):
        with pytest.raises(BadRequest):
            ask(**body)


@pytest.mark.parametrize(
    "regex",
    [
        r"\d{4}-\d{2}-\d{2}",
        r"(\w+\s)+\w+",
        r"[(+*]+",
        r"\(a+\)+",
        r"(yes|no)",
        r"(a|b+)*",
        r"[\]{}]{2,8}",
        r"a++b",
        r"x{,3}",
    ],
)
def test_an_ordinary_regex_passes(regex: str) -> None:
    grammar.check({"structured_outputs": {"regex": regex}})


def test_S15_schemas_and_grammars_have_bounds() -> None:
    deep: dict = {"type": "array", "maxItems": 10**9}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
        {"structured_outputs": {"grammar": "root ::= " + "a" * 100_000}},
        {"structured_outputs": {"choice": ["x"] * 10_000}},
        {"structured_outputs": {"json": {"enum": ["x" * 100_000]}}},
        {"structured_outputs": {"regex": 1}},
    ):
        with pytest.raises(BadRequest):
            ask(**body)
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 40}}}
    ask(response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}})
