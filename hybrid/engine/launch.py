"""How the engine's processes start, and why none of them outlives its parent.

    python -m hybrid.engine.launch MODULE [FLAGS…]

Runs MODULE as a program in a process that the kernel kills when its parent dies (PR_SET_PDEATHSIG). vLLM starts
processes of its own, and calls `die_with_parent` in each (entry-point group `vllm.general_plugins`), so that a
`kill -9` of the gateway, or of vLLM's API server, leaves nothing behind. Linux only; elsewhere the next start finds
what was left by `.hybrid/engine.json`.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import runpy
import signal
import sys

#: set for our children alone: the pid of the process that started them
MARK = "HYBRID_ENGINE_CHILD"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ties this process to its parent, if it belongs to an engine that we started; does nothing in any other."""
    if MARK in os.environ:
        parent = multiprocessing.parent_process()
        _tie(parent.pid if parent else None)


def _tie(expected: int | None) -> None:
    """Asks the kernel for SIGKILL when the parent dies; exits if the parent `expected` is dead already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if expected is not None and os.getppid() != expected:
        os._exit(1)


def main(argv: list[str]) -> None:
    """Runs `argv[0]` as `python -m` would, with the rest as its arguments.

    `sys.modules["__main__"]` stays this file: each process that vLLM spawns imports its parent's main module first,
    and this one is light.
    """
    _tie(int(os.environ[MARK]) if MARK in os.environ else None)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__")


if __name__ in ("__main__", "__mp_main__"):
    # importing torch and vLLM makes millions of objects that stay: collecting them again and again took a quarter of
    # the time of each of vLLM's three starts
    gc.set_threshold(100_000, 50, 100)

if __name__ == "__main__":
    main(sys.argv[1:])
