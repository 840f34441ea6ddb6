"""What people say of answers moves the gate a little, never one person alone; what it is judged by never teaches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from hybrid.errors import Refused
from hybrid.gate import bandit
from hybrid.gate.bandit import Bandit
from hybrid.gate.feedback import HOLDOUT, Rewards, held_out, read_rewards, split
from hybrid.gate.model import Scores
from hybrid.gate.ope import Logged, compare, values
from hybrid.gate.policy import Policy
from hybrid.settings import GateSettings
from hybrid.state import State
from hybrid.types.arm import PROMPT as PROMPT_ARM
from hybrid.types.arm import Arm
from hybrid.types.request import Knobs

DIM = 32
BANK, PROMPT = "adapter:bank", "prompt"


def kind(which: int, n: int, seed: int = 0) -> np.ndarray:
    """Requests of one of two kinds, as unit vectors [n, d]."""
    dice = np.random.default_rng(seed)
    vectors = np.eye(DIM)[which] + 0.1 * dice.normal(size=(n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def rate(
    state: State, caller: str, arm: str, vectors: np.ndarray, scores: Iterable[float], **more: object
) -> list[str]:
    """Decisions of a caller with the thumbs it gave; returns their ids."""
    names = []
    for vector, score in zip(vectors, scores, strict=True):
        with state.transaction() as connection:
            count = connection.exec_driver_sql("select count(*) from decisions").scalar_one()
        name = f"dec_{caller}_{count}"
        record = {"id": name, "arm": arm, "chosen_by": "gate", "scores": {arm: 0.6, PROMPT: 0.4}, **more}
        state.add_decisions([
            {"id": name, "at": 1.0 + count, "caller": caller, "record": record,
             "vector": vector.astype(np.float16).tobytes()}
        ])  # fmt: skip
        state.add_feedback(decision_id=name, caller=caller, score=score, comment="")
        names.append(name)
    return names


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")


def many(n: int, callers: int, reward: float, arm: str = BANK, which: int = 0) -> Rewards:
    """Rewards as several people give them, three in four of them alike."""
    dice = np.random.default_rng(which)
    return Rewards(
        decisions=tuple(f"dec_{arm}_{which}_{i}" for i in range(n)),
        callers=tuple(f"key{i % callers}" for i in range(n)),
        arms=(arm,) * n,
        vectors=kind(which, n, 5),
        reward=np.where(dice.random(n) < 0.9, reward, 1 - reward),
        propensity=np.ones(n),
        at=np.arange(n, dtype=float),
        scores=({BANK: 0.6, PROMPT: 0.4},) * n,
    )


def together(*parts: Rewards) -> Rewards:
    return Rewards(
        sum((p.decisions for p in parts), ()),
        sum((p.callers for p in parts), ()),
        sum((p.arms for p in parts), ()),
        np.concatenate([p.vectors for p in parts]),
        np.concatenate([p.reward for p in parts]),
        np.concatenate([p.propensity for p in parts]),
        np.concatenate([p.at for p in parts]),
        sum((p.scores for p in parts), ()),
    )


# --- what counts -----------------------------------------------------------------------------------------------------


def test_the_last_word_of_a_caller_on_a_decision_counts(state: State) -> None:
    [name] = rate(state, "ann", BANK, kind(0, 1), [0.0])
    state.add_feedback(decision_id=name, caller="ann", score=1.0, comment="on second thoughts")
    found = read_rewards(state, DIM)
    assert found.decisions == (name,)
    assert found.reward.tolist() == [1.0]
    assert found.propensity.tolist() == [1.0]  # a record from before propensities were logged


def test_only_what_the_gate_chose_counts_and_only_of_the_version_that_answers_now(state: State) -> None:
    rate(state, "ann", BANK, kind(0, 2), [0, 0], adapter="bank@1")
    rate(state, "ann", PROMPT, kind(0, 1), [1], chosen_by="caller")
    kept = rate(state, "ann", BANK, kind(0, 2), [1, 1], adapter="bank@2", propensity=0.25)
    found = read_rewards(state, DIM)
    assert found.decisions == tuple(kept)
    assert found.propensity.tolist() == [0.25, 0.25]
    assert len(read_rewards(state, DIM + 1)) == 0  # another embedder's vectors


def test_LLM04_feedback_has_a_cap_for_each_caller(state: State) -> None:
    rate(state, "eve", BANK, kind(0, 100), [0.0] * 100)
    for name in ("ann", "bob"):
        rate(state, name, BANK, kind(0, 10), [1.0] * 10)
    taught, _ = split(read_rewards(state, DIM))
    assert taught.callers.count("eve") == 20
    newest = [n for n in (f"dec_eve_{i}" for i in range(100)) if not held_out(n)][-20:]
    assert [n for n in taught.decisions if "eve" in n] == newest


def test_the_owner_of_a_home_without_keys_has_no_cap(state: State) -> None:
    rate(state, "local", BANK, kind(0, 60), [1.0] * 60)
    taught, judged = split(read_rewards(state, DIM))
    assert len(taught) + len(judged) == 60


def test_LLM04_the_holdout_never_teaches(state: State) -> None:
    rate(state, "local", BANK, kind(0, 100), [1.0] * 100)
    found = read_rewards(state, DIM)
    taught, judged = split(found)
    assert not set(taught.decisions) & set(judged.decisions)
    assert all(map(held_out, judged.decisions))
    assert 0.5 * HOLDOUT < len(judged) / 100 < 2 * HOLDOUT
    once = bandit.fit(taught)
    for name in judged.decisions:  # whatever is said of the holdout
        state.add_feedback(decision_id=name, caller="local", score=0.0, comment="")
    again = bandit.fit(split(read_rewards(state, DIM))[0])
    assert once is not None
    assert again is not None
    assert np.array_equal(once.mean, again.mean)


# --- what it changes -------------------------------------------------------------------------------------------------


def test_nothing_is_adjusted_before_there_are_enough_rewards() -> None:
    assert bandit.fit(many(49, 5, 1.0)) is None
    assert bandit.fit(many(50, 5, 1.0)) is not None


def test_thumbs_move_scores_within_bounds_and_where_they_were_given() -> None:
    liked, disliked = many(40, 5, 1.0), many(40, 5, 0.0, which=1)
    taught = bandit.fit(together(liked, disliked))
    assert taught is not None
    for within in (0.1, 0.02):
        up, down = (taught.adjust(kind(which, 1, 9)[0], within)[BANK] for which in (0, 1))
        assert up == pytest.approx(within)
        assert down == pytest.approx(-within)
    assert taught.adjust(kind(0, 1)[0], 0.0) == {BANK: 0.0}
    assert set(taught.adjust(kind(0, 1)[0], 0.1)) == {BANK}  # nobody said anything of `prompt`


def test_thumbs_that_do_not_agree_change_little() -> None:
    dice = np.random.default_rng(0)
    said = many(80, 8, 1.0)
    noise = Rewards(
        said.decisions, said.callers, said.arms, said.vectors, dice.integers(0, 2, 80).astype(float),
        said.propensity, said.at, said.scores,
    )  # fmt: skip
    taught = bandit.fit(noise)
    assert taught is not None
    moved = [abs(taught.adjust(v, 0.1)[BANK]) for v in kind(0, 50, 3)]
    assert np.mean(moved) < 0.05


def test_LLM04_one_caller_cannot_swing_the_gate(state: State) -> None:
    for name in ("ann", "bob", "cy", "di", "ed"):
        rate(state, name, BANK, kind(0, 15), [1.0] * 15)
        rate(state, name, PROMPT, kind(0, 10), [0.5] * 10)
    honest, _ = split(read_rewards(state, DIM))
    rate(state, "eve", BANK, kind(0, 400), [0.0] * 400)
    attacked, _ = split(read_rewards(state, DIM))
    before, after = bandit.fit(honest), bandit.fit(attacked)
    assert before is not None
    assert after is not None
    asked = kind(0, 1, 9)[0]
    assert before.adjust(asked, 0.1)[BANK] > 0.05
    assert after.adjust(asked, 0.1)[BANK] > 0  # hers count as twenty of a hundred and twenty
    alone = read_rewards(state, DIM)
    hers = np.flatnonzero(np.array(alone.callers) == "eve")
    assert bandit.fit(split(alone.rows(hers))[0]) is None


def test_what_rewards_taught_is_the_same_on_disk() -> None:
    taught = bandit.fit(together(many(40, 5, 1.0), many(40, 5, 0.0, which=1)))
    assert taught is not None
    again = Bandit.load(taught.tensors())
    asked = kind(0, 1, 9)[0]
    assert again.adjust(asked, 0.1) == taught.adjust(asked, 0.1)
    with pytest.raises(Refused, match="not whole"):
        Bandit.load({**taught.tensors(), "mean": taught.mean[:, :1]})
    with pytest.raises(Refused, match="cannot be read"):
        Bandit.load({})


# --- exploration -----------------------------------------------------------------------------------------------------


def test_exploration_tries_what_is_within_reach_and_logs_how_likely_that_was() -> None:
    best, near, far = (Arm("adapter", (name,)) for name in ("best", "near", "far"))
    scores = Scores({PROMPT_ARM: 0.1, best: 0.9, near: 0.85, far: 0.3}, stranger=0.1)
    dice = np.random.default_rng(0)
    policy = Policy(GateSettings(explore=0.2), lambda: float(dice.random()))
    found = [policy.choose(scores, allowed=lambda _: True, knobs=Knobs()) for _ in range(2000)]
    taken = Counter(choice.arm for choice in found)
    assert set(taken) == {best, near}
    assert taken[near] / 2000 == pytest.approx(0.2, abs=0.03)
    assert {choice.arm: choice.propensity for choice in found} == {best: 0.8, near: 0.2}
    assert all(choice.reason.startswith("explored") == (choice.arm == near) for choice in found)


@pytest.mark.parametrize("explore", [0.0, 0.2])
def test_nothing_is_tried_where_it_is_off_or_a_conversation_has_its_arm_or_no_arm_is_trusted(explore: float) -> None:
    best, near = Arm("adapter", ("best",)), Arm("adapter", ("near",))
    policy = Policy(GateSettings(explore=explore), lambda: 0.0)
    sure = Scores({PROMPT_ARM: 0.1, best: 0.9, near: 0.85}, stranger=0.1)
    unsure = Scores({PROMPT_ARM: 0.3, best: 0.35, near: 0.34}, stranger=0.3)
    for scores, kept in ((sure, best), (unsure, None)) if explore else ((sure, None),):
        choice = policy.choose(scores, allowed=lambda _: True, knobs=Knobs(), kept=kept)
        assert choice.arm == (best if scores is sure else PROMPT_ARM)
        assert choice.propensity == 1.0


# --- off-policy ------------------------------------------------------------------------------------------------------


def world(n: int, seed: int, explore: float) -> tuple[Logged, np.ndarray, np.ndarray]:
    """Logged decisions of a way that takes arm 0 but for exploring; true rewards [n, 3]; a rough estimate of them."""
    dice = np.random.default_rng(seed)
    x = dice.random(n)
    true = np.stack([0.5 + 0 * x, x, 1 - x], axis=1)
    logging = np.array([1 - explore, explore / 2, explore / 2])
    taken = dice.choice(3, size=n, p=logging)
    reward = (dice.random(n) < true[np.arange(n), taken]).astype(float)
    return Logged(taken, logging[taken], reward), true, np.clip(true + 0.2, 0, 1)


def always(arms: np.ndarray) -> np.ndarray:
    return np.eye(3)[arms]


def test_off_policy_values_hold_the_true_one_in_their_interval() -> None:
    held = {"ips": 0, "snips": 0, "dr": 0}
    for seed in range(20):
        logged, true, rough = world(500, seed, 0.4)
        found = values(logged, always(true.argmax(axis=1)), rough)
        for name, value in found.items():
            held[name] += value.low <= 0.75 <= value.high  # E[max(x, 1 - x)] = 3/4
            assert abs(value.value - 0.75) < 0.3
    assert min(held.values()) >= 16, held


def test_a_way_that_is_worse_is_found_out_and_a_better_one_is_not_held_up() -> None:
    logged, true, rough = world(1500, 1, 0.4)
    old, good, bad = always(np.zeros(1500, int)), always(true.argmax(axis=1)), always(true.argmin(axis=1))
    better, worse = compare(logged, good, old, rough), compare(logged, bad, old, rough)
    assert better.gain is not None
    assert better.gain.low > 0
    assert not better.worse
    assert worse.worse
    assert "gains -0.2" in worse.words


def test_without_exploration_nothing_is_concluded_of_what_was_never_tried() -> None:
    logged, true, rough = world(500, 1, 0.0)
    old = always(np.zeros(500, int))
    found = compare(logged, always(true.argmin(axis=1)), old, rough)
    assert not found.worse
    assert found.gain is None
    assert "exploration is off" in found.words
    assert "alike" in compare(logged, old, old, rough).words


def test_too_few_rewards_conclude_nothing() -> None:
    logged, true, rough = world(20, 1, 0.4)
    found = compare(logged, always(true.argmin(axis=1)), always(np.zeros(20, int)), rough)
    assert not found.worse
    assert "too little to conclude" in found.words
    none = Logged(np.zeros(0, int), np.zeros(0), np.zeros(0))
    assert "no decision" in compare(none, np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3))).words
