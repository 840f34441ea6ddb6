"""The eight metrics: a score from 0 to 1 for one answer. One table, and nothing else scores.

Where a metric has a reference implementation it is followed to the last digit: SQuAD's script (Rajpurkar et al. 2016,
2018) for `token_f1`, the package rouge-score (Lin 2004) for `rouge_l`, IFEval (Zhou et al. 2023) for `ifeval`.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hybrid.evaluation.ifeval import share_followed


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task. `meta` may hold `references` (alternatives) and `gold_passages`."""

    id: str
    input: str
    reference: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> tuple[str, ...]:
        """Every answer that counts as right: `reference`, then the alternatives."""
        found = [self.reference, *self.meta.get("references", ())]
        return tuple(dict.fromkeys(r for r in found if r)) or (self.reference,)


Metric = Callable[[str, Example], float]

# --- classification and numbers ------------------------------------------------------------------------------------

_OPTION = re.compile(r"(?<![A-Za-z0-9'’])[A-Z](?![A-Za-z0-9'’])")
_OPTION_LINE = re.compile(r"^\s*\(?([A-Za-z])[.):]\s", re.MULTILINE)
_LOWER_OPTION = re.compile(r"^\W*([a-z])(?:[.):]|\W*$)")
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")


def accuracy(answer: str, example: Example) -> float:
    """1 when the answer equals the reference after trimming, case folded."""
    return float(answer.strip().casefold() == example.reference.strip().casefold())


def choice(answer: str, example: Example) -> float:
    """1 when the first option letter in the answer equals the reference.

    Option letters are those that begin a line of the input (`B. …`, `(b) …`), A to E where none does. In an answer
    they stand alone and in capitals (`The answer is B.`), or in small letters as the answer's first word (`b)`).
    """
    found = option_in(answer, example.input)
    return float(found is not None and found == example.reference.strip().upper())


def option_in(answer: str, question: str) -> str | None:
    """The first option letter in an answer, in capitals, or None."""
    offered = {letter.upper() for letter in _OPTION_LINE.findall(question)} or set("ABCDE")
    small = _LOWER_OPTION.match(answer)
    if small and small[1].upper() in offered:
        return small[1].upper()
    return next((letter for letter in _OPTION.findall(answer) if letter in offered), None)


def numeric(answer: str, example: Example) -> float:
    """1 when the last number in the answer equals the reference's; `1,250.0` and `1250` are one number."""
    found, wanted = number_in(answer), number_in(example.reference)
    return float(found is not None and found == wanted)


def number_in(text: str) -> Decimal | None:
    """The last number in a text, or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None


# --- words ---------------------------------------------------------------------------------------------------------

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def squad_tokens(text: str) -> list[str]:
    """The tokens SQuAD's script compares: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def token_f1(answer: str, example: Example) -> float:
    """SQuAD's token F1, the best over the references. Two texts without tokens agree, as in version 2 of its script."""
    said = squad_tokens(answer)
    return max(_f1(Counter(said), Counter(squad_tokens(r))) for r in example.references)


def rouge_l(answer: str, example: Example) -> float:
    """ROUGE-L F of the package rouge-score without stemming, the best over the references."""
    scorer = _rouge()
    return max(float(scorer.score(r, answer)["rougeL"].fmeasure) for r in example.references)


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _f1(said: Counter[Any], wanted: Counter[Any]) -> float:
    """F1 of two multisets; two empty ones agree."""
    if not said or not wanted:
        return float(said == wanted)
    same = sum((said & wanted).values())
    if not same:
        return 0.0
    precision, recall = same / sum(said.values()), same / sum(wanted.values())
    return 2 * precision * recall / (precision + recall)


# --- structures ----------------------------------------------------------------------------------------------------

_QUOTES = str.maketrans("", "", "\"'`")


def json_f1(answer: str, example: Example) -> float:
    """F1 over the key-value pairs of one JSON object, as multisets.

    A pair is the path of keys to a value that is no container; places in a list have no number, so their order does
    not count. Values are equal when they are equal in JSON: 5 is 5.0, and neither is "5" or true. An answer that is
    not one JSON object, words around it included, scores 0.
    """
    said, wanted = json_pairs(answer), json_pairs(example.reference)
    return 0.0 if said is None or wanted is None else _f1(said, wanted)


def json_pairs(text: str) -> Counter[Any] | None:
    """The (path, kind, value) of every leaf of a JSON object, or None where the text is none."""
    try:
        value = json.loads(text.strip(), parse_constant=_no_constant)
        return Counter(_leaves(value, ())) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, (*path, ""))
    else:
        kind = "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
        yield path, kind, value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def sql_exact(answer: str, example: Example) -> float:
    """1 for equal SQL after lower-casing, removing quotes and collapsing blanks."""
    return float(_plain_sql(answer) == _plain_sql(example.reference))


def _plain_sql(text: str) -> str:
    return " ".join(text.lower().translate(_QUOTES).split())


# --- instructions --------------------------------------------------------------------------------------------------


def ifeval(answer: str, example: Example) -> float:
    """The share of the verifiable instructions in `meta` that hold (IFEval's strict checks)."""
    return share_followed(answer, example.meta)


def contains(answer: str, example: Example) -> float:
    """1 when a reference occurs in the answer as whole words, case and punctuation aside.

    No task metric: it measures what a model still knows, whatever way it says it.
    """
    said = f" {' '.join(squad_tokens(answer))} "
    return float(any(f" {' '.join(squad_tokens(r))} " in said for r in example.references))


#: metric of `task.json` → its function
METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "choice": choice,
    "numeric": numeric,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "json_f1": json_f1,
    "sql_exact": sql_exact,
    "ifeval": ifeval,
}
