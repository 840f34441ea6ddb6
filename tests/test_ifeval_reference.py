"""IFEval's checks against their published definitions, written here a second time and in another way: plain loops where
the evaluator has patterns. A few hundred made-up answers, each under every instruction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from hybrid.evaluation.metrics import METRICS, Example

PIECES = [
    "The sun is hot", "a cat sat", "NASA and ESA", "[name]", "[street] [town]", "*bold words*", "**double**", "* point",
    "- dash", "***", "\n***\n", "\n\n", "\n", "P.S. more", "p. s. again", "P.P.S later", "<<A title>>", "<< >>",
    "SECTION 1", "SECTION 2", "My answer is yes.", "My answer is maybe.", "******", '"', "sunny Sun", "so, so",
    "THE END",
    "The end.", "say hi.", "Nan n", "well-known", "don't", '{"a": 1}', "```json", "```", "[1, 2]", "zoo",
]  # fmt: skip
WHOLE = [
    '"all of it"', '{"a": [1, null]}', '```json\n{"b": 2}\n```', "```\n[1]\n```", "yes\n******\nno", "a******a",
    "Say hi. Hi there.", "It is over. The end.", "one\n***\ntwo\n***\nthree", "First.\n\nSecond.\n\n'Third' is here.",
]  # fmt: skip


def answers(n: int) -> list[str]:
    """Made-up answers: pieces in a row, with blanks or line ends between."""
    dice = random.Random(7)
    rows = [
        "".join(piece + dice.choice(["", " ", " ", "\n"]) for piece in dice.choices(PIECES, k=dice.randint(1, 9)))
        for _ in range(n)
    ]
    return [row for row in [*WHOLE, *rows] if row.strip()]


def times(answer: str, word: str) -> int:
    """How often a word stands in a text, case aside, without overlap."""
    return answer.lower().count(word.lower())


def in_brackets(answer: str) -> int:
    """Square brackets that open and close on one line, counted from the left."""
    count = 0
    for line in answer.split("\n"):
        opened = False
        for letter in line:
            if letter == "[" and not opened:
                opened = True
            elif letter == "]" and opened:
                opened, count = False, count + 1
    return count


def words(answer: str) -> int:
    """Runs of letters, digits and underscores."""
    return len("".join(c if c.isalnum() or c == "_" else " " for c in answer).split())


def as_words(answer: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in answer.lower()).split()


def bullets(answer: str) -> int:
    lines = [line.lstrip() for line in answer.split("\n")]
    stars = [line for line in lines if line.startswith("*") and len(line) > 1 and line[1] != "*"]
    return len(stars) + sum(line.startswith("-") for line in lines)


def responses(answer: str) -> bool:
    """Two different ones, six stars between; nothing empty but at the ends."""
    parts = [part.strip() for part in answer.split("******")]
    kept = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return all(kept) and len(kept) == 2 and kept[0] != kept[1]


def is_json(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text[len(fence) :] if text.startswith(fence) else text
    text = text[:-3] if text.endswith("```") else text
    try:
        json.loads(text.strip())
    except ValueError:
        return False
    return True


def title(answer: str) -> bool:
    """Double angular brackets around something, on one line."""
    for line in answer.split("\n"):
        begin, end = line.find("<<"), line.rfind(">>")
        if begin >= 0 and end > begin + 2 and line[begin : end + 2].strip("<>").strip():
            return True
    return False


def postscript(answer: str) -> bool:
    """`p.s.`, a blank allowed between the two."""
    return any(mark in answer.lower() for mark in ("p.s.", "p. s.", "p.\ns."))


def paragraph_word(answer: str) -> bool:
    """Three paragraphs between blank lines; the third begins with `third`."""
    parts = answer.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != 3 or not parts[2].split():
        return False
    word = parts[2].split()[0].lstrip("'").lstrip('"')
    for mark in ".,?!'\"":
        word = word.split(mark)[0]
    return word.lower() == "third"


Reference = Callable[[str], bool]
#: instruction, arguments, what its definition says
CASES: list[tuple[str, dict[str, Any], Reference]] = [
    ("keywords:existence", {"keywords": ["sun", "cat"]}, lambda a: times(a, "sun") > 0 and times(a, "cat") > 0),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "at least"}, lambda a: times(a, "so") >= 2),
    ("keywords:frequency", {"keyword": "so", "frequency": 1, "relation": "less than"}, lambda a: times(a, "so") < 1),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "end"]}, lambda a: not {"cat", "end"} & set(as_words(a))),
    (
        "keywords:letter_frequency",
        {"letter": "n", "let_frequency": 4, "let_relation": "at least"},
        lambda a: sum(c in "nN" for c in a) >= 4,
    ),
    ("length_constraints:number_words", {"num_words": 9, "relation": "less than"}, lambda a: words(a) < 9),
    ("length_constraints:number_words", {"num_words": 6, "relation": "at least"}, lambda a: words(a) >= 6),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "third"},
        paragraph_word,
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, lambda a: in_brackets(a) >= 2),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, postscript),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, lambda a: bullets(a) == 1),
    (
        "detectable_format:constrained_response",
        {},
        lambda a: any(f"My answer is {word}." in a for word in ("yes", "no", "maybe")),
    ),
    ("detectable_format:json_format", {}, is_json),
    ("detectable_format:title", {}, title),
    ("combination:two_responses", {}, responses),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, lambda a: a.strip()[:7].lower() == "say hi."),
    ("startend:end_checker", {"end_phrase": "The end."}, lambda a: a.strip().strip('"').lower()[-8:] == "the end."),
    ("startend:quotation", {}, lambda a: len(a.strip()) > 1 and a.strip()[0] == a.strip()[-1] == '"'),
    ("punctuation:no_comma", {}, lambda a: a.find(",") < 0),
]


@pytest.mark.parametrize(("name", "kwargs", "reference"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)])
def test_a_check_agrees_with_its_definition(name: str, kwargs: dict[str, Any], reference: Reference) -> None:
    meta = {"instruction_id_list": [name], "kwargs": [kwargs]}
    asked = answers(400)
    assert len(asked) >= 200
    told = [METRICS["ifeval"](answer, Example("1", "?", "", meta)) for answer in asked]
    assert {0.0, 1.0} == set(told), "the answers show both"
    wrong = [answer for answer, score in zip(asked, told, strict=True) if score != float(reference(answer))]
    assert not wrong, wrong[:3]


def test_a_row_with_several_instructions_scores_their_share() -> None:
    names, kwargs = [case[0] for case in CASES], [case[1] for case in CASES]
    for answer in answers(200):
        share = sum(reference(answer) for _, _, reference in CASES) / len(CASES)
        told = METRICS["ifeval"](answer, Example("1", "?", "", {"instruction_id_list": names, "kwargs": kwargs}))
        assert told == pytest.approx(share, abs=1e-6)
