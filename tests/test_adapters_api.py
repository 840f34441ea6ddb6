"""What a bare name means, changed over HTTP: promote, roll back, retire, and what an upload holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from adapters_kit import filling
from jobs_kit import chat_rows
from server_kit import Running, make_home, running, until

from hybrid.adapters.preflight import read_base

DOCUMENT = b"# Title\n\n" + b"\n\n".join(b" ".join(b"w%d" % (n * k) for k in range(2, 300)) for n in range(2, 30))

PAIRS = [{"prompt": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(40)]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(make_home(tmp_path)) as server:
        yield server


async def publish(server: Running, count: int) -> None:
    """`bank@1` to `bank@count`, each through its checks; the first takes the name, the others wait."""
    base = read_base(Path(server.settings.model))
    for number in range(1, count + 1):
        fill = filling(base, {"promote": False}, seed=number)
        version = await asyncio.to_thread(server.gateway.store.publish, "bank", fill)
        await until(lambda id=version.id: server.gateway.store.resolve(id).state in ("candidate", "live"))


async def aliases(server: Running) -> Any:
    return (await server.get("/v1/status"))[1]["aliases"]["bank"]


async def test_a_name_is_promoted_rolled_back_and_a_version_retired(server: Running) -> None:
    await publish(server, 2)
    seen = await aliases(server)
    assert seen["version"] == 1
    status, told, _ = await server.post("/v1/adapters/bank/promote", {"version": 2})
    assert (status, told["version"]) == (200, 2)
    assert await aliases(server) == {"version": 2, "revision": told["revision"]}
    status, told, _ = await server.post("/v1/adapters/bank/rollback", {})
    assert (status, told["version"]) == (200, 1)
    assert (await server.post("/v1/adapters/bank/retire", {"version": 1}))[0] == 409  # the name means it
    status, told, _ = await server.post("/v1/adapters/bank/retire", {"version": 2})
    assert (status, told["state"]) == (200, "retired")
    assert (await server.post("/v1/adapters/bank/promote", {"version": 2}))[0] == 404
    assert (await server.post("/v1/adapters/bank/promote", {"version": 9}))[0] == 404
    assert (await server.post("/v1/adapters/none/rollback", {}))[0] == 404


async def test_A9_of_two_promotions_at_once_one_wins(server: Running) -> None:
    await publish(server, 3)
    seen = (await aliases(server))["revision"]
    answers = await asyncio.gather(
        *(server.post("/v1/adapters/bank/promote", {"version": v, "revision": seen}) for v in (2, 3))
    )
    assert sorted(status for status, _, _ in answers) == [200, 409]
    won = next(told["version"] for status, told, _ in answers if status == 200)
    assert await aliases(server) == {"version": won, "revision": seen + 1}
    status, told, _ = await server.post("/v1/adapters/bank/rollback", {"revision": seen})
    assert (status, told["error"]["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    "body", [{}, {"version": 0}, {"version": True}, {"version": "1"}, {"version": 1, "revision": -1}]
)
async def test_a_promotion_names_a_version(server: Running, body: dict[str, Any]) -> None:
    assert (await server.post("/v1/adapters/bank/promote", body))[0] == 400


async def test_only_an_admin_changes_what_a_name_means(server: Running) -> None:
    server.keys().create("root", ["use", "admin"])
    user = f"Bearer {server.keys().create('user')['key']}"
    for verb in ("promote", "rollback", "retire"):
        status, told, _ = await server.post(f"/v1/adapters/bank/{verb}", {"version": 1}, authorization=user)
        assert (status, told["error"]["code"]) == (403, "permission_denied")


@pytest.mark.parametrize(
    ("name", "content", "kind", "rows"),
    [
        ("train.jsonl", chat_rows(40) + b"no json\n", "chat", 41),
        ("train.json", json.dumps(PAIRS).encode(), "preference", 40),
        ("a <b>.md", DOCUMENT, "text", 1),
    ],
)  # fmt: skip
async def test_an_upload_says_what_it_holds(server: Running, name: str, content: bytes, kind: str, rows: int) -> None:
    file = await server.client().files.create(file=(name, content), purpose="fine-tune")
    status, found, _ = await server.get(f"/v1/files/{file.id}/check")
    assert status == 200, found
    assert (found["kind"], found["counts"]["rows"]) == (kind, rows)
    assert len(found["complaints"]) == found["counts"]["bad"]


async def test_an_upload_without_rows_says_so(server: Running) -> None:
    file = await server.client().files.create(file=("x.jsonl", b"\n\n"), purpose="fine-tune")
    status, told, _ = await server.get(f"/v1/files/{file.id}/check")
    assert (status, told["error"]["code"]) == (400, "invalid_data")
    assert (await server.get("/v1/files/file-unknown/check"))[0] == 404
