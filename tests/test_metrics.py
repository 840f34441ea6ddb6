"""The eight metrics against implementations that know nothing of ours: SQuAD's rules and a longest common subsequence
written out here, the package rouge-score, and answers whose score a person can see.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hybrid.errors import DataError
from hybrid.evaluation.ifeval import CHECKS
from hybrid.evaluation.language import language_of
from hybrid.evaluation.metrics import METRICS, Example, contains

QUICK = settings(max_examples=150, deadline=None)


def score(metric: str, answer: str, reference: str = "", question: str = "?", **meta: object) -> float:
    return METRICS[metric](answer, Example("1", question, reference, meta))


def test_the_table_holds_the_eight_metrics() -> None:
    assert list(METRICS) == ["accuracy", "choice", "numeric", "token_f1", "rouge_l", "json_f1", "sql_exact", "ifeval"]


# --- classes, letters, numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("card_arrival", "card_arrival", 1),
        ("  Card_Arrival\n", "card_arrival", 1),
        ("card_arrival.", "card_arrival", 0),
        ("card arrival", "card_arrival", 0),
        ("", "card_arrival", 0),
        ("STRASSE", "straße", 1),
        ("yes", "yes ", 1),
        ("yes, it is", "yes", 0),
    ],
)
def test_accuracy(answer: str, reference: str, expected: float) -> None:
    assert score("accuracy", answer, reference) == expected


FOUR = "Which one?\nA. one\nB. two\nC. three\nD. four"


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("B", "B", 1),
        ("B.", "B", 1),
        ("b", "B", 1),
        (" (c) three", "C", 1),
        ("The answer is D.", "D", 1),
        ("Answer: A because B is wrong", "A", 1),
        ("Answer: A because B is wrong", "B", 0),
        ("**C**", "C", 1),
        ("I think it is B", "B", 1),
        ("Because D", "D", 1),
        ("Don't know", "D", 0),
        ("E", "E", 0),
        ("", "A", 0),
        ("a dog", "A", 0),
        ("Dog", "D", 0),
        ("C) three", "C", 1),
        ("c", "c", 1),
    ],
)
def test_choice(answer: str, reference: str, expected: float) -> None:
    assert score("choice", answer, reference, FOUR) == expected


def test_choice_takes_the_letters_that_the_question_offers() -> None:
    assert score("choice", "F", "F", "Which?\nE. one\nF. two") == 1
    assert score("choice", "I say E", "E", "Which?\nD. one\nE. two") == 1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("350", "350", 1),
        ("The fee is $350.", "350", 1),
        ("50 + 300 = 350", "350", 1),
        ("350 dollars for 2 people", "350", 0),
        ("1,250", "1250", 1),
        ("1250.0", "1,250", 1),
        ("-5", "-5", 1),
        ("it is −5", "-5", 1),
        ("10-5", "5", 1),
        ("3.50", "3.5", 1),
        ("3.5.", "3.5", 1),
        (".5", "0.5", 1),
        ("no number", "5", 0),
        ("", "0", 0),
        ("5%", "5", 1),
        ("#### 18", "18", 1),
        ("1, 2, 3", "3", 1),
        ("12 345", "345", 1),
        ("1,234,567.25", "1234567.25", 1),
        ("0.1", "0.10", 1),
        ("x=-12", "-12", 1),
    ],
)
def test_numeric(answer: str, reference: str, expected: float) -> None:
    assert score("numeric", answer, reference) == expected


@QUICK
@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "The answer is {:,}.", "so {:,} in all!", "= {}\n"]))
def test_numeric_finds_any_whole_number(number: int, frame: str) -> None:
    assert score("numeric", frame.format(number), str(number)) == 1
    assert score("numeric", frame.format(number), str(number + 1)) == 0


# --- words ---------------------------------------------------------------------------------------------------------


def squad_f1(said: str, gold: str) -> float:
    """SQuAD 2.0's `compute_f1`, from its description."""

    def normal(text: str) -> list[str]:
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text).split()

    gold_tokens, said_tokens = normal(gold), normal(said)
    if not gold_tokens or not said_tokens:
        return float(gold_tokens == said_tokens)
    same = sum((Counter(gold_tokens) & Counter(said_tokens)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said_tokens), same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


WORDS = ["the", "A", "an", "Paris,", "city", "of", "light", "1984", "U.S.", "don't", "naïve", "«oui»", "-", "theatre"]
PIECES = st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=9).map(" ".join)


def texts(seed: int, n: int) -> list[tuple[str, str, list[str]]]:
    """Made-up (answer, reference, alternatives) that share some words."""
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        reference = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
        answer = [w if rng.random() < 0.7 else rng.choice(WORDS) for w in reference]
        rng.shuffle(answer) if rng.random() < 0.3 else None
        more = [" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(rng.randint(0, 3))]
        out.append((" ".join(answer[: rng.randint(0, len(answer))]), " ".join(reference), more))
    return out


@pytest.mark.parametrize(("answer", "reference", "more"), texts(1, 220))
def test_words_agree_with_squad_and_rouge_score(answer: str, reference: str, more: list[str]) -> None:
    references = [reference, *more]
    assert score("token_f1", answer, reference, references=more) == pytest.approx(
        max(squad_f1(answer, r) for r in references), abs=1e-9
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = max(scorer.score(r, answer)["rougeL"].fmeasure for r in references)
    assert score("rouge_l", answer, reference, references=more) == pytest.approx(best, abs=1e-9)


@QUICK
@given(PIECES, PIECES.filter(bool), st.lists(PIECES.filter(bool), max_size=3))
def test_token_f1_is_squads_on_any_text(answer: str, reference: str, more: list[str]) -> None:
    best = max(squad_f1(answer, r) for r in [reference, *more])
    assert score("token_f1", answer, reference, references=more) == pytest.approx(best, abs=1e-9)


def lcs_f(said: str, gold: str) -> float:
    """ROUGE-L's F over lower-cased runs of a-z and 0-9."""
    a, b = (re.findall(r"[a-z0-9]+", t.lower()) for t in (said, gold))
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b, 1):
            row.append(before[j - 1] + 1 if x == y else max(before[j], row[-1]))
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(a), row[-1] / len(b)
    return 2 * precision * recall / (precision + recall)


SENTENCES = st.lists(st.sampled_from(["one", "two", "three", "four", "five", "running", "runs"]), max_size=14).map(
    " ".join
)


@QUICK
@given(SENTENCES, SENTENCES)
def test_rouge_l_is_the_longest_common_subsequence(answer: str, reference: str) -> None:
    assert score("rouge_l", answer, reference) == pytest.approx(lcs_f(answer, reference), abs=1e-9)


def test_contains_looks_for_whole_words() -> None:
    example = Example("1", "?", "Paris", {"references": ["the City of Light"]})
    assert contains("It's paris!", example) == contains("the city of light.", example) == 1
    assert contains("parisian", example) == contains("", example) == 0


# --- structures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ('{"a": "x", "b": "y"}', '{"b": "y", "a": "x"}', 1),
        ('{"a": "x"}', '{"a": "x", "b": "y"}', 2 / 3),
        ('{"a": "x", "b": "z"}', '{"a": "x", "b": "y"}', 0.5),
        ("{}", "{}", 1),
        ("{}", '{"a": 1}', 0),
        ('{"a": {}}', '{"a": []}', 1),
        ('{"s": {"a": "x"}}', '{"s": {"a": "x", "b": "y"}, "i": "k"}', 0.5),
        ('{"a": [1, 2, 2]}', '{"a": [2, 1, 2]}', 1),
        ('{"a": [1, 2]}', '{"a": [1, 2, 2]}', 0.8),
        ('{"a": 5}', '{"a": 5.0}', 1),
        ('{"a": 5}', '{"a": "5"}', 0),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": null}', '{"a": null}', 1),
        ('{"a": "X"}', '{"a": "x"}', 0),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0),
        ('{"a": 1, "a": 2}', '{"a": 2}', 1),
        ('  {"a": 1}\n', '{"a": 1}', 1),
        ('["a"]', '{"a": 1}', 0),
        ('"a"', '{"a": 1}', 0),
        ("", '{"a": 1}', 0),
        ("", "{}", 0),
        ('{"a": 1', '{"a": 1}', 0),
        ('Here: {"a": 1}', '{"a": 1}', 0),
        ('{"a": NaN}', '{"a": 1}', 0),
        ('{"a": 1} {"b": 2}', '{"a": 1}', 0),
        ('{"a": [{"n": 1}, {"n": 2}]}', '{"a": [{"n": 2}, {"n": 3}]}', 0.5),
    ],
)
def test_json_f1(answer: str, reference: str, expected: float) -> None:
    assert score("json_f1", answer, reference) == pytest.approx(expected, abs=1e-9)


LEAVES = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4)
OBJECTS = st.dictionaries(
    st.text(max_size=3), st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=3), inner, max_size=3), max_leaves=8), max_size=4)  # fmt: skip


@QUICK
@given(OBJECTS, OBJECTS)
def test_json_f1_is_symmetric_and_knows_the_same_object(a: dict, b: dict) -> None:
    left, right = json.dumps(a), json.dumps(b, indent=1)
    assert score("json_f1", left, json.dumps(a, sort_keys=True, indent=2)) == 1
    assert score("json_f1", left, right) == pytest.approx(score("json_f1", right, left))
    assert 0 <= score("json_f1", left, right) <= 1


def test_json_f1_survives_depth_and_length() -> None:
    assert score("json_f1", '{"a":' * 100_000, '{"a": 1}') == 0
    assert score("json_f1", '{"a": ' + "9" * 10_000 + "}", '{"a": 1}') == 0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("select a from t", "SELECT a FROM t", 1),
        ("SELECT  a\nFROM t ", "SELECT a FROM t", 1),
        ("SELECT a FROM t WHERE b = 'x y'", 'SELECT a FROM t WHERE b = "x  y"', 1),
        ("SELECT `a` FROM t", "SELECT a FROM t", 1),
        ("SELECT a FROM t;", "SELECT a FROM t", 0),
        ("SELECT a, b FROM t", "SELECT a,b FROM t", 0),
        ("```sql\nSELECT a FROM t\n```", "SELECT a FROM t", 0),
        ("", "SELECT a FROM t", 0),
    ],
)
def test_sql_exact(answer: str, reference: str, expected: float) -> None:
    assert score("sql_exact", answer, reference) == expected


# --- instructions --------------------------------------------------------------------------------------------------

ESSAY = "First point.\n\nsecond point is here\n\n'Third' point."
#: instruction, arguments, answers that follow it, answers that do not
INSTRUCTIONS: list[tuple[str, dict, list[str], list[str]]] = [
    ("keywords:existence", {"keywords": ["Sun", "moon"]}, ["sunny MOON"], ["only the sun"]),
    (
        "keywords:frequency",
        {"keyword": "so", "frequency": 2, "relation": "at least"},
        ["so it is also so"],
        ["so it is"],
    ),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "less than"}, ["so it is"], ["so and so"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["category"], ["a CAT sat"]),
    (
        "keywords:letter_frequency",
        {"letter": "n", "let_frequency": 3, "let_relation": "at least"},
        ["Nan n"],
        ["nine a"],
    ),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 1, "let_relation": "less than"}, ["abc"], ["Zoo"]),
    (
        "language:response_language",
        {"language": "de"},
        ["Das ist nicht der Hund und ich bin es."],
        ["This is the dog and not a cat."],
    ),
    ("language:response_language", {"language": "hi"}, ["यह एक वाक्य है"], ["this is a sentence"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?"],
        ["Dr. Smith met Mr. Jones. They left."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        ["I like it, e.g. on Sundays. Fine."],
        ["One. Two. Three."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na *** b\n***"],
        ["a\n***\n***\nb", "a", "a\n\nb"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["it's on", "a b c"], ["two words"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["two words"], ["well-known fact"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 3, "nth_paragraph": 3, "first_word": "Third"},
        [ESSAY],
        [ESSAY.replace("'Third'", "Fourth")],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "first"},
        ["First, this.\n\nThen."],
        [ESSAY, "first"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name] and [address]"], ["[name] (x)"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["Bye.\nP.S. more", "p. s. x"], ["Bye. PS more"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["Bye. P.P.S more"], ["Bye. P.S. more"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* one\n- two", " * a\n * b"],
        ["* one", "** one\n* b"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is no.", "Well. My answer is maybe."], ["No."]),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "*x* **y**"],
        ["*a* and b", "* *"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["Section 1\na\nSection 2", "SECTION one"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "```\n3```"], ["{a: 1}", "text"]),
    ("detectable_format:title", {}, ["<<joy>>\ntext"], ["<joy>", "<<>>", "<< >>"]),
    (
        "combination:two_responses",
        {},
        ["yes\n******\nno", "******a******b******"],
        ["yes", "a******a", "a******b******c"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["say HI. Hi!"], ["Hi! Say hi."]),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        ["It is over. the END.", 'x "The end."'],
        ["The end. Or not?"],
    ),
    ("startend:quotation", {}, ['"all of it"', ' "x" '], ['"only" this', '"']),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and ESA.", "WELL-KNOWN I say"],
        ["Nasa and ESA"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "less than"},
        ["none"],
        ["ONE"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS THE WHOLE ANSWER."],
        ["This IS not", "DAS IST NICHT DER HUND UND ICH"],
    ),
    ("change_case:english_lowercase", {}, ["this is the whole answer."], ["This is", "das ist nicht der hund und ich"]),
    ("punctuation:no_comma", {}, ["none here; at all"], ["one, here"]),
]


@pytest.mark.parametrize(("name", "kwargs", "follow", "break_"), INSTRUCTIONS)
def test_ifeval_checks(name: str, kwargs: dict, follow: list[str], break_: list[str]) -> None:
    for answer in follow:
        assert score("ifeval", answer, instruction_id_list=[name], kwargs=[kwargs]) == 1, answer
    for answer in [*break_, "", " \n"]:
        assert score("ifeval", answer, instruction_id_list=[name], kwargs=[kwargs]) == 0, answer


def test_every_instruction_of_ifeval_is_tried_above() -> None:
    assert {name for name, *_ in INSTRUCTIONS} == set(CHECKS)
    assert len(CHECKS) == 25


def test_ifeval_is_a_share_and_null_arguments_do_not_count() -> None:
    both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{"x": None}, None]}
    assert score("ifeval", "no comma", **both) == 0.5
    assert score("ifeval", '"no comma"', **both) == 1


def test_ifeval_names_what_it_does_not_know() -> None:
    with pytest.raises(DataError, match="'keywords:rhyme' is unknown"):
        score("ifeval", "x", instruction_id_list=["keywords:rhyme"], kwargs=[{}])
    with pytest.raises(DataError, match="two lists of one length"):
        score("ifeval", "x", instruction_id_list=["punctuation:no_comma"], kwargs=[])


def test_ifeval_scores_every_real_row(data: Path) -> None:
    """Echoing the question repeats it, whatever else it does; every row can be scored with every answer."""
    seen = Counter()
    for path in sorted(data.glob("if_*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            example = Example(row["id"], row["input"], "", row["meta"])
            value = METRICS["ifeval"](row["input"], example)
            names = row["meta"]["instruction_id_list"]
            assert value * len(names) == pytest.approx(round(value * len(names)))
            for name, kwargs in zip(names, row["meta"]["kwargs"], strict=True):
                alone = Example("1", "", "", {"instruction_id_list": [name], "kwargs": [kwargs]})
                if name == "punctuation:no_comma":
                    assert METRICS["ifeval"](row["input"], alone) == float("," not in row["input"])
                if name == "combination:repeat_prompt":
                    assert METRICS["ifeval"](kwargs["prompt_to_repeat"] + " Done.", alone) == 1
                seen[name] += 1
    assert len(seen) >= 24


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The cat sat on the mat and looked at me.", "en"),
        ("Acme Widgets Berlin", "en"),
        ("El perro de la casa es muy grande y no come.", "es"),
        ("Le chat est sur la table et il dort dans le salon.", "fr"),
        ("Het is niet de hond van een man.", "nl"),
        ("これは日本語の文です", "ja"),
        ("这是一个句子", "zh"),
        ("Это предложение на русском языке", "ru"),
        ("Це речення українською мовою, її видно", "uk"),
        ("هذه جملة باللغة العربية", "ar"),
        ("이것은 문장입니다", "ko"),
        ("12345 !!", None),
    ],
)
def test_language(text: str, code: str | None) -> None:
    assert language_of(text) == code
