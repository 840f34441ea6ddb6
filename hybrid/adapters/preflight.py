"""Preflight: everything that can be known of an adapter without an engine. A refusal costs milliseconds and no GPU.

vLLM accepts an adapter for another base with 200 and answers garbage, or changes nothing: it never compares the base
and skips modules it does not find. So names, shapes, numbers and hashes are compared here, before it sees the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.adapters import lora_config
from hybrid.adapters.tensors import Tensor, check_finite, read_header
from hybrid.errors import Refused, SetupError
from hybrid.rooms import CARD, sha256_file

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PICKLES = frozenset([".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"])
MAX_CARD_BYTES = 4 << 20

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
#: rewritten whenever a model is saved, without a meaning for its weights
_VOLATILE = frozenset(["_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype"])


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base model as preflight sees it.

    `shapes` gives each linear layer by its module path, as (outputs, inputs). `sha256` is that of the weights, empty
    where it is not known; `config_sha256` that of the config's meaning.
    """

    model_type: str
    shapes: Mapping[str, tuple[int, int]]
    sha256: str
    config_sha256: str


def read_base(folder: Path, sha256: str = "") -> BaseFacts:
    """The facts of a model folder, from `config.json` and the headers of its safetensors. Raises SetupError."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        files = sorted(folder.glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
        vocabulary = config.get("vocab_size")
    except (OSError, ValueError, AttributeError, Refused) as error:
        raise SetupError(f"the base model in {folder} cannot be read ({error}); materialise it again.") from error
    shapes = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        # embeddings and the output head have a row a token; what has other than two dimensions is no linear layer
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.shape[0] != vocabulary
    }
    if not shapes:
        raise SetupError(f"the base model in {folder} has no linear layers in safetensors; convert it first.")
    meaning = json.dumps({k: v for k, v in config.items() if k not in _VOLATILE}, sort_keys=True)
    return BaseFacts(str(config.get("model_type")), shapes, sha256, hashlib.sha256(meaning.encode()).hexdigest())


def check(folder: Path, base: BaseFacts, max_rank: int) -> None:
    """Raises Refused, with the reason and what to do, unless the adapter in `folder` fits `base` and is sound."""
    try:
        _check(folder, base, max_rank)
    except OSError as error:
        raise Refused(f"the adapter cannot be read ({error.strerror}); check its files and permissions.") from error


def _check(folder: Path, base: BaseFacts, max_rank: int) -> None:
    check_files(folder)
    config = lora_config.read(folder, max_rank)
    weights = folder / WEIGHTS
    card = read_card(folder) if (folder / CARD).exists() else {}
    check_base(card, base)
    tensors = read_header(weights)
    modules = _check_tensors(tensors, base, config.rank)
    if config.targets:
        _check_coverage(modules, base, config.targets)
    check_finite(weights, tensors)
    if card.get("sha256") not in (None, sha256_file(weights)):
        raise Refused(f"{WEIGHTS} is not the file its card was written for; publish the adapter again.")


def check_files(folder: Path, weights: str = WEIGHTS) -> None:
    """Raises Refused unless the folder holds plain files and folders only, the file `weights` and no pickles."""
    if folder.is_symlink() or not folder.is_dir():
        raise Refused(f"{folder.name!r} is not a folder (links are not followed); give the adapter's own folder.")
    for parent, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            _check_entry(Path(parent, name))
    if not (folder / weights).is_file():
        how = "save the adapter with PEFT's save_pretrained" if weights == WEIGHTS else "publish it again"
        raise Refused(f"{weights} is missing; {how}.")


def _check_entry(path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise Refused(f"{path.name!r} is a symbolic link; copy the file itself into the adapter's folder.")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise Refused(f"{path.name!r} is not a plain file; an adapter's folder holds files only.")
    if path.suffix.lower() in PICKLES:
        raise Refused(f"{path.name!r} is a pickle, which can run code when opened; save safetensors and remove it.")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a published folder. Raises Refused when it is not a JSON object of a sane size."""
    path = folder / CARD
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise Refused(f"{CARD} is larger than {MAX_CARD_BYTES:,} bytes; publish the adapter again.")
        card = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{CARD} is not JSON; publish the adapter again.") from error
    if not isinstance(card, dict):
        raise Refused(f"{CARD} is not a JSON object; publish the adapter again.")
    return card


def check_base(card: Mapping[str, Any], base: BaseFacts) -> None:
    """What a card says of its base must be true of this one; a card may be silent."""
    for key, ours in (("base_sha256", base.sha256), ("base_config_sha256", base.config_sha256)):
        theirs = card.get(key)
        if theirs and ours and theirs != ours:
            raise Refused(
                f"the adapter was trained on another base model (its {key} is {str(theirs)[:12]}…, "
                f"this one's {ours[:12]}…); train it again on this base, or serve the base it was trained on.",
            )


def _check_tensors(tensors: Mapping[str, Tensor], base: BaseFacts, rank: int) -> set[str]:
    """The modules adapted, when every tensor is half of a pair whose shapes fit a linear layer of the base."""
    sides: dict[str, set[str]] = {}
    for key, tensor in tensors.items():
        module, side = _parse_key(key)
        shape = base.shapes.get(module)
        if shape is None:
            raise Refused(_no_such_module(module, base.shapes))
        expected = (rank, shape[1]) if side == "A" else (shape[0], rank)
        if tensor.shape != expected:
            raise Refused(
                f"lora_{side} of {module} has shape {list(tensor.shape)}, this base at rank {rank} needs "
                f"{list(expected)}; the adapter was trained on a model of another width or rank. Train it on this base."
            )
        sides.setdefault(module, set()).add(side)
    if not sides:
        raise Refused(f"{WEIGHTS} holds no tensors; save the adapter again.")
    for module, have in sides.items():
        if len(have) < 2:
            raise Refused(f"{module} has lora_{have.pop()} and not its other half; save the adapter again.")
    return set(sides)


def _parse_key(key: str) -> tuple[str, str]:
    if not key.startswith(PREFIX):
        raise Refused(f"tensor {key[:120]!r} does not begin with {PREFIX!r}; save the adapter with PEFT's own tools.")
    match = _KEY.fullmatch(key[len(PREFIX) :])
    if match is None:
        raise Refused(f"tensor {key[:120]!r} is not a lora_A or lora_B weight; train a plain LoRA on linear layers.")
    return match["module"], match["side"]


def _no_such_module(module: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    """Why the base lacks `module`: too few layers, or another architecture."""
    shown = module[:120]
    here = _LAYER.sub("*", module)
    alike = [m for m in shapes if _LAYER.sub("*", m) == here]
    if alike:
        return (
            f"this base has no {shown}: it has {len(alike)} layers of that kind, and the adapter was trained on a "
            "deeper model. Train it on this base."
        )
    return (
        f"this base has no linear layer {shown}; the adapter was trained on another architecture, with a renamed "
        "prefix, or on embeddings. Train it on this base's linear layers."
    )


def _check_coverage(modules: Collection[str], base: BaseFacts, targets: Collection[str]) -> None:
    """PEFT adapts every module that a target names: where some stay untouched, the adapter's base had fewer layers."""
    for module in base.shapes:
        if module not in modules and any(module == t or module.endswith(f".{t}") for t in targets):
            raise Refused(
                f"the adapter has no weights for {module}, which its target_modules name; "
                "it was trained on a shallower model. Train it on this base, or set layers_to_transform."
            )
