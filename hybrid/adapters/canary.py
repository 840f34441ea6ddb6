"""The canary: does a loaded adapter change the engine's log-probabilities, and as its trainer says it should?

vLLM answers 200 for adapters that it then ignores, and nothing but the numbers tells. So a few fixed texts are scored
with and without the adapter before a name may point at it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.engine import AdapterRef, Engine
from hybrid.errors import EngineError, EngineRejected, NotFound, Refused

#: short, neutral, of several kinds: prose, a dialogue, structured text
PROMPTS = (
    "The ferry leaves the harbour at nine in the morning and comes back when the last guest is on board.",
    "Customer: My parcel has not arrived and I would like my money back.\nAgent: I am sorry to hear that.",
    '{"name": "Ada", "city": "London", "items": [1, 2, 3]}',
)

Score = Callable[[Engine, str, str | None], Awaitable[tuple[float, ...]]]
#: the engine's own repeatability, in nats. On a CPU vLLM 0.32 repeats itself exactly, beside other requests too, and
#: an adapter of zeros differs by 0.0000; one optimiser step at a learning rate of 1e-5 shows as 0.1 in some token.
NOISE = 1e-4
#: mean absolute difference, in nats a token, that rounding explains. vLLM against PEFT, both in bfloat16, on 20 to 30
#: tokens of a 135M model: 0.03 to 0.08 with the right adapter, trained or random, as much as without any; 1.7 and more
#: for a trained one with half or twice its scale, half of its layers or ignored. An adapter whose whole effect is
#: smaller than this cannot be told from rounding, and passes.
TOLERANCE = 0.15
#: rounding grows with what the adapter does to the text: long training moves tokens it never learned by several nats.
#: A share of the mean effect is allowed where that is more; half or twice the scale differs by far more than this.
TOLERANCE_OF_EFFECT = 0.1


@dataclass(frozen=True, slots=True)
class Recording:
    """What the trainer saw: `logprobs` of each token of `prompt` but the first, by PEFT with the adapter."""

    prompt: str
    logprobs: tuple[float, ...]

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Recording | None:
        """The card's `canary`, or None where the card has none. Raises Refused when it is malformed."""
        entry = card.get("canary")
        if entry is None:
            return None
        try:
            prompt, logprobs = entry["prompt"], tuple(float(x) for x in entry["logprobs"])
        except (TypeError, KeyError, ValueError) as error:
            raise Refused("the card's canary must hold `prompt` and `logprobs`; publish the adapter again.") from error
        if not isinstance(prompt, str) or not logprobs:
            raise Refused("the card's canary holds no text or no numbers; publish the adapter again.")
        return cls(prompt, logprobs)


async def canary(engine: Engine, ref: AdapterRef, recording: Recording | None = None) -> str:
    """Passes a loaded adapter, with a remark ("" when everything was checked). Raises Refused, and engine errors.

    An engine that gives no log-probabilities of prompts is compared on those of a greedy answer, and one that gives
    none at all is believed: the remark says so.
    """
    score = _score_prompt
    texts = (*PROMPTS, recording.prompt) if recording else PROMPTS
    try:
        base = await _scores(score, engine, None, texts)
    except (EngineError, NotFound):
        score, recording, texts = _score_answer, None, PROMPTS
        try:
            base = await _scores(score, engine, None, texts)
        except (EngineRejected, NotFound):
            return "not canaried: this engine gives no log-probabilities"
    adapted = await _scores(score, engine, ref.engine_name, texts)
    _check_effect(base, adapted)
    if recording is not None:
        _check_agreement(recording, base[-1], adapted[-1])
    return "" if score is _score_prompt else "canaried on greedy answers: this engine does not score prompts"


async def _scores(score: Score, engine: Engine, adapter: str | None, texts: Sequence[str]) -> list[tuple[float, ...]]:
    """All texts at once: beside running streams each call waits for a step or two, and their waits are one."""
    return list(await asyncio.gather(*(score(engine, text, adapter) for text in texts)))


async def _score_prompt(engine: Engine, text: str, adapter: str | None) -> tuple[float, ...]:
    return _checked(await engine.prompt_logprobs(text, adapter=adapter), adapter)


async def _score_answer(engine: Engine, text: str, adapter: str | None) -> tuple[float, ...]:
    """The log-probabilities of the sixteen tokens that the engine itself finds likeliest after `text`."""
    sampling = {"max_tokens": 16, "temperature": 0, "logprobs": 1}
    tokens = engine.generate(prompt=text, adapter=adapter, sampling=sampling, stream=False)
    body = json.loads(b"".join([token.raw async for token in tokens]) or b"{}")
    found = ((body.get("choices") or [{}])[0].get("logprobs") or {}).get("token_logprobs")
    if not found:
        raise EngineRejected("the engine gives no log-probabilities of its answers.")
    return _checked(found, adapter)


def _checked(logprobs: Sequence[Any], adapter: str | None) -> tuple[float, ...]:
    if logprobs and all(isinstance(x, int | float) and math.isfinite(x) for x in logprobs):
        return tuple(float(x) for x in logprobs)
    if adapter is None:
        raise EngineError("The base model itself gives no usable log-probabilities; look at the engine's log.")
    raise Refused("with the adapter the engine computes NaN or nothing; train it again with a lower learning rate.")


def _check_effect(base: Sequence[Sequence[float]], adapted: Sequence[Sequence[float]]) -> None:
    same_length = all(len(b) == len(a) for b, a in zip(base, adapted, strict=True))
    pairs = [pair for b, a in zip(base, adapted, strict=True) for pair in zip(b, a, strict=False)]
    if same_length and max(abs(b - a) for b, a in pairs) <= NOISE:
        raise Refused(
            "the adapter has no effect: the engine answers with it exactly as without. Its B matrices are zero or "
            "its modules are not the base's; train it on this base."
        )


def _check_agreement(recording: Recording, base: Sequence[float], ours: Sequence[float]) -> None:
    if len(ours) != len(recording.logprobs):
        raise Refused(
            f"engine and PEFT disagree: the canary's text has {len(ours)} tokens here and "
            f"{len(recording.logprobs)} in the card; the adapter was trained with another tokenizer."
        )
    mean = _apart(ours, recording.logprobs)
    limit = max(TOLERANCE, TOLERANCE_OF_EFFECT * _apart(base, recording.logprobs))
    if not mean <= limit:
        raise Refused(
            f"engine and PEFT disagree: log-probabilities differ by {mean:.3f} nats a token, {limit:.3f} is the most "
            "that rounding explains. The adapter was trained on another base, or the engine misreads it."
        )


def _apart(some: Sequence[float], others: Sequence[float]) -> float:
    """The mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(some, others, strict=True)) / len(some)
