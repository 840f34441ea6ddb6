"""A first look at a request, at its words alone: most requests in an arm's own words or under its own instruction need
no embedding to be told apart, and words cost a fiftieth of it.

The same conditional logit as the gate's, over those columns that need no vector, and fitted to the same rows. What it
may not be sure of is taught it: requests to corpora and of strangers are `prompt`'s, under every arm's instruction as
well, and each arm's own messages are, once that arm is taken away. A cascade (Viola & Jones 2001): where the first look
leaves a doubt, the whole gate looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid.gate.bank import Bank, Own
from hybrid.gate.features import Numbers
from hybrid.gate.logit import Labels, fitted, softmax
from hybrid.types.arm import PROMPT, Arm

#: how well an arm's messages must make it known (`Bank.known`): from some 230 rows on
KNOWN = 0.9
#: how strongly the weights are drawn towards where they start, in rows
_PENALTY = 1.0
#: strangers' requests that are put under each arm's instructions
_UNDER = 40


@dataclass(frozen=True, slots=True)
class Said:
    """A request of known owner: `arm` is `prompt` for what no narrow arm with messages of its own is asked."""

    query: str
    arm: Arm
    own: Own | None = None


def learn(bank: Bank, rows: Sequence[Said], start: Numbers) -> Numbers:
    """The weights of a first look at what is enrolled, from requests of known owners; `start` where there is no arm
    to tell from others."""
    rows = [*rows, *_under_instructions(bank, rows)]
    if not bank.narrow:
        return start
    arms = [PROMPT, *bank.narrow]
    label = np.array([arms.index(row.arm) for row in rows])
    design = _design(bank.glance([row.query for row in rows], [row.own for row in rows]))
    away = np.flatnonzero(label > 0)
    open_ = np.ones((len(label) + len(away), len(arms)), dtype=bool)
    open_[np.arange(len(label), len(open_)), label[away]] = False
    labels: Labels = np.concatenate([label, np.zeros(len(away), dtype=np.intp)])
    penalty = np.full(len(start), _PENALTY)
    return fitted(np.concatenate([design, design[away]]), open_, labels, start, penalty)


def chances(bank: Bank, query: str, weights: Numbers) -> dict[Arm, float]:
    """How likely a request is each narrow arm's by its words, or anybody else's (`prompt`)."""
    told = softmax(_design(bank.glance([query]))[0] @ weights) if bank.narrow else np.ones(1)
    return dict(zip((PROMPT, *bank.narrow), told.tolist(), strict=True))


def _design(narrow: Numbers) -> Numbers:
    """[rows, 1 + arms, columns] of [rows, arms, columns]: the first alternative is `prompt`, of which words say
    nothing."""
    return np.concatenate([np.zeros((len(narrow), 1, narrow.shape[2])), narrow], axis=1)


def _under_instructions(bank: Bank, rows: Sequence[Said]) -> list[Said]:
    """Strangers' requests under the arms' instructions: an instruction alone must not convince."""
    rng, out = np.random.default_rng(0), []
    strange = [row.query for row in rows if row.arm == PROMPT]
    for messages in bank.messages.values():
        begun = sorted(messages.lexicon.templates, key=lambda begin: -messages.lexicon.templates[begin])[:_UNDER]
        for number, place in enumerate(rng.integers(len(strange), size=_UNDER) if begun and strange else ()):
            out.append(Said(f"{begun[number % len(begun)]}\n\n{strange[place]}", PROMPT))
    return out
