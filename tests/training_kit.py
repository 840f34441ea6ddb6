"""What the tests of training share: a task that a tiny model learns, and two processes on one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = ("red", "green", "blue", "grey")


def write_colours(folder: Path, **splits: tuple[int, int]) -> Path:
    """Questions whose answers can be learned, the colour that each names: `split=(first number, how many)`."""
    for split, (start, count) in splits.items():
        rows = [
            {"id": f"{split}{n}", "input": f"item {n} is {COLOURS[n % 4]}" + "!" * (n % 5), "reference": COLOURS[n % 4]}
            for n in range(start, start + count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def two_processes(*program: str) -> list[str]:
    """The command that runs a program, or `-m` a module, as two processes; on CPUs too, whatever the flag says."""
    argv = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    argv += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*argv, *program]
