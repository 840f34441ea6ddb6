"""What outcomes taught and whose request it is, joined: the arm that was measured best for requests of that kind, an
arm that nobody measured by its own material, and `prompt` for what resembles nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from gate_kit import (
    GARDEN,
    GARDEN_ASKED,
    GARDEN_TASK,
    ISLAND_ASKED,
    LIBRARY,
    LIBRARY_ASKED,
    PLANTS,
    STRANGERS,
    TROUBLES,
    GateHome,
)

from hybrid.gate.choose import fit
from hybrid.gate.conversations import Conversations
from hybrid.gate.outcomes import Lessons
from hybrid.gate.policy import Policy
from hybrid.gate.taught import Taught
from hybrid.knowledge.embed import Embedder
from hybrid.settings import GateSettings
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.request import Knobs, Message, Request

FEW_SHOT, HEAD = Arm("few_shot", ("garden",)), Arm("head", ("garden",))
SUMS_TASK = "Work out the answer."
SUMS = [f"{a} boxes hold {b} {thing} each. How many {thing} are there?"
        for a in (3, 7, 12, 25) for b in (4, 9, 30) for thing in ("pens", "apples", "coins")]  # fmt: skip
#: what each arm scores on the requests of a task, and what an answer costs
GARDEN_SCORES = {PROMPT: 0.1, GARDEN: 0.8, FEW_SHOT: 0.9, HEAD: 0.895}
SUMS_SCORES = {PROMPT: 0.4, GARDEN: 0.1, FEW_SHOT: 0.7, HEAD: 0.0}
COSTS = {PROMPT: 100.0, GARDEN: 90.0, FEW_SHOT: 600.0, HEAD: 10.0}


def lessons() -> Lessons:
    """Two tasks, with a little noise that belongs to no arm."""
    arms = tuple(GARDEN_SCORES)
    rng = np.random.default_rng(0)
    asked = [(f"{GARDEN_TASK}\n\n{t.format(p)}", "garden", GARDEN_SCORES) for t in TROUBLES for p in PLANTS[:8]]
    asked += [(f"{SUMS_TASK}\n\n{text}", "sums", SUMS_SCORES) for text in SUMS]
    score = np.array([[np.clip(scores[arm] + rng.normal(0, 0.02), 0, 1) for arm in arms] for _, _, scores in asked])
    return Lessons(
        ids=tuple(map(str, range(len(asked)))),
        queries=tuple(text for text, _, _ in asked),
        groups=tuple(group for _, group, _ in asked),
        arms=tuple(map(str, arms)),
        score=score,
        cost=np.tile([COSTS[arm] for arm in arms], (len(asked), 1)),
    )


@pytest.fixture(scope="module")
def home(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> GateHome:
    """The garden's adapter and what was measured; the library's adapter came later and was measured by nobody."""
    return taught_home(embedder, tmp_path_factory, "knn", lessons())


def taught_home(
    embedder: Embedder,
    folders: pytest.TempPathFactory,
    kind: str,
    table: Lessons,
    tasks: Mapping[str, str] | None = None,
) -> GateHome:
    home = GateHome(embedder, folders.getbasetemp() / "gate-cache")
    home.garden()
    learned = fit(kind, table, embedder.embed(list(table.queries)))
    sums = [q for q, g in zip(table.queries, table.groups, strict=True) if g == "sums"]
    home.gate.enrol_task("sums", sums, embedder.embed(sums))
    home.gate.taught = Taught.of(learned, frozenset({GARDEN, FEW_SHOT, HEAD}), {GARDEN: "garden"}, tasks, version=1)
    home.train()
    home.library()
    return home


def chosen(home: GateHome, query: str, quality_cost: float = 1.0, kept: Arm | None = None) -> Arm:
    policy, knobs = Policy(GateSettings()), Knobs(quality_cost=quality_cost)
    return policy.choose(home.scores(query), allowed=lambda _: True, knobs=knobs, kept=kept).arm


def asked(task: str, inputs: list[str]) -> list[str]:
    return [f"{task}\n\n{text}" for text in inputs]


def test_the_arm_that_was_measured_best_answers(home: GateHome) -> None:
    assert {chosen(home, q) for q in asked(GARDEN_TASK, GARDEN_ASKED)} == {FEW_SHOT}


@pytest.mark.parametrize("kind", ["tasks", "knn", "linear", "towers"])
def test_it_answers_those_who_do_not_know_the_instruction_too(
    embedder: Embedder, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    """Outcomes were measured under the instruction, and people leave it out."""
    home = taught_home(embedder, tmp_path_factory, kind, lessons())
    assert {chosen(home, q) for q in asked(GARDEN_TASK, GARDEN_ASKED)} == {FEW_SHOT}
    assert sum(chosen(home, q) == FEW_SHOT for q in GARDEN_ASKED) >= 0.9 * len(GARDEN_ASKED)


@pytest.mark.parametrize(
    ("asked_of", "trained_on", "taken"),
    [(2, "garden", PROMPT), (len(SUMS), "garden", GARDEN), (2, "sums", GARDEN)],
)
def test_another_tasks_adapter_must_be_better_than_prompt_beyond_chance(
    embedder: Embedder, tmp_path_factory: pytest.TempPathFactory, asked_of: int, trained_on: str, taken: Arm
) -> None:
    table = lessons()
    table = replace(table, arms=("prompt", "adapter:garden"), score=table.score[:, :2], cost=table.cost[:, :2])
    place = [i for i, group in enumerate(table.groups) if group == "sums"]
    right = np.arange(len(place)) % 4
    table.score[place, 0], table.score[place, 1] = right == 0, right != 0
    table.score[place[asked_of:], 1] = np.nan
    home = taught_home(embedder, tmp_path_factory, "tasks", table, {"garden": trained_on})
    told = Counter(chosen(home, q) for q in asked(SUMS_TASK, SUMS))
    assert told[taken] >= 0.9 * len(SUMS)


def test_a_measured_task_without_an_adapter_gets_its_best_arm_too(home: GateHome) -> None:
    fresh = ["8 crates hold 15 lemons each. How many lemons are there?", "6 vans hold 11 chairs each. How many chairs?"]
    assert {chosen(home, q) for q in asked(SUMS_TASK, fresh)} == {FEW_SHOT}


def test_the_knob_takes_a_cheaper_arm_that_is_nearly_as_good(home: GateHome) -> None:
    query = asked(GARDEN_TASK, GARDEN_ASKED)[0]
    assert chosen(home, query, quality_cost=0.7) == HEAD
    assert home.scores(query).costs[HEAD] < home.scores(query).costs[FEW_SHOT]


def test_an_arm_that_nobody_measured_gets_its_own_requests_and_no_others(home: GateHome) -> None:
    assert sum(chosen(home, q) == LIBRARY for q in LIBRARY_ASKED) >= 0.9 * len(LIBRARY_ASKED)
    others = [*asked(GARDEN_TASK, GARDEN_ASKED), *asked(SUMS_TASK, SUMS)]
    assert not any(chosen(home, q) == LIBRARY for q in others)


def test_what_resembles_nothing_goes_to_prompt(home: GateHome) -> None:
    strange = [*ISLAND_ASKED, *(q for q in STRANGERS if "pens" not in q)]
    assert sum(chosen(home, q) == PROMPT for q in strange) >= 0.9 * len(strange)


def test_an_arm_that_is_not_on_offer_is_never_chosen(home: GateHome, embedder: Embedder) -> None:
    taught = home.gate.taught
    assert taught is not None
    home.gate.taught = Taught.of(taught.learned, frozenset({GARDEN}), {GARDEN: "garden"})
    try:
        assert set(home.scores("x").by_arm) == {PROMPT, GARDEN, LIBRARY}
        assert {chosen(home, q) for q in asked(GARDEN_TASK, GARDEN_ASKED)} == {GARDEN}
    finally:
        home.gate.taught = taught


def test_a_score_says_what_outcomes_promise_and_which_requests_say_so(home: GateHome) -> None:
    scores = home.scores(asked(GARDEN_TASK, GARDEN_ASKED)[0])
    assert "outcomes" in scores.why[FEW_SHOT]
    votes = [near["scores"] for near in scores.neighbours if "scores" in near]
    assert votes
    assert all(near[str(FEW_SHOT)] > near[str(PROMPT)] for near in votes)
    assert all(0 <= share <= 1 + 1e-9 for share in scores.by_arm.values())


def test_a_conversation_keeps_its_arm_unless_much_is_gained(home: GateHome) -> None:
    garden = asked(GARDEN_TASK, GARDEN_ASKED)[0]
    assert chosen(home, garden, kept=GARDEN) == GARDEN  # 0.8 against 0.9 is not worth the change
    assert chosen(home, asked(SUMS_TASK, SUMS)[0], kept=GARDEN) == FEW_SHOT


def test_only_later_turns_of_the_same_callers_conversation_know_its_arm() -> None:
    first = Message("user", "Snails eat my beans")
    turns = (first, Message("assistant", "prune"), Message("user", "and the mint?"))
    memory = Conversations()
    memory.keep(Request(id="1", messages=(first,), caller="ann"), GARDEN)
    assert memory.arm(Request(id="2", messages=turns, caller="ann")) == GARDEN
    assert memory.arm(Request(id="3", messages=(first,), caller="ann")) is None
    assert memory.arm(Request(id="4", messages=turns, caller="bob")) is None
    session = Knobs(session="s1")
    memory.keep(Request(id="5", messages=(first,), caller="ann", knobs=session), LIBRARY)
    assert memory.arm(Request(id="6", messages=(Message("user", "else"),), caller="ann", knobs=session)) == LIBRARY
    assert memory.arm(Request(id="7", messages=(first,), caller="bob", knobs=session)) is None
