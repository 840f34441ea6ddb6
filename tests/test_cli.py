"""What every command has in common: its exit codes, and that a mistake is one sentence and no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hybrid.cli", *args], cwd=home, capture_output=True, text=True)


@pytest.mark.parametrize(
    "args",
    [("adapters", "show"), ("eval", "nowhere"), ("train", "x", "--no-such-option"), ("nothing",), ("keys", "revoke")],
    ids=" ".join,
)
def test_a_command_used_wrongly_says_how_it_is_used_and_exits_2(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = run(tmp_path, *args)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    assert not done.stdout


def test_what_fails_is_one_sentence_and_exits_1(tmp_path: Path) -> None:
    done = run(tmp_path, "adapters", "rollback", "nobody")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
