"""Choosing among drafts, and showing them: what agrees, what wins, what fits."""

from __future__ import annotations

import pytest

from hybrid.prompts import packed
from hybrid.strategies.aggregate import agreed, consistency, final_answer, vote
from hybrid.strategies.panel import Draft, Seat
from hybrid.types.arm import PROMPT


def drafted(*answers: tuple[str, float]) -> list[Draft]:
    return [Draft(seat=Seat(arm=PROMPT, weight=weight), text=text) for text, weight in answers]


def test_weights_win_a_vote_and_numbers_a_majority() -> None:
    drafts = drafted(("Yes.", 0.7), ("no", 0.1), ("**No**", 0.15))
    assert vote(drafts).place == 0
    assert consistency(drafts).place == 2
    found = agreed(drafts)
    assert found is not None
    assert found.place == 2
    assert agreed(drafted(("a", 0.1), ("b", 0.5), ("c", 0.4))).place == 1  # type: ignore[union-attr]
    assert agreed(drafted(("long " * 20 + "a", 0.1), ("long " * 20 + "b", 0.5))) is None
    assert agreed(drafted(("", 0.4), ("", 0.5), ("said", 0.1))).place == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\nThe answer is 7.", "7"),
        ("so we get\n#### 1,250", "1250"),
        ("The answer is not 5, so the final answer is: **-5**", "-5"),
        ("The answer depends on the year.\nC++", "c++"),
        ("", ""),
    ],
)
def test_final_answers(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_drafts_are_cut_to_what_the_context_holds() -> None:
    def count(text: str) -> int:
        return len(text.split())

    short, long = "two words", "w " * 400
    kept = packed([long, short, long], 102, count)
    assert kept[1] == short
    assert all(45 <= count(text) <= 51 for text in (kept[0], kept[2]))
    assert packed([short, short], 100, count) == [short, short]
