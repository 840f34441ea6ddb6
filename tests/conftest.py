"""What the whole run shares: the data folder, the models, and one real engine behind one real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from library_kit import Open, libraries
from tiny_model import make_tiny_model
from xdist.scheduler import LoadScopeScheduling

from hybrid.knowledge.embed import Embedder
from hybrid.models import ModelFiles, materialise
from hybrid.settings import DEFAULT_EMBEDDER, Settings

if TYPE_CHECKING:
    from objectives_kit import House

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


#: the files whose tests share the one real engine
REAL = {"test_engine.py", "test_readme.py", "test_real.py"}


class OneEngine(LoadScopeScheduling):
    """Keeps the tests of one file on one worker, and all that ask the real engine on the same one."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0].rpartition("/")[2]
        return "real" if name in REAL else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEngine:
    """How `-n` shares tests out."""
    return OneEngine(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Another file that asked the real engine could start a second one."""
    asks = "real_server" in getattr(item, "fixturenames", ())
    assert not asks or item.path.name in REAL, f"{item.nodeid} asks the real engine: name its file in REAL"


@pytest.fixture(scope="session")
def data() -> Path:
    """The real tasks, read where they lie (HYBRID_DATA)."""
    folder = Path(os.environ.get("HYBRID_DATA") or ROOT.parent / "shared" / "data").resolve()
    assert folder.is_dir(), f"{folder} is missing: set HYBRID_DATA to the folder of task folders"
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """A base model that is trained in seconds."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    """The embedder that is served."""
    model = materialise(DEFAULT_EMBEDDER, Settings.load().cache)
    return Embedder(model.path, model.name)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a home that is made when something is put into it."""
    return tmp_path / "home"


@pytest.fixture
def open_library(home: Path, embedder: Embedder) -> Iterator[Open]:
    """Opens libraries of that home."""
    with libraries(home, embedder) as open_:
        yield open_


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A model so small that threads only wait for one another."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def house(tmp_path: Path, tiny: ModelFiles, embedder: Embedder) -> House:
    """A home in which the tiny model is trained."""
    from objectives_kit import House  # torch, which most tests do without

    return House(tmp_path / "home", tiny, embedder)


@pytest.fixture
def bank(data: Path, tmp_path: Path) -> Path:
    """A few rows of a real task with labels."""
    from objectives_kit import sample

    return sample(data, "intent_banking77", tmp_path / "bank")


@dataclass
class Served:
    """A server process with its home."""

    url: str
    home: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def hybrid(self, *args: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Runs a command in this home and returns what it said; a failure shows its words."""
        return hybrid(self.home, *args, timeout=timeout)


def hybrid(home: Path, *args: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Runs `hybrid …` in a home."""
    done = subprocess.run(
        [sys.executable, "-m", "hybrid.cli", *args],
        env={**os.environ, "HYBRID_HOME": str(home), "NO_COLOR": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (
        f"hybrid {' '.join(args)} → {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


GIVEN = {"HYBRID_GATE__DEADLINE_MS": "5000", "HYBRID_TRAINING__MEASURE": "false"}


def start_server(home: Path, *flags: str, timeout_s: float = 300) -> Served:
    """Starts `hybrid serve` in a home on a free port and waits until it is ready.

    The gate is given time: tests ask what it decides, and a shared machine may be slow. Measuring in the background
    would take the engine's time from them.
    """
    log = (home / "serve.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "hybrid.cli", "serve", "--port", "0", *flags],
        env={**os.environ, "HYBRID_HOME": str(home), "NO_COLOR": "1", **GIVEN},
        cwd=home,
        stdout=log,
        stderr=log,
    )
    server_file = home / ".hybrid" / "server.json"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, (home / "serve.log").read_text()[-4000:]
        try:
            url = json.loads(server_file.read_text())["url"]
            with urllib.request.urlopen(url + "/readyz", timeout=5):
                return Served(url, home, process)
        except (OSError, ValueError, KeyError):
            time.sleep(0.3)
    process.kill()
    raise AssertionError(f"not ready after {timeout_s:.0f} s:\n" + (home / "serve.log").read_text()[-4000:])


def stop_server(served: Served) -> int:
    """Stops a server as a supervisor would, and returns its exit code."""
    served.process.terminate()
    return served.process.wait(timeout=60)


@pytest.fixture(scope="session")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The whole product on real vLLM with the real models: one engine for the whole run."""
    home = tmp_path_factory.mktemp("real-home")
    served = start_server(home, "--no-quickstart")
    yield served
    assert stop_server(served) == 0


@pytest.fixture(scope="session")
def server_url(real_server: Served) -> str:
    """Where the README's snippets are sent."""
    return real_server.url
