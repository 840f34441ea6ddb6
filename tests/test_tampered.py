"""What was changed behind our back is refused and never run (row S11): files of an index, of adapters and of a gate."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from adapters_kit import filling
from server_kit import chat, make_home, running, until

from hybrid.adapters.preflight import read_base
from hybrid.errors import Refused
from hybrid.gate.bandit import Bandit
from hybrid.gate.published import FEEDBACK, load_bandit, promote, publish_bandit
from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.search import Library
from hybrid.rooms import Home, sha256_file, write_json
from hybrid.settings import RetrievalSettings

FACTS = {
    "ferry": "The ferry to Osterholm leaves at seven in the morning.",
    "bakery": "Loaves of rye come out of the oven in Mill Lane on Tuesdays.",
    "clock": "The clock tower runs slow because a stork nests on its hand.",
}

Harm = Callable[[Path], None]


class Trap:
    """Unpickled, it leaves a mark in the working directory."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("trapped",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "trapped").exists()


def trapped(path: Path) -> None:
    """Numbers that are a pickle."""
    with path.open("wb") as file:
        np.save(file, np.array([Trap()], object), allow_pickle=True)


def grown(path: Path) -> None:
    """An index whose header declares vectors of a billion numbers."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4, 1 << 30)
    path.write_bytes(bytes(content))


def of_another_width(path: Path) -> None:
    index = faiss.IndexFlatIP(8)
    index.add(np.ones((len(FACTS), 8), np.float32))
    faiss.write_index(index, str(path))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def sealed(generation: Path, store: Path) -> None:
    """As one who can write everywhere: every sum is that of what lies there now."""
    told = json.loads((generation / "manifest.json").read_text())
    for name, fact in told["files"].items():
        path = generation / name
        fact |= {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(generation / "manifest.json", told)
    with contextlib.closing(sqlite3.connect(store)) as truth, truth:
        truth.execute("UPDATE meta SET manifest = ?", [sha256_file(generation / "manifest.json")])


def answers(library: Library) -> list[list[tuple[str, str]]]:
    return [[(p.id, p.text) for p in library.search("town", question, 3)] for question in FACTS.values()]


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> Path:
    """A home with one corpus."""
    root = tmp_path_factory.mktemp("town")
    (root / "facts").mkdir()
    rows = [{"id": name, "title": "", "text": text} for name, text in FACTS.items()]
    (root / "facts" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    library = Library(Home(root / "home"), embedder, RetrievalSettings())
    library.ingest("town", root / "facts")
    library.close()
    return root / "home"


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("vectors.rows.npy", trapped),
        ("words/0/words.rows.npy", trapped),
        ("words/0/data.csc.index.npy", trapped),
        ("vectors.faiss", grown),
        ("vectors.faiss", of_another_width),
        ("docstore.pkl", trapped),
    ],
)
def test_S11_a_changed_index_is_built_again_from_the_store(
    town: Path, tmp_path: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, file: str, harm: Harm, seal: bool
) -> None:
    home = shutil.copytree(town, tmp_path / "home")
    generation = home / "index" / "town" / "generations" / "1"
    stranger = not (generation / file).exists()
    harm(generation / file)
    if seal:
        sealed(generation, home / "index" / "town" / "store.db")
    opened: list[str] = []
    read_index = faiss.read_index
    monkeypatch.setattr(faiss, "read_index", lambda path: opened.append(sha256_file(Path(path))) or read_index(path))
    untouched = Library(Home(town), embedder, RetrievalSettings())
    library = Library(Home(home), embedder, RetrievalSettings())
    with contextlib.closing(library), contextlib.closing(untouched):
        assert answers(library) == answers(untouched)
        # a file that nobody published is no part of the generation: it is never looked at
        assert library.corpus("town").generation == (1 if stranger else 2)
    if not seal and not stranger:
        assert sha256_file(generation / file) not in opened


async def test_S11_an_adapter_that_was_changed_after_its_checks_is_not_loaded_again(tmp_path: Path) -> None:
    async with running(make_home(tmp_path)) as server:
        gateway, base = server.gateway, read_base(Path(server.settings.model))
        for name in ("bank", "voice"):
            gateway.store.publish(name, filling(base))
            await gateway.loader.load_now(f"{name}@1")
        weights = gateway.store.resolve("bank").ref.path / "adapter_model.safetensors"
        whole = weights.read_bytes()
        flipped(weights)
        os.kill(gateway.engine.status().pids[0], signal.SIGKILL)
        await until(lambda: gateway.engine.status().restarts == 1 and gateway.ready()[0])
        assert "bank@1" in gateway.engine.status().detail

        async def ask(name: str) -> tuple[int, str]:
            status, body, _ = await server.post("/v1/chat/completions", chat("hello", model=name))
            return status, body.get("error", {}).get("message", "")

        assert await ask("voice") == (200, "")
        status, message = await ask("bank")
        assert (status, "not those that were published" in message) == (422, True)
        weights.write_bytes(whole)

        async def is_back() -> bool:
            return (await ask("bank"))[0] == 200

        await until(is_back)


def pickled(content: bytes) -> bytes:
    path = Path("pickle.npy")
    trapped(path)
    return path.read_bytes()


def huge(content: bytes) -> bytes:
    """A header that declares a tensor of a billion rows."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["mean"]["shape"] = [1 << 30, 1 << 30]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.mark.parametrize("seal", [False, True])
@pytest.mark.parametrize("harm", [pickled, huge, lambda content: content[:-4] + b"\xff\xff\xff\x7f", lambda _: b""])
def test_S11_a_changed_gate_is_refused(tmp_path: Path, harm: Callable[[bytes], bytes], seal: bool) -> None:
    home, zeros = Home(tmp_path), np.zeros
    taught = Bandit(("prompt",), zeros(8, np.float32), zeros((2, 8), np.float32), zeros((1, 3)), zeros((1, 3, 3)), 0.5)
    promote(home, FEEDBACK, publish_bandit(home, taught, "e5", {}))
    folder = tmp_path / "adapters" / FEEDBACK / "1"
    content = (folder / "gate.safetensors").read_bytes()
    (folder / "gate.safetensors").write_bytes(harm(content))
    if seal:
        card = json.loads((folder / "card.json").read_text())
        write_json(folder / "card.json", card | {"sha256": sha256_file(folder / "gate.safetensors")})
    with pytest.raises(Refused):
        load_bandit(home, "e5")
    (folder / "gate.safetensors").write_bytes(content)
    write_json(folder / "card.json", {**json.loads((folder / "card.json").read_text()), "embedder": "another"})
    with pytest.raises(Refused, match="another embedder"):
        load_bandit(home, "e5")


def test_S11_a_gate_of_another_width_is_refused() -> None:
    zeros = np.zeros
    tensors = Bandit(("prompt",), zeros(8, np.float32), zeros((2, 9), np.float32), zeros((1, 3)), zeros((1, 3, 3)), 0.5)
    with pytest.raises(Refused, match="not whole"):
        Bandit.load(tensors.tensors())
