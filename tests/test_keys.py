"""API keys: shown once, stored hashed, compared in constant time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from hybrid.errors import BadRequest, NotFound, Unauthorized
from hybrid.keys import Keys
from hybrid.server.access import Access
from hybrid.state import State, corpora
from hybrid.types.arm import Arm


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(State(tmp_path / "state.db"))


def test_S2_a_key_is_stored_as_its_hash_and_never_shown_again(keys: Keys, tmp_path: Path) -> None:
    made = keys.create("alice")
    assert made["key"].encode() not in b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert hashlib.sha256(made["key"].encode()).hexdigest().encode() in b"".join(
        p.read_bytes() for p in tmp_path.iterdir()
    )
    assert set(keys.list()[0]) == {"id", "name", "scopes", "groups", "arms", "created", "revoked"}


def test_S2_only_the_right_key_opens(keys: Keys) -> None:
    assert keys.authenticate(None) is None  # open: none was ever made
    made = keys.create("alice", ["use", "admin"])
    found = keys.authenticate(made["key"])
    assert found is not None
    assert (found.id, found.scopes) == (made["id"], {"use", "admin"})
    for wrong in (None, "", made["key"][:-1], made["key"] + "x", made["id"], "hyb-", "\ud800", "ключ", "' OR 1=1 --"):
        with pytest.raises(Unauthorized) as caught:
            keys.authenticate(wrong)
        assert made["key"] not in caught.value.message


def test_a_revoked_key_is_closed_for_good_and_so_is_the_door(keys: Keys) -> None:
    made = keys.create("alice")
    keys.revoke(made["id"])
    keys.revoke(made["id"])
    for secret in (made["key"], None):
        with pytest.raises(Unauthorized):
            keys.authenticate(secret)
    with pytest.raises(NotFound):
        keys.revoke("key_none")


def test_another_process_sees_a_change_at_once(keys: Keys, tmp_path: Path) -> None:
    other = Keys(State(tmp_path / "state.db"))
    made = other.create("bob")
    assert keys.authenticate(made["key"]) is not None
    other.revoke(made["id"])
    with pytest.raises(Unauthorized):
        keys.authenticate(made["key"])


@pytest.mark.parametrize(
    ("name", "scopes"), [("", ["use"]), ("x" * 101, ["use"]), ("a\nb", ["use"]), ("a", []), ("a", ["root"])]
)
def test_a_key_needs_a_name_and_known_scopes(keys: Keys, name: str, scopes: list[str]) -> None:
    with pytest.raises(BadRequest):
        keys.create(name, scopes)
    assert keys.list() == []


def test_where_strangers_connect_no_key_means_closed(keys: Keys) -> None:
    access = Access(keys, token="own", closed=True)
    with pytest.raises(Unauthorized):
        access.caller(None)
    assert access.caller(b"Bearer own").admin
    made = keys.create("alice")
    assert access.caller(f"Bearer {made['key']}".encode()).id == made["id"]
    assert not access.caller(f"Bearer {made['key']}".encode()).admin


def test_S4_a_key_names_its_groups_and_what_alone_it_may_ask(keys: Keys) -> None:
    made = keys.create("alice", groups=["sales", "sales", "ops"], arms=["bank", "rag:prices", "moa"])
    assert (made["groups"], made["arms"]) == (["ops", "sales"], ["adapter:bank", "moa", "rag:prices"])
    rights = keys.rights(made["id"])
    assert (rights.admin, rights.groups) == (False, {"ops", "sales"})
    asked = {"adapter:bank": True, "rag:prices": True, "prompt": True, "adapter:other": False, "rag:secret": False}
    assert {arm: rights.may(Arm.parse(arm)) for arm in asked} == asked
    assert keys.rights("local").admin
    assert not keys.rights("key_that_is_gone").may(Arm.parse("adapter:bank"))
    assert keys.rights(keys.create("root", ["admin"])["id"]).admin


@pytest.mark.parametrize(
    "wrong",
    [{"groups": ["two words"]}, {"groups": [""]}, {"arms": ["rag:a:b"]}, {"arms": ["mix:a=1"]}, {"arms": ["a b"]}],
)
def test_a_key_takes_only_groups_and_arms_that_can_be(keys: Keys, wrong: dict[str, list[str]]) -> None:
    with pytest.raises(BadRequest):
        keys.create("alice", **wrong)
    with pytest.raises(BadRequest):
        keys.create("root", ["admin"], arms=["bank"])


def test_S4_what_a_key_may_see_changes_at_once(keys: Keys, tmp_path: Path) -> None:
    elsewhere = State(tmp_path / "state.db")
    made = keys.create("alice", groups=["sales"])
    assert keys.rights(made["id"]).hidden == keys.rights(made["id"]).own == frozenset()
    with elsewhere.transaction() as connection:
        rows = ({"id": f"vs_{name}", "name": name, "groups": [name], "owner": "key_x"} for name in ("sales", "ops"))
        connection.execute(insert(corpora), list(rows))
    assert keys.rights(made["id"]).hidden == {"ops"}
    with elsewhere.transaction() as connection:
        connection.execute(update(corpora).values(owner=made["id"]))
    assert (keys.rights(made["id"]).hidden, keys.rights(made["id"]).own) == (frozenset(), {"sales", "ops"})


def test_a_stamp_lasts_until_anyone_commits(tmp_path: Path) -> None:
    here, elsewhere = State(tmp_path / "state.db"), State(tmp_path / "state.db")
    seen = [here.stamp()]
    for state in (here, elsewhere):
        assert here.stamp() == seen[-1]
        with state.transaction() as connection:
            state.write_audit(connection, "look")
        seen.append(here.stamp())
    assert len(set(seen)) == 3
