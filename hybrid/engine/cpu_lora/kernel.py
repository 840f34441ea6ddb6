"""The compiled kernel for a few rows: made once with this machine's own compiler, and never required.

The gateway makes it before it starts the engine, and the engine's processes find its path in their environment.
Whatever is missing (a compiler, OpenMP, the file), the products of PyTorch do the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("vllm.hybrid.cpu_lora")
making = logging.getLogger("hybrid.engine")

#: where the engine's processes find the kernel
VARIABLE = "HYBRID_LORA_KERNEL"
SOURCE = Path(__file__).with_name("few.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
PATIENCE_S = 120

#: (layer, step, x, its row stride, y, its row stride, scale); the first three and y are addresses
Few = Callable[[int, int, int, int, int, int, float], None]


def build(cache: Path) -> Path | None:
    """The kernel's file in `cache`, made if it is not there; None where this machine cannot make it. Blocks."""
    recipe = SOURCE.read_bytes() + " ".join((*FLAGS, _processor())).encode()
    made = cache / "kernels" / f"lora-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    if made.is_file():
        return made
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        making.info("no C++ compiler: adapters are computed by PyTorch alone")
        return None
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            fresh = Path(folder) / made.name
            argv = [compiler, *FLAGS, "-o", str(fresh), str(SOURCE)]
            subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE_S)
            fresh.replace(made)
    except (OSError, subprocess.SubprocessError) as error:
        making.warning("the adapters' kernel could not be compiled (%s): PyTorch computes them alone", error)
        return None
    return made


def load(path: Path | None) -> Few | None:
    """The kernel's function; None without a file that this process can load."""
    if path is None:
        return None
    try:
        few = ctypes.PyDLL(str(path)).hybrid_lora_few
    except (OSError, AttributeError) as error:
        log.warning("the adapters' kernel cannot be loaded (%s): PyTorch computes them alone", error)
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    few.argtypes = (address, address, address, number, address, number, ctypes.c_float)
    few.restype = None
    return few


def given() -> Path | None:
    """The file that the gateway named for this process."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {told}"
