"""The process in which files are parsed: little memory, little time, no network, no writing, no other program.

Says `{"ready": true}`, then reads one JSON line `{"file", "suffix", "name"}` a file from stdin and answers with a JSON
line for every part or faulty row, and `{"end": null}` or `{"end": "what is wrong"}`. Started by `parser.py`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybrid.knowledge.parse import Part, parse

#: audit events that no parser has a reason to raise (PEP 578)
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename")
_WRITES = frozenset("wax+")


def main() -> None:
    """Serves until stdin ends. Arguments: bytes of memory, seconds of processor time a file."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    confine(memory)
    _tell({"ready": True})
    for line in sys.stdin.buffer:
        _allow_cpu(seconds)
        _tell({"end": _one(json.loads(line))})


def confine(memory: int) -> None:
    """Takes from this process, for good, what a parser has no use for; `memory` is in bytes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_forbid)


def _one(order: dict[str, str]) -> str | None:
    """Tells the parts of one file; returns what is wrong with it."""
    try:
        for found in parse(Path(order["file"]), order["suffix"], order["name"]):
            _tell({"part" if isinstance(found, Part) else "fault": asdict(found)})
    except MemoryError:
        return "memory"
    except RecursionError:
        return "it is nested too deep"
    except Exception as error:  # a parser may raise anything, and the next file is waiting
        return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return None


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n")
    sys.stdout.buffer.flush()


def _allow_cpu(seconds: int) -> None:
    """A file that the parent no longer watches ends too: the limit counts from now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _forbid(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN) or (event == "open" and _writes(args[1], args[2])):
        raise PermissionError(f"a parser may not do this: {event}")


def _writes(mode: object, flags: object) -> bool:
    """Whether a file is opened for more than reading, by its mode or, without one, by its flags."""
    if isinstance(mode, str):
        return bool(_WRITES & set(mode))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


if __name__ == "__main__":
    main()
