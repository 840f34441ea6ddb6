"""Copies a stranger's PEFT folder: only the files that serve, only as plain files, only up to a size."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from hybrid.adapters.lora_config import CONFIG, MAX_CONFIG_BYTES
from hybrid.adapters.preflight import WEIGHTS, check_files
from hybrid.errors import Refused

#: what is taken → how many bytes it may have
TAKEN: Mapping[str, int] = {
    CONFIG: MAX_CONFIG_BYTES,
    WEIGHTS: 4 << 30,
    "README.md": 1 << 20,
    "examples.jsonl": 256 << 20,
    "examples.safetensors": 256 << 20,
}


def copy_adapter(source: Path, target: Path) -> None:
    """Copies what serves of `source` into the existing folder `target`. Raises Refused with the reason."""
    if not os.path.lexists(source):
        raise Refused(f"there is no folder {str(source)[:200]!r}; give the folder that PEFT saved.", param="lora_path")
    check_files(source)
    for name, limit in TAKEN.items():
        if os.path.lexists(source / name):
            _copy(source / name, target / name, limit)


def _copy(source: Path, target: Path, limit: int) -> None:
    """Opens without following a link or waiting for a pipe, since the folder may change after it was looked at."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Refused(f"{source.name!r} cannot be read ({error.strerror}); check its permissions.") from error
    with os.fdopen(fd, "rb") as reader, target.open("xb") as writer:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Refused(f"{source.name!r} is not a plain file; copy the file itself into the adapter's folder.")
        left = limit
        while piece := reader.read(1 << 20):
            left -= len(piece)
            if left < 0:
                raise Refused(f"{source.name!r} is larger than {limit:,} bytes, the most that is taken.")
            writer.write(piece)
