"""A cheap arm's attempt at a request, and how sure it was: the first step of a confidence cascade.

The mean probability of the tokens that were said stands for how sure an arm is (the length-normalised likelihood, as in
FrugalGPT-like cascades, Chen et al. 2023, arXiv 2305.05176); a head says its label's probability.
"""

from __future__ import annotations

import math

from hybrid.strategies.panel import Draft, Seat
from hybrid.strategies.round import propose
from hybrid.strategies.tools import Tools
from hybrid.types.arm import Arm
from hybrid.types.request import Request

#: what a client may ask for that an attempt cannot answer in its place
_WHOLE = ("tools", "functions", "logprobs", "top_logprobs", "echo", "prompt_logprobs")


def can_be_tried(request: Request) -> bool:
    """Whether an attempt can stand for the answer: one plain chat answer is asked for."""
    plain = not any(request.sampling.get(name) for name in _WHOLE)
    return bool(request.messages) and plain and (request.sampling.get("n") or 1) == 1


async def attempt(request: Request, arm: Arm, tools: Tools) -> Draft:
    """What the arm answers, with the mean log-probability of its tokens. Raises its error."""
    return await propose(tools, Seat(arm=arm), request.messages, {**request.sampling, "logprobs": True})


def sureness(draft: Draft) -> float:
    """0 to 1: the mean probability of a draft's tokens (geometric); 0 where the engine told none."""
    return math.exp(draft.logprob) if draft.logprob is not None else 0.0
