"""The gate routes by what arms are made of, to arms it has never seen, and says when it does not know."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import numpy as np
import pytest
from gate_kit import (
    GARDEN,
    GARDEN_ASKED,
    GARDEN_TASK,
    ISLAND,
    ISLAND_ASKED,
    LIBRARY,
    LIBRARY_ASKED,
    LIBRARY_TASK,
    STRANGERS,
    GateHome,
)

from hybrid.errors import BadRequest, Forbidden
from hybrid.gate.features import Vectors
from hybrid.gate.general import general_lines
from hybrid.gate.kept import fingerprint, keep, kept
from hybrid.gate.lexicon import Lexicon, Wording, bare_input, look
from hybrid.gate.model import DEFAULT, Gate, Scores, Weights
from hybrid.gate.policy import Policy
from hybrid.gate.train import pseudo_questions, train_gate
from hybrid.knowledge.embed import Embedder
from hybrid.rooms import Home
from hybrid.settings import GateSettings
from hybrid.types.arm import PROMPT, Arm
from hybrid.types.request import Knobs


@pytest.fixture
def home(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> GateHome:
    return GateHome(embedder, tmp_path_factory.getbasetemp() / "gate-cache")


def share(home: GateHome, asked: list[str], arm: Arm) -> float:
    return sum(home.best(q) == arm for q in asked) / len(asked)


# --- routing ---------------------------------------------------------------------------------------------------------


def test_each_arm_gets_its_own_requests_with_the_instruction_and_without(home: GateHome) -> None:
    home.garden(), home.library(), home.island(), home.train()
    assert share(home, GARDEN_ASKED, GARDEN) == 1
    assert share(home, [f"{GARDEN_TASK}\n\n{q}" for q in GARDEN_ASKED], GARDEN) == 1
    assert share(home, LIBRARY_ASKED, LIBRARY) >= 0.9
    assert share(home, [f"{LIBRARY_TASK}\n\n{q}" for q in LIBRARY_ASKED], LIBRARY) == 1
    assert share(home, ISLAND_ASKED, ISLAND) == 1
    assert share(home, STRANGERS, PROMPT) == 1


@pytest.mark.parametrize("arms", [("garden",), ("island",), ("library", "island"), ()])
def test_any_set_of_arms_leaves_strangers_to_prompt(home: GateHome, arms: tuple[str, ...]) -> None:
    for arm in arms:
        getattr(home, arm)()
    home.train()
    assert share(home, STRANGERS, PROMPT) == 1


def test_an_arm_enrolled_after_training_is_routed_to_at_once(home: GateHome) -> None:
    home.library(), home.train()
    before = home.gate.weights
    assert share(home, GARDEN_ASKED, GARDEN) == 0
    home.garden()
    home.island()
    assert home.gate.weights is before
    assert share(home, GARDEN_ASKED, GARDEN) >= 0.9
    assert share(home, ISLAND_ASKED, ISLAND) >= 0.8
    assert share(home, LIBRARY_ASKED, LIBRARY) >= 0.9


def test_the_weights_that_ship_route_before_anything_is_trained(home: GateHome) -> None:
    home.garden(), home.island()
    assert home.gate.weights is DEFAULT
    assert share(home, GARDEN_ASKED, GARDEN) >= 0.9
    assert share(home, ISLAND_ASKED, ISLAND) >= 0.8
    assert share(home, STRANGERS, PROMPT) == 1


def test_a_forgotten_arm_is_not_chosen_and_its_requests_go_to_prompt(home: GateHome) -> None:
    home.garden(), home.library(), home.train()
    home.gate.forget(GARDEN)
    assert GARDEN not in home.gate.arms()
    assert share(home, GARDEN_ASKED, PROMPT) >= 0.9


def test_passages_found_elsewhere_are_used_in_place_of_a_search(home: GateHome) -> None:
    home.island(), home.train()
    query = ISLAND_ASKED[0]
    vector = home.embedder.embed_query(query)
    nothing = home.gate.score(query, vector, {"island": []})
    assert nothing.by_arm[ISLAND] < 0.1 < home.gate.score(query, vector).by_arm[ISLAND]


def test_a_score_is_explained_and_sums_to_one(home: GateHome) -> None:
    home.garden(), home.island(), home.train()
    scores = home.scores("When should I prune peonies?")
    assert sum(scores.by_arm.values()) == pytest.approx(1)
    assert set(scores.by_arm) == set(home.gate.arms())
    assert scores.confidence == scores.by_arm[GARDEN]
    assert {n["arm"] for n in scores.neighbours} == {"adapter:garden"}
    assert "prune" in scores.neighbours[0]["text"]
    assert 0.5 < scores.neighbours[0]["similarity"] <= 1
    assert "training messages of garden" in scores.why[GARDEN]


def test_training_twice_gives_the_same_weights(home: GateHome) -> None:
    home.garden(), home.island()
    first, second = (train_gate(home.gate.bank, home.embedder.embed) for _ in range(2))
    assert all(np.array_equal(first.by_kind[kind], second.by_kind[kind]) for kind in first.by_kind)


def test_an_adapter_trained_with_passages_is_an_arm_that_names_its_corpus(home: GateHome) -> None:
    vectors = home.embedder.embed(GARDEN_ASKED)
    arm = home.gate.enrol_adapter("garden", GARDEN_ASKED, vectors, corpus="island")
    assert arm == Arm("adapter+rag", ("garden", "island"))
    assert home.best(GARDEN_ASKED[0]) == arm


# --- synthetic vectors: shapes and extremes --------------------------------------------------------------------------


def cloud(seed: int, n: int, d: int = 32, width: float = 0.15) -> Vectors:
    """Unit vectors around a direction of their own."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=d)
    points = centre / np.linalg.norm(centre) + width * rng.normal(size=(n, d))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def texts(seed: int, n: int) -> list[str]:
    return [f"word{seed} thing{seed} number {i}" for i in range(n)]


def test_a_gate_without_arms_knows_prompt_alone() -> None:
    gate = Gate()
    assert gate.arms() == (PROMPT,)
    assert gate.score("anything", cloud(0, 1)[0]).by_arm == {PROMPT: 1.0}
    assert Scores.only(gate.arms()).by_arm == {PROMPT: 1.0}


@pytest.mark.parametrize("n", [1, 2, 5, 3000])
def test_an_arm_of_any_size_finds_its_own(n: int) -> None:
    gate = Gate()
    gate.enrol_general(texts(1, 200), cloud(1, 200, width=0.5))
    gate.enrol_adapter("a", texts(2, n), cloud(2, n))
    own = gate.score(texts(2, 1)[0], cloud(2, 1)[0])
    other = gate.score("quite another request", cloud(3, 1)[0])
    assert own.by_arm[Arm("adapter", ("a",))] > 0.5 > other.by_arm[Arm("adapter", ("a",))]


def test_views_of_different_length_are_both_used() -> None:
    gate = Gate()
    gate.enrol_general(texts(1, 50), cloud(1, 50, width=0.5))
    gate.enrol_adapter("a", texts(2, 40), cloud(2, 40), cloud(3, 25))
    arm = Arm("adapter", ("a",))
    for seed in (2, 3):
        assert gate.score(texts(2, 1)[0], cloud(seed, 1)[0]).by_arm[arm] > 0.5
    assert train_gate(gate.bank, lambda lines: cloud(9, len(lines))).by_kind["messages"].shape == (8,)


def test_an_empty_corpus_and_an_adapter_without_examples_are_never_chosen() -> None:
    gate = Gate()
    gate.enrol_general(texts(1, 50), cloud(1, 50))
    gate.enrol_adapter("empty", [], np.zeros((0, 32), np.float32))
    gate.enrol_corpus("void", [], np.zeros((0, 32), np.float32))
    scores = gate.score("is there anything?", cloud(4, 1)[0]).by_arm
    assert max(scores, key=lambda arm: scores[arm]) == PROMPT
    gate.weights = train_gate(gate.bank, lambda lines: cloud(9, len(lines)))
    assert math.isfinite(sum(gate.score("is there anything?", cloud(4, 1)[0]).by_arm.values()))


def test_enrolling_while_scores_are_taken_disturbs_none() -> None:
    gate = Gate()
    gate.enrol_general(texts(1, 100), cloud(1, 100))
    failures: list[Exception] = []
    done = threading.Event()

    def score() -> None:
        while not done.is_set():
            try:
                assert sum(gate.score("word2", cloud(2, 1)[0]).by_arm.values()) == pytest.approx(1)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(20):
        arm = gate.enrol_adapter(f"a{i % 3}", texts(i, 60), cloud(i, 60))
        if i % 2:
            gate.forget(arm)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []


# --- words -----------------------------------------------------------------------------------------------------------


def test_a_message_does_not_vouch_for_its_own_words() -> None:
    lexicon = Lexicon.of(["rate zebra", *["play a song"] * 20])
    asked = look("rate zebra")
    inside, outside = (lexicon.familiarity(asked, Lexicon(), own=own)[0] for own in (False, True))
    assert inside > 0 > outside


def test_the_input_is_what_follows_the_instruction() -> None:
    assert bare_input("Do this.\n\nthe input") == "the input"
    assert bare_input("the input") == "the input"
    assert look("你好 world[1]") == ["你", "好", "world", "[", "1", "]"]


def test_questions_made_from_passages_are_many_and_repeatable(home: GateHome) -> None:
    home.island()
    corpus = home.gate.bank.corpora[ISLAND]
    made = pseudo_questions(corpus, 50)
    assert made == pseudo_questions(corpus, 50)
    assert len({question for question, _ in made}) > 40


# --- the policy ------------------------------------------------------------------------------------------------------

A, RAG, BOTH = Arm("adapter", ("a",)), Arm("rag", ("c",)), Arm("adapter+rag", ("a", "c"))


def everything(_: Arm) -> bool:
    return True


def choose(by_arm: dict[Arm, float], knobs: Knobs = Knobs(), allowed=everything, **settings):  # noqa: B008
    return Policy(GateSettings(**settings)).choose(Scores(by_arm), allowed=allowed, knobs=knobs)


def test_the_likeliest_arm_is_taken() -> None:
    choice = choose({PROMPT: 0.1, A: 0.2, RAG: 0.7})
    assert (choice.arm, choice.confidence, choice.fallback) == (RAG, 0.7, None)


def test_a_narrow_arm_that_is_not_likely_enough_is_left_and_the_reason_says_so() -> None:
    choice = choose({PROMPT: 0.3, A: 0.36, RAG: 0.34})
    assert (choice.arm, choice.fallback) == (PROMPT, "abstained")
    assert "0.36" in choice.reason


def test_of_an_arm_that_is_known_well_more_is_asked() -> None:
    def chosen(scores: dict[Arm, float], **settings: float) -> Arm:
        known = Scores(scores, sure={("adapter", "a"): 0.6, ("rag", "c"): 0.5})
        return Policy(GateSettings(**settings)).choose(known, allowed=everything, knobs=Knobs()).arm

    assert chosen({PROMPT: 0.4, A: 0.55}) == PROMPT
    assert chosen({PROMPT: 0.4, A: 0.61}) == A
    assert chosen({PROMPT: 0.4, RAG: 0.55}) == RAG
    assert chosen({PROMPT: 0.4, BOTH: 0.55}) == BOTH, "the least that is asked of its parts"
    assert chosen({PROMPT: 0.4, Arm("moa"): 0.45}) == Arm("moa")
    assert chosen({PROMPT: 0.4, A: 0.55}, abstain_below=0.5) == A
    assert chosen({PROMPT: 0.2, RAG: 0.55}, abstain_below=0.6) == PROMPT


def test_how_sure_the_gate_has_to_be_grows_with_what_it_has_seen(embedder: Embedder) -> None:
    """Two adapters of the same requests: a few of one, many of the other."""
    many = [f"{line} (no. {n})" for n in range(400 // len(GARDEN_ASKED) + 1) for line in GARDEN_ASKED]
    gate = Gate()
    gate.enrol_general(general_lines(), embedder.embed_queries(general_lines()))
    gate.enrol_adapter("few", many[:20], embedder.embed_queries(many[:20]))
    gate.enrol_adapter("many", many, embedder.embed_queries(many))
    gate.weights = Weights(DEFAULT.by_kind, sure=0.6)
    scores = gate.score(GARDEN_ASKED[0], embedder.embed_query(GARDEN_ASKED[0]))
    few, known = (scores.needed(Arm("adapter", (name,))) for name in ("few", "many"))
    assert 0.4 <= few < 0.42
    assert 0.58 < known <= 0.6
    assert scores.needed(PROMPT) == 0.4


def test_prompt_chosen_by_the_gate_is_no_fallback() -> None:
    assert choose({PROMPT: 0.9, A: 0.1}).fallback is None


def test_permissions_come_after_the_gate() -> None:
    assert choose({PROMPT: 0.1, A: 0.9}, allowed=lambda arm: arm != A).arm == PROMPT
    assert choose({PROMPT: 0.1, A: 0.1, RAG: 0.8}, Knobs(arms=("adapter:a",))).arm == A
    assert choose({PROMPT: 0.1, A: 0.1, RAG: 0.8}, Knobs(arms=("adapter",))).arm == A
    other = Arm("rag", ("d",))
    assert choose({PROMPT: 0.05, RAG: 0.9, other: 0.05}, Knobs(corpus="d")).arm == PROMPT
    with pytest.raises(Forbidden):
        choose({PROMPT: 0.5, A: 0.5}, allowed=lambda _: False)
    with pytest.raises(BadRequest, match="adapter:nobody"):
        choose({PROMPT: 0.5, A: 0.5}, Knobs(arms=("adapter:nobody",)))


def test_a_score_that_is_not_a_number_falls_back_to_the_default_arm() -> None:
    choice = choose({PROMPT: 0.2, A: math.nan})
    assert (choice.arm, choice.fallback) == (PROMPT, "error")
    assert choose({PROMPT: 0.2, RAG: math.nan}, default_arm="rag:c").arm == RAG
    assert choose({A: math.inf, RAG: 0.1}).arm == A  # the default is not among them: the cheapest


def test_cost_decides_between_arms_that_score_alike() -> None:
    close = {PROMPT: 0.02, A: 0.48, BOTH: 0.5}
    assert choose(close, Knobs(quality_cost=1.0)).arm == BOTH
    assert choose(close, Knobs(quality_cost=0.5)).arm == A
    assert choose({PROMPT: 0.45, RAG: 0.55}, Knobs(quality_cost=0.0)).arm == PROMPT
    assert choose({PROMPT: 0.61, RAG: 0.39}, Knobs(quality_cost=1.0)).arm == RAG
    assert choose({PROMPT: 0.61, RAG: 0.39}, Knobs(quality_cost=0.5)).arm == PROMPT


# --- what is kept for the next start ----------------------------------------------------------------------------------

ARMS = [(Arm("adapter", ("a",)), "a@1-abc"), (Arm("rag", ("docs",)), "4")]


def test_fitted_weights_come_back_as_they_were(tmp_path: Path) -> None:
    home = Home(tmp_path)
    name = fingerprint(ARMS, "e5")
    assert kept(home, name) is None
    changed = Weights({kind: w + 0.25 for kind, w in DEFAULT.by_kind.items()}, sure=0.5)
    keep(home, name, changed)
    found = kept(home, name)
    assert found is not None
    assert found.sure == 0.5
    assert {kind: w.tolist() for kind, w in found.by_kind.items()} == {
        kind: w.tolist() for kind, w in changed.by_kind.items()
    }


def test_weights_belong_to_the_very_arms_and_embedder_they_were_fitted_to() -> None:
    assert fingerprint(ARMS, "e5") == fingerprint(reversed(ARMS), "e5")
    assert fingerprint([ARMS[0], (ARMS[1][0], "5")], "e5") != fingerprint(ARMS, "e5")
    assert fingerprint(ARMS, "other") != fingerprint(ARMS, "e5")


@pytest.mark.parametrize("harm", ["torn", "shape", "nan", "sure"])
def test_kept_weights_that_cannot_be_used_are_none(tmp_path: Path, harm: str) -> None:
    home, by_kind = Home(tmp_path), dict(DEFAULT.by_kind)
    if harm == "shape":
        by_kind["general"] = np.zeros(7)
    if harm == "nan":
        by_kind["general"] = np.full(2, np.nan)
    keep(home, "x", Weights(by_kind, sure=7.0 if harm == "sure" else 0.5))
    if harm == "torn":
        path = next(home.hidden.rglob("x.safetensors"))
        path.write_bytes(path.read_bytes()[:-3])
    assert kept(home, "x") is None


def test_the_table_of_words_says_what_each_lexicon_says() -> None:
    general = Lexicon.of(general_lines())
    lexicons = [Lexicon.of(GARDEN_ASKED), Lexicon.of(LIBRARY_ASKED), Lexicon()]
    table = Wording.of(lexicons, general)
    for text in (*GARDEN_ASKED, *LIBRARY_ASKED, *STRANGERS, "", "zzz", "长城在哪里？"):
        asked = look(text)
        each = [lexicon.familiarity(asked, general) for lexicon in lexicons]
        assert np.allclose(table.familiarity(asked), each, atol=1e-5), text
