"""A request in an arm's own words is routed by a glance at them; where they leave a doubt, all of it is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gate_kit import GARDEN, GARDEN_TASK, ISLAND_ASKED, LIBRARY, LIBRARY_TASK, STRANGERS, GateHome

from hybrid.bench.house import CountingEmbedder
from hybrid.gate.decide import Decider
from hybrid.gate.policy import Policy
from hybrid.journal import Journal
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home
from hybrid.settings import GateSettings, Settings
from hybrid.state import State
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.decision import Decision
from hybrid.types.request import Knobs, Message, Request
from hybrid.types.rights import Rights

GROWN = [
    "roses", "tulips", "beans", "lavender", "potatoes", "mint", "peonies", "leeks", "carrots", "dahlias", "ivy", "kale",
    "plums", "thyme", "onions", "asters", "pears", "chard", "ferns", "squash",
]  # fmt: skip
WORRIES = [
    "When should I prune the {}?", "The {} have yellow leaves and drop them", "How much water do {} need in July?",
    "Snails are eating the {}, what helps?", "Is it too late to plant {} now?", "My {} flower but bear no seed",
    "Do {} want sun or shade?", "What should I feed the {} in spring?", "Mildew grows on the {} again",
    "The frost has caught my {}", "How far apart do I sow {}?", "Can {} stand next to a wall?",
    "The {} lean over after rain", "Greenfly sits all over the {}", "How do I keep {} over winter?",
]  # fmt: skip
TITLES = [
    "The Silent Harbour", "A Winter in Minsk", "Ten Small Rivers", "The Glass Orchard", "Letters to Ada", "Nine Doors",
    "The Last Lamplighter", "Salt and Thunder", "A Field Guide to Fog", "The Clockmaker's Son", "Paper Moons",
    "The Ninth Ferry", "Under the Viaduct", "A House of Tin", "The Cartographer", "Snow on the Line", "Borrowed Light",
    "The Orchard Keeper", "Low Water", "An Atlas of Rain",
]  # fmt: skip
WISHES = [
    "renew {} until next week", "put {} on hold for me", "I return {} today", "extend the loan of {}",
    "cancel my reservation of {}", "is {} on the shelf", "reserve {} for my daughter", "I have lost {}",
    "how long may I keep {}", "send {} to the north branch", "do you have {} as an audiobook", "{} is damaged",
    "I still wait for {}", "lend me {} over the holidays", "take {} off my list",
]  # fmt: skip
ISLAND = frozenset({"island"})
GARDEN_ASKED = [worry.format(plant) for worry in WORRIES for plant in GROWN[18:]]
LIBRARY_ASKED = [wish.format(title) for wish in WISHES for title in TITLES[18:]]


@pytest.fixture(scope="module")
def counting(embedder: Embedder) -> CountingEmbedder:
    return CountingEmbedder(embedder.path, embedder.name)


@pytest.fixture(scope="module")
def home(counting: CountingEmbedder, tmp_path_factory: pytest.TempPathFactory) -> GateHome:
    home = GateHome(counting, tmp_path_factory.getbasetemp() / "gate-cache")
    home.adapter("garden", GARDEN_TASK, [worry.format(plant) for worry, plant in product(WORRIES, GROWN[:18])])
    home.adapter("library", LIBRARY_TASK, [wish.format(title) for wish, title in product(WISHES, TITLES[:18])])
    home.island(), home.train()
    return home


class Routed:
    """Decides one request after another; `embedded` counts those that words alone did not tell."""

    def __init__(self, home: GateHome, library: Library, **rules: Any) -> None:
        settings = GateSettings(deadline_ms=60_000, **rules)
        self._decider = Decider(home.gate, Policy(settings), library, settings)
        self._embedder = library.embedder
        self.embedded = 0

    def __call__(self, query: str, *, whole: bool = False, **request: Any) -> Decision:
        # every query is new to the embedder, and is not asked twice for being shared by tests
        assert isinstance(self._embedder, CountingEmbedder)
        self._embedder._cached_query.cache_clear()
        before = self._embedder.embedded
        asked = Request(id="1", messages=(Message("user", query),), **request)
        decision = asyncio.run(self._decider.decide(asked, whole=whole))
        self.embedded += self._embedder.embedded > before
        return decision


@pytest.fixture
def library(counting: CountingEmbedder, tmp_path: Path) -> Iterator[Library]:
    library = Library(Home(tmp_path), counting, Settings.load().retrieval)
    yield library
    library.close()


@pytest.mark.parametrize("instructed", [True, False])
def test_requests_in_an_arms_own_words_need_no_embedding(home: GateHome, library: Library, instructed: bool) -> None:
    routed, asked = Routed(home, library), {GARDEN: GARDEN_ASKED, LIBRARY: LIBRARY_ASKED}
    for (arm, queries), task in zip(asked.items(), (GARDEN_TASK, LIBRARY_TASK), strict=True):
        told = [routed(f"{task}\n\n{query}" if instructed else query).arm for query in queries]
        assert told.count(arm) >= len(queries) * (1.0 if instructed else 0.85)
    assert routed.embedded <= 60 * (0.1 if instructed else 0.8)


def test_what_is_nobodys_is_looked_at_as_a_whole(home: GateHome, library: Library) -> None:
    routed, asked = Routed(home, library), [*STRANGERS, *ISLAND_ASKED]
    arms = [routed(query).arm for query in asked]
    assert arms[: len(STRANGERS)] == [PROMPT] * len(STRANGERS)
    assert routed.embedded == len(asked)


def test_an_instruction_alone_does_not_convince(home: GateHome, library: Library) -> None:
    routed = Routed(home, library)
    for stranger in (*STRANGERS, *LIBRARY_ASKED[:5]):
        routed(f"{GARDEN_TASK}\n\n{stranger}")
    assert routed.embedded == len(STRANGERS) + 5


def test_the_decision_is_that_of_a_whole_look_and_says_how_it_was_made(home: GateHome, library: Library) -> None:
    routed = Routed(home, library)
    query = f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}"
    glanced, whole = routed(query), routed(query, whole=True)
    assert routed.embedded == 1
    assert glanced.arm == whole.arm == GARDEN
    assert glanced.reason.startswith("the words are those of garden, ")
    assert glanced.reason.endswith("sure at a glance")
    assert set(glanced.scores) == set(whole.scores)
    assert glanced.scores["adapter:garden"] == glanced.confidence > 0.99
    assert (glanced.neighbours, whole.neighbours[0]["arm"]) == ((), "adapter:garden")


def test_who_asks_why_is_told_what_lies_nearest(home: GateHome, library: Library) -> None:
    told = Routed(home, library)(f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}", knobs=Knobs(explain=True))
    assert "at a glance" in told.reason
    assert {one["arm"] for one in told.neighbours} == {"adapter:garden"}


@pytest.mark.parametrize(
    ("limits", "arm"),
    [
        ({"knobs": Knobs(arms=("adapter:library", "prompt"))}, PROMPT),
        ({"knobs": Knobs(corpus="island")}, GARDEN),
        ({"rights": Rights(admin=False, arms=frozenset({"adapter:library", "prompt"}), hidden=ISLAND)}, PROMPT),
        ({"rights": Rights(admin=False, arms=frozenset({"adapter:garden", "prompt"}), hidden=ISLAND)}, GARDEN),
    ],
)
def test_limits_are_kept(home: GateHome, library: Library, limits: dict[str, Any], arm: Arm) -> None:
    routed = Routed(home, library)
    decision = routed(f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}", **limits)
    assert decision.arm == arm
    assert routed.embedded == (0 if arm == GARDEN and "rights" in limits else 1)


def test_feedback_is_heard(home: GateHome, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(adjust=lambda vector, within: {"adapter:garden": -0.05})
    monkeypatch.setattr(home.gate, "bandit", said)
    decision = Routed(home, library)(f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}")
    assert decision.adjusted == {"adapter:garden": -0.05}


def test_the_setting_ends_it(home: GateHome, library: Library) -> None:
    routed = Routed(home, library, glance_above=1.0)
    assert routed(f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}").arm == GARDEN
    assert routed.embedded == 1


def test_a_little_known_arm_and_twins_are_looked_at_as_a_whole(
    counting: CountingEmbedder, library: Library, tmp_path_factory: pytest.TempPathFactory
) -> None:
    few, many = ([worry.format(plant) for worry, plant in product(WORRIES, GROWN[:n])] for n in (4, 18))
    little, twins = (GateHome(counting, tmp_path_factory.getbasetemp() / "gate-cache") for _ in range(2))
    little.adapter("garden", GARDEN_TASK, few)
    for name in ("garden", "allotment"):
        twins.adapter(name, GARDEN_TASK, many)
    for home in (little, twins):
        home.train()
        routed = Routed(home, library)
        for query in GARDEN_ASKED[:5]:
            routed(f"{GARDEN_TASK}\n\n{query}")
        assert routed.embedded == 5


# --- the log ---------------------------------------------------------------------------------------------------------


def test_the_vector_is_logged_behind_the_answer(home: GateHome, library: Library, tmp_path: Path) -> None:
    query = f"{GARDEN_TASK}\n\n{GARDEN_ASKED[0]}"
    routed = Routed(home, library)
    decision = routed(query)
    assert routed.embedded == 0
    with _log(tmp_path) as (state, journal):
        journal.add(decision, "ada")
        journal.add(replace(decision, id="dec_2", vector=_broken), "ada")
        journal.flush()
        kept, lost = state.decision(decision.id), state.decision("dec_2")
    assert kept is not None
    assert lost is not None
    vector = np.frombuffer(kept["vector"], np.float16).astype(np.float32)
    assert vector @ home.embedder.embed_query(query) == pytest.approx(1, abs=1e-3)
    assert (lost["record"]["arm"], lost["vector"]) == ("adapter:garden", None)
    assert GARDEN_ASKED[0].encode() not in (tmp_path / "log.db").read_bytes()


def _broken() -> bytes:
    raise RuntimeError("the embedder is gone")


@contextmanager
def _log(folder: Path) -> Iterator[tuple[State, Journal]]:
    state = State(folder / "log.db")
    try:
        yield state, Journal(state)
    finally:
        state.close()
