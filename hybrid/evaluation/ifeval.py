"""The verifiable instructions of IFEval: one small function each, in a table keyed by instruction id.

Definitions as published with "Instruction-Following Evaluation for Large Language Models" (Zhou et al. 2023, arXiv
2311.07911), strict mode: an empty answer follows nothing. Two checks there rest on trained models that are not at hand
here. Sentences are cut by the Punkt algorithm (Kiss and Strunk 2006) with a plain list of abbreviations instead of
trained parameters, and the language of an answer is told by its script and its function words.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hybrid.errors import DataError
from hybrid.evaluation.language import language_of

Check = Callable[..., bool]

_ABBREVIATIONS = """
mr mrs ms dr prof st sr jr rev hon gen col capt cpt lt maj sgt gov sen rep pres supt vs etc inc ltd co corp bros
e.g i.e cf al a.m p.m u.s u.k u.n d.c n.y l.a ph.d m.d b.a m.a jan feb mar apr jun jul aug sep sept oct nov dec
mon tue wed thu fri sat sun no vol fig est dept ave blvd rd ft mt
"""
_FENCES = ("```json", "```Json", "```JSON", "```")
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def share_followed(answer: str, meta: Mapping[str, Any]) -> float:
    """The share of the instructions of a row that its answer follows. Raises DataError for one that is unknown."""
    checks = [(CHECKS[name], args) for name, args in _instructions(meta)]
    if not answer.strip():
        return 0.0
    return sum(check(answer, **args) for check, args in checks) / len(checks)


def complaints_of(meta: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a row's instructions from being checked."""
    try:
        for name, args in _instructions(meta):
            CHECKS[name]("Some answer.", **args)
    except DataError as error:
        yield error.message
    except (TypeError, ValueError, AttributeError, re.error) as error:
        yield f"`meta.kwargs` does not fit the instructions: {error}"


def _instructions(meta: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The (instruction id, arguments) of a row; arguments that are null are left out, as in some copies of the data."""
    names, kwargs = meta.get("instruction_id_list"), meta.get("kwargs")
    if not isinstance(names, list) or not names or not isinstance(kwargs, list) or len(names) != len(kwargs):
        raise DataError("`meta` needs `instruction_id_list` and `kwargs`, two lists of one length, not empty.")
    unknown = [str(name) for name in names if name not in CHECKS]
    if unknown:
        raise DataError(f"The instruction {unknown[0]!r} is unknown; known are {', '.join(CHECKS)}.")
    return [(n, {k: v for k, v in (a or {}).items() if v is not None}) for n, a in zip(names, kwargs, strict=True)]


def _compare(count: int, relation: str, threshold: int) -> bool:
    if relation not in ("less than", "at least"):
        raise DataError(f"The relation {relation!r} is unknown; IFEval knows 'less than' and 'at least'.")
    return count < threshold if relation == "less than" else count >= threshold


# --- keywords ------------------------------------------------------------------------------------------------------


def _existence(answer: str, keywords: list[str]) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in keywords)


def _frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword.strip(), answer, re.IGNORECASE)), relation, frequency)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letters(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(Counter(answer.lower())[letter.strip().lower()], let_relation, let_frequency)


# --- lengths -------------------------------------------------------------------------------------------------------


def _sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _compare(len(_cutter().tokenize(answer)), relation, num_sentences)


@functools.cache
def _cutter() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS.split())
    return PunktSentenceTokenizer(parameters)


def _words(answer: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", answer)), relation, num_words)


def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs stand between `***`; the first and the last may be empty and do not count then."""
    parts = re.split(r"\s?\*\*\*\s?", answer)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    empty = sum(not part.strip() for part in {0: parts[0], len(parts) - 1: parts[-1]}.values())
    return len(parts) - empty == num_paragraphs


def _nth_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between blank lines; empty ones do not count, yet they hold their place."""
    parts = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not (words := parts[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


# --- content and format --------------------------------------------------------------------------------------------


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def _postscript(answer: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    return bool(re.search(known.get(marker, rf"\s*{marker.lower()}.*$"), answer.lower(), re.MULTILINE))


def _bullets(answer: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained(answer: str) -> bool:
    return any(option in answer for option in _CONSTRAINED)


def _highlights(answer: str, num_highlights: int) -> bool:
    single = [h for h in re.findall(r"\*[^\n\*]*\*", answer) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n\*]*\*\*", answer) if h.removeprefix("**").removesuffix("**").strip()]
    return len(single) + len(double) >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", answer)) - 1 >= num_sections


def _json(answer: str) -> bool:
    text = answer.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


# --- the whole answer ----------------------------------------------------------------------------------------------


def _two_responses(answer: str) -> bool:
    parts = answer.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    given = [part.strip() for part in parts if part.strip()]
    return len(given) == 2 and given[0] != given[1]


def _repeats(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    from nltk.tokenize import NLTKWordTokenizer

    tokens = [t for sentence in _cutter().tokenize(answer) for t in NLTKWordTokenizer().tokenize(sentence)]
    return _compare(sum(token.isupper() for token in tokens), capital_relation, capital_frequency)


def _capital(answer: str) -> bool:
    return answer.isupper() and language_of(answer) == "en"


def _lowercase(answer: str) -> bool:
    return answer.islower() and language_of(answer) == "en"


def _no_comma(answer: str) -> bool:
    return "," not in answer


def _language(answer: str, language: str) -> bool:
    return language_of(answer) == language


#: instruction id → its check `(answer, **kwargs)`
CHECKS: Mapping[str, Check] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
}
