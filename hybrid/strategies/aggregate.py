"""Choosing one of several drafts: pure functions from drafts to the place of the best one, and why in words."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hybrid.strategies.panel import Draft

#: an answer of so many words or fewer is one that others can agree with word for word
SHORT_WORDS = 12

_MARKED = re.compile(r".*(?:\banswer\s*(?:is\b\s*:?|:)|####)\s*(?P<answer>.+)", re.IGNORECASE)
#: what stands around an answer and is none of it; signs and units are
_MARKS = " .,;:!?\"'`*_()[]{}“”‘’«»"
_NUMBER = re.compile(r"(?<=\d),(?=\d{3}\b)")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The place of the draft that is the answer, and why."""

    place: int
    why: str


def plain(text: str) -> str:
    """An answer as others are compared with it: case folded, blanks collapsed, no marks around it, 1,000 as 1000."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _NUMBER.sub("", folded.strip(_MARKS)) or folded


def final_answer(text: str) -> str:
    """What a text with its reasoning ends with: what stands after the last “answer is” or ####, else its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [match["answer"] for match in map(_MARKED.search, lines) if match]
    return plain(marked[-1] if marked else lines[-1] if lines else "")


def vote(drafts: Sequence[Draft]) -> Chosen:
    """The answer whose proposers weigh most together; of equals the one that was given more often, then first."""
    groups = _groups(drafts, plain)
    best = max(groups.values(), key=lambda group: (_weight(drafts, group), len(group)))
    return Chosen(best[0], f"{len(best)} of {len(drafts)} gave it, {_weight(drafts, best):.2f} of the weight")


def consistency(drafts: Sequence[Draft]) -> Chosen:
    """The majority of the final answers (self-consistency, Wang et al. 2022, arXiv 2203.11171), weights apart."""
    best = max(_groups(drafts, final_answer).values(), key=len)
    return Chosen(best[0], f"{len(best)} of {len(drafts)} end with it")


def likeliest(drafts: Sequence[Draft], without: str = "the panel names no reward model") -> Chosen:
    """The draft with the highest mean log-probability of its tokens under the model that wrote it.

    `without` says why no reward model chose.
    """
    rated = [float("-inf") if draft.logprob is None else draft.logprob for draft in drafts]
    best = max(range(len(drafts)), key=rated.__getitem__)
    return Chosen(best, f"its tokens have the highest mean log-probability, {rated[best]:.3f}: {without}")


def rated_best(drafts: Sequence[Draft], scores: Sequence[float], by: str) -> Chosen:
    """The draft that a reward model, `by`, scores best (best-of-n, Stiennon et al. 2020, arXiv 2009.01325).

    A draft that says nothing is taken only where none says anything.
    """
    best = max(range(len(drafts)), key=lambda place: (bool(drafts[place].text.strip()), scores[place]))
    return Chosen(best, f"{by} rates it best of {len(drafts)}, {scores[best]:.3f}")


def agreed(drafts: Sequence[Draft]) -> Chosen | None:
    """What `auto` chooses: an answer that two gave; else, of short answers, that of the proposer of the most weight.

    None where the answers are long and differ: those are for synthesis.
    """
    groups = _groups(drafts, plain)
    shared = [group for group in groups.values() if len(group) > 1]
    if shared:
        best = max(shared, key=lambda group: (_weight(drafts, group), len(group)))
        return Chosen(best[0], f"{len(best)} of {len(drafts)} agree")
    if len(drafts) > 1 and statistics.median(len(draft.text.split()) for draft in drafts) > SHORT_WORDS:
        return None
    heaviest = max(range(len(drafts)), key=lambda place: (bool(drafts[place].text), drafts[place].seat.weight))
    return Chosen(
        heaviest, "no two agree, and the gate trusts its proposer most" if len(drafts) > 1 else "the only one"
    )


#: method → the draft it chooses; None asks for a synthesis
CHOOSERS: Mapping[str, Callable[[Sequence[Draft]], Chosen | None]] = {
    "auto": agreed,
    "vote": vote,
    "consistency": consistency,
    "best_of": likeliest,
    "synthesis": lambda drafts: None,
}


def _groups(drafts: Sequence[Draft], key: Callable[[str], str]) -> dict[str, list[int]]:
    """The places of equal answers, the weightiest first; drafts that say nothing agree on nothing."""
    groups: dict[str, list[int]] = {}
    silent = not any(draft.text.strip() for draft in drafts)
    for place, draft in enumerate(drafts):
        if silent or draft.text.strip():
            groups.setdefault(key(draft.text), []).append(place)
    return {answer: sorted(group, key=lambda place: -drafts[place].seat.weight) for answer, group in groups.items()}


def _weight(drafts: Sequence[Draft], group: Sequence[int]) -> float:
    total = sum(draft.seat.weight for draft in drafts)
    return sum(drafts[place].seat.weight for place in group) / total if total else len(group) / len(drafts)
