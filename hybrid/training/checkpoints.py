"""Checkpoints of a run: whole or not there.

A checkpoint is a folder `step-00000123/` with tensors and a state file that holds their hash. It is staged, flushed and
renamed, so a kill leaves the one before it; a damaged one is passed over. The newest two are kept.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid.errors import SetupError
from hybrid.rooms import publish, sha256_file, write_json

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("hybrid.training")
TENSORS, STATE = "tensors.safetensors", "state.json"
KEPT = 2
_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete checkpoint, read: `tensors` by name, `state` as it was saved."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class Checkpoints:
    """The checkpoints below one working folder; without a folder nothing is kept and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            for left in folder.glob(".staging-*"):  # of a run that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)

    @property
    def kept(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path | None:
        """Writes the checkpoint of a step and forgets the third last. Raises SetupError when the disk is full."""
        if self._folder is None:
            return None
        target = self._folder / f"step-{step:08d}"
        try:
            shutil.rmtree(target, ignore_errors=True)  # one that was found damaged
            with publish(target) as staging:
                _write(staging, tensors, state)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
                raise
            raise SetupError(
                f"The checkpoint of step {step} cannot be written ({error.strerror}): free space in {self._folder}, "
                "then run the same command again; it goes on from the checkpoint before."
            ) from error
        for old in self._folders()[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole."""
        for folder in reversed(self._folders()):
            found = _read(folder)
            if found is not None:
                return found
            log.warning("%s is damaged and passed over.", folder)
        return None

    def clear(self) -> None:
        """Removes them all: what they led to is published."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if _FOLDER.fullmatch(path.name))


def _write(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, folder / TENSORS)
    except SafetensorError as error:  # it tells a full disk in words only
        raise OSError(errno.ENOSPC, str(error)) from error
    write_json(folder / STATE, {**state, "sha256": sha256_file(folder / TENSORS)})


def _read(folder: Path) -> Checkpoint | None:
    from safetensors.torch import load

    try:
        state = json.loads((folder / STATE).read_bytes())
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict) or hashlib.sha256(data).hexdigest() != state.get("sha256"):
        return None
    return Checkpoint(int(folder.name.removeprefix("step-")), load(data), state)
