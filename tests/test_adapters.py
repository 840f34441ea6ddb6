"""The store: names, versions, aliases, and what a stranger's folder may hold (rows A9, A10, A11)."""

from __future__ import annotations

import contextlib
import os
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from adapters_kit import BASE_SHA, filling, make_adapter, make_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select

from hybrid.adapters.preflight import BaseFacts, check
from hybrid.adapters.store import AdapterStore
from hybrid.errors import Conflict, ModelNotFound, Refused
from hybrid.rooms import RESERVED, Home, sha256_file
from hybrid.state import State, audit


@pytest.fixture
def base(tmp_path: Path) -> BaseFacts:
    return make_base(tmp_path / "base")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def state(home: Home):
    state = State(home.database)
    yield state
    state.close()


@pytest.fixture
def store(home: Home, state: State) -> AdapterStore:
    return AdapterStore(home, state)


def passed(store: AdapterStore, base: BaseFacts, name: str = "bank", **card: object) -> int:
    """Publishes a version and marks it as having passed its checks."""
    version = store.publish(name, filling(base, card))
    store.mark(version.id, "candidate")
    return version.version


def trail(state: State) -> list[str]:
    with state.transaction() as connection:
        return list(connection.scalars(select(audit.c.what).order_by(audit.c.id)))


def test_publish_numbers_versions_and_completes_the_card(store, base):
    first, second = (store.publish("bank", filling(base, {"metrics": {"dev_loss": 1.0}})) for _ in range(2))
    assert (first.id, second.id, second.state) == ("bank@1", "bank@2", "staged")
    assert first.card["sha256"] == sha256_file(first.ref.path / "adapter_model.safetensors") == first.ref.sha256
    assert first.card["metrics"] == {"dev_loss": 1.0}
    assert [v.id for v in store.versions("bank")] == ["bank@1", "bank@2"]
    assert store.names() == ["bank"]
    assert first.ref.engine_name == f"bank@1-{first.ref.sha256[:8]}"


def test_a_failed_publication_leaves_nothing(store, base, home):
    def fill(_: Path) -> dict[str, object]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.publish("bank", fill)
    with pytest.raises(Refused, match="is missing"):
        store.publish("bank", lambda _: {})
    assert list((home.adapters / "bank").iterdir()) == []
    assert store.publish("bank", filling(base)).version == 1


def test_another_process_publishes(store, home, base):
    other = AdapterStore(home, State(home.database))
    other.publish("bank", filling(base))
    assert store.names() == []
    store.refresh()
    assert store.resolve("bank@1").state == "staged"
    assert store.publish("bank", filling(base)).version == 2


def test_concurrent_publications_get_numbers_of_their_own(store, home, base):
    stores = [store, AdapterStore(home, State(home.database))]
    threads = [threading.Thread(target=s.publish, args=("bank", filling(base))) for s in stores * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.refresh()
    assert sorted(v.version for v in store.versions("bank")) == list(range(1, 9))


def test_a_lost_database_is_rebuilt_from_the_folders(store, state, home, base):
    passed(store, base)
    state.close()
    for file in home.hidden.iterdir():
        file.unlink()
    again = AdapterStore(home, State(home.database))
    assert again.resolve("bank@1").state == "staged"
    assert again.publish("bank", filling(base)).version == 2


@pytest.mark.parametrize("card", ["", "[]", "{}", '{"name": "other", "version": 1, "sha256": "x"}', "[" * 100_000])
def test_a_folder_with_an_unusable_card_is_shown_with_the_reason(store, home, card):
    folder = home.adapters / "bank" / "1"
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(card)
    store.refresh()
    found = store.resolve("bank@1")
    assert found.state == "rejected"
    assert "publish the adapter" in found.reason


def test_what_is_no_version_is_not_listed(store, home, base, tmp_path):
    make_adapter(home.adapters / "bank" / "1", base)  # no card: not published
    for name in ("gate/1", "bank/0", "bank/01", "bank/latest", ".hidden/1", "a b/1"):
        folder = home.adapters / name
        folder.mkdir(parents=True)
        (folder / "card.json").write_text("{}")
    (home.adapters / "bank" / "7").symlink_to(tmp_path)
    store.refresh()
    assert store.versions() == []


def test_the_alias_moves_and_rolls_back(store, state, base):
    for _ in range(3):
        passed(store, base)
    for version in (1, 2, 3):
        store.promote("bank", version)
    assert store.resolve("bank").version == 3
    assert [v.state for v in store.versions("bank")] == ["draining", "draining", "live"]
    assert store.rollback("bank") == 2
    assert store.rollback("bank") == 1
    with pytest.raises(Conflict, match="no earlier version"):
        store.rollback("bank")
    assert store.alias("bank") == 1
    assert trail(state)[-5:] == ["promote", "promote", "promote", "rollback", "rollback"]


def test_rollback_goes_past_a_retired_version(store, base):
    for _ in range(3):
        store.promote("bank", passed(store, base))
    store.retire("bank", 2)
    assert store.rollback("bank") == 1


@pytest.mark.parametrize("state_", ["staged", "rejected", "retired"])
def test_only_a_version_that_passed_may_take_the_name(store, base, state_):
    version = store.publish("bank", filling(base))
    store.mark(version.id, state_, "because")
    with pytest.raises(Conflict, match="has not passed its checks"):
        store.promote("bank", 1)
    with pytest.raises(ModelNotFound, match="No version"):
        store.resolve("bank")


def test_retire_refuses_the_version_that_answers_unless_it_is_the_only_one(store, base):
    store.promote("bank", passed(store, base))
    passed(store, base)
    with pytest.raises(Conflict, match="promote another version or roll back"):
        store.retire("bank", 1)
    assert store.resolve("bank@1").state == "live"
    store.retire("bank", 2)
    store.retire("bank", 1)
    assert store.alias("bank") is None
    assert (store.resolve("bank@1").ref.path / "card.json").exists()
    with pytest.raises(Conflict, match="changed meanwhile"):
        store.mark("bank@1", "candidate")


def test_desired_is_what_the_engine_must_hold(store, base):
    for name in ("bank", "bank", "voice", "voice"):
        passed(store, base, name)
    store.publish("bank", filling(base))
    store.promote("bank", 1)
    assert [r.id for r in store.desired()] == ["bank@1", "voice@2", "voice@1", "bank@2"]
    assert [r.id for r in store.desired(2)] == ["bank@1", "voice@2"]


def test_under_another_base_the_versions_of_the_first_do_not_serve(store, home, base):
    store.promote("bank", passed(store, base))
    elsewhere = AdapterStore(home, State(home.database), base_sha256="c" * 64)
    assert elsewhere.desired() == []
    assert elsewhere.alias("bank") is None
    assert "another base model" in elsewhere.resolve("bank").reason
    assert AdapterStore(home, State(home.database), base_sha256=BASE_SHA).alias("bank") == 1


# --- A9: races ------------------------------------------------------------------------------------------------------


def test_A9_of_two_promotions_decided_on_the_same_view_one_wins(store, state, home, base):
    for _ in range(3):
        passed(store, base)
    store.promote("bank", 1)
    seen = store.revision("bank")
    results: list[object] = []
    both = threading.Barrier(2)

    def promote(version: int) -> None:
        mine = AdapterStore(home, State(home.database))
        both.wait()
        try:
            results.append(mine.promote("bank", version, revision=seen))
        except Conflict as conflict:
            results.append(conflict)

    threads = [threading.Thread(target=promote, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.refresh()
    assert [type(r) for r in results].count(Conflict) == 1
    assert store.alias("bank") in (2, 3)
    assert [v.state for v in store.versions("bank")].count("live") == 1
    assert sorted(trail(state)[-2:]) == ["promote", "promote refused"]


def test_A9_first_promotions_race_too(store, home, base):
    passed(store, base)
    passed(store, base)
    AdapterStore(home, State(home.database)).promote("bank", 1, revision=0)
    with pytest.raises(Conflict):
        store.promote("bank", 2, revision=0)
    assert store.alias("bank") == 1


def test_A9_rollback_decided_before_a_promotion_loses(store, base):
    for _ in range(3):
        passed(store, base)
    store.promote("bank", 1)
    store.promote("bank", 2)
    seen = store.revision("bank")
    store.promote("bank", 3)
    with pytest.raises(Conflict, match="moved meanwhile"):
        store.rollback("bank", revision=seen)
    assert store.alias("bank") == 3


class Races(RuleBasedStateMachine):
    """Two processes with one home in any order: the alias never dangles and exactly its target is live."""

    versions = Bundle("versions")

    @initialize()
    def open(self) -> None:
        from tempfile import TemporaryDirectory

        self.folder = TemporaryDirectory()
        root = Path(self.folder.name)
        self.base = make_base(root / "base")
        self.states = [State(root / ".hybrid" / "state.db") for _ in range(2)]
        self.stores = [AdapterStore(Home(root), state) for state in self.states]

    @rule(target=versions, who=st.integers(0, 1))
    def publish(self, who: int) -> int:
        return passed(self.stores[who], self.base)

    @rule(who=st.integers(0, 1), version=versions, stale=st.booleans())
    def promote(self, who: int, version: int, stale: bool) -> None:
        revision = self.stores[who].revision("bank") if stale else None
        self.attempt(partial(self.stores[who].promote, "bank", version, revision=revision))

    @rule(who=st.integers(0, 1))
    def rollback(self, who: int) -> None:
        self.attempt(partial(self.stores[who].rollback, "bank"))

    @rule(who=st.integers(0, 1), version=versions)
    def retire(self, who: int, version: int) -> None:
        self.attempt(partial(self.stores[who].retire, "bank", version))

    def attempt(self, act) -> None:
        with contextlib.suppress(Conflict, ModelNotFound):
            act()

    @invariant()
    def alias_is_sound(self) -> None:
        if not hasattr(self, "stores"):
            return
        store = self.stores[0]
        store.refresh()
        live = [v.version for v in store.versions("bank") if v.state == "live"]
        assert live == ([store.alias("bank")] if store.revision("bank") else [])

    def teardown(self) -> None:
        for state in self.states:
            state.close()
        self.folder.cleanup()


TestA9Races = Races.TestCase
TestA9Races.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)


# --- A10, A11: names ------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "../x", "..", ".", "/etc/x", "a/b", "C:\\x", "a\\b", "nul\0byte", "a" * 300, "", " ", "a b", "-x", ".x", "x.",
    "ｂank", "bаnk", "bank\u200b", "bank\n", "a..b", "CON", "a@1", "a:b", *sorted(RESERVED),
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_A10_bad_name_is_refused_and_nothing_is_written(store, base, home, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused):
        store.publish(name, filling(base))
    with pytest.raises(Refused):
        store.adopt(name, tmp_path)
    assert [p for p in sorted(tmp_path.rglob("*")) if ".hybrid" not in p.parts] == [
        p for p in before if ".hybrid" not in p.parts
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.one_of(st.text(max_size=80), st.from_regex(r"[A-Za-z0-9._\-/\\~]{1,70}", fullmatch=True)))
def test_A10_every_accepted_name_stays_inside_the_store(store, base, home, name):
    try:
        version = store.publish(name, filling(base))
    except Refused:
        return
    room = home.adapters.resolve()
    assert version.ref.path.resolve().parent.parent == room
    assert os.path.commonpath([room, version.ref.path.resolve()]) == str(room)


def test_A10_a_name_that_is_a_link_leads_nowhere(store, base, home, tmp_path):
    home.adapters.mkdir(parents=True)
    (home.adapters / "bank").symlink_to(tmp_path)
    with pytest.raises(Refused, match="symbolic link"):
        store.publish("bank", filling(base))


def test_A11_unknown_names_cost_nothing(store, home, base, monkeypatch):
    store.promote("bank", passed(store, base))
    names = [f"nobody-{i}@{i}" for i in range(5_000)] + [f"bank@{i}" for i in range(2, 5_002)]
    with pytest.raises(ModelNotFound):
        store.resolve(names[0])

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the disk was touched")

    for call in ("stat", "lstat", "scandir", "open", "listdir"):
        monkeypatch.setattr(os, call, touched)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for name in names:
        try:
            store.resolve(name)
        except ModelNotFound:
            continue
        raise AssertionError(name)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64_000


@pytest.mark.parametrize("spec", ["bank@", "bank@0", "bank@01", "bank@1@1", "bank@x", "bank@" + "9" * 5_000, "@1", ""])
def test_odd_specs_name_nothing(store, base, spec):
    store.promote("bank", passed(store, base))
    with pytest.raises(ModelNotFound) as caught:
        store.resolve(spec)
    assert len(caught.value.message) < 200


# --- adoption -------------------------------------------------------------------------------------------------------


def test_adopt_takes_what_serves_and_leaves_the_rest(store, base, tmp_path):
    folder = make_adapter(tmp_path / "foreign", base)
    for name in ("README.md", "tokenizer.json", "run.sh"):
        (folder / name).write_text("x")
    version = store.adopt("bank", folder, partial(check, base=base, max_rank=32))
    files = {p.name for p in version.ref.path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", "card.json"}
    assert version.state == "staged"


def test_adopt_publishes_nothing_that_preflight_refuses(store, base, tmp_path):
    folder = make_adapter(tmp_path / "foreign", base, use_dora=True)
    with pytest.raises(Refused, match="DoRA"):
        store.adopt("bank", folder, partial(check, base=base, max_rank=32))
    assert store.versions() == []


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "state.pkl"])
def test_S11_adopt_refuses_pickles(store, base, tmp_path, name):
    folder = make_adapter(tmp_path / "foreign", base)
    (folder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(Refused, match="is a pickle"):
        store.adopt("bank", folder)


def test_adopt_refuses_links_to_files_elsewhere(store, base, tmp_path):
    folder = make_adapter(tmp_path / "foreign", base)
    (folder / "examples.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="symbolic link"):
        store.adopt("bank", folder)
    assert store.versions() == []


def test_adopt_refuses_files_that_are_too_large(store, base, tmp_path):
    folder = make_adapter(tmp_path / "foreign", base)
    with (folder / "README.md").open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(Refused, match=r"larger than 1,048,576 bytes"):
        store.adopt("bank", folder)


def test_adopt_names_a_folder_that_is_not_there(store, tmp_path):
    with pytest.raises(Refused, match="there is no folder"):
        store.adopt("bank", tmp_path / "nowhere")
