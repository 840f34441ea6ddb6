"""What a published version can be, and how each kind is served: only a LoRA ever goes to the engine.

A card's `kind` says what its folder holds. A version of another kind is checked as far as files go, becomes a
candidate, and says in its reason how it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid.adapters.heads import HEAD_WEIGHTS, read_head
from hybrid.adapters.preflight import WEIGHTS, BaseFacts, check_base, check_files
from hybrid.adapters.tensors import check_finite, read_header
from hybrid.errors import Refused
from hybrid.rooms import sha256_file

LORA, HEAD = "lora", "head"
#: kind → (what it is in words, how it is served where the card does not say; `{name}` and `{path}` are filled in)
OTHERS: Mapping[str, tuple[str, str]] = {
    HEAD: ("a head", "ask for head:{name}"),
    "weights": ("a whole model", "serve it by an engine of its own: HYBRID_MODEL={path}"),
    "peft": ("of a kind that the engine cannot load", "it was trained and measured, and is not served"),
    "prompt": ("an instruction", "put it before the question"),
}


def kind_of(card: Mapping[str, Any]) -> str:
    """What the card says its folder holds; a LoRA where it says nothing."""
    return str(card.get("kind", LORA))


def is_reward(card: Mapping[str, Any]) -> bool:
    """Whether the card is that of a reward model: no engine loads it, and it rates what the engine's answers are."""
    return kind_of(card) == "peft" and card.get("method") == "reward"


def serve_with(card: Mapping[str, Any], path: Path) -> str:
    """How a version that is no LoRA is served: the card's own words, or those of its kind."""
    said = card.get("serve_with")
    if isinstance(said, str) and said:
        return said
    how = OTHERS.get(kind_of(card), ("", "it is not served"))[1]
    return how.format(name=path.parent.name, path=path)


def weights_of(card: Mapping[str, Any]) -> str:
    """The file that the card's hash is of, relative to the folder. Raises Refused unless it stays inside."""
    name = card.get("weights", WEIGHTS) if kind_of(card) != LORA else WEIGHTS
    parts = Path(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or Path(name).is_absolute() or str(Path(name)) != name:
        raise Refused(f"the card's weights are {str(name)[:80]!r}; name a file of the folder itself.")
    return str(name)


def check_other(folder: Path, card: Mapping[str, Any], base: BaseFacts) -> None:
    """Raises Refused unless a version that is no LoRA is whole, sound and, where it says so, made for this base."""
    kind = kind_of(card)
    if kind not in OTHERS:
        raise Refused(f"there is no kind {kind[:40]!r}; a card's kind is one of {', '.join((LORA, *OTHERS))}.")
    name = weights_of(card)
    try:
        check_files(folder, name)
        check_base(card, base)
        if kind != "prompt":
            _check_tensors(folder, name)
        if kind == HEAD:
            _check_head(folder, name)
        if card.get("sha256") != sha256_file(folder / name):
            raise Refused(f"{name} is not the file its card was written for; publish it again.")
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror}); check its files and permissions.") from error


def _check_head(folder: Path, name: str) -> None:
    if name != HEAD_WEIGHTS:
        raise Refused(f"a head's weights are {HEAD_WEIGHTS}, its card names {name!r}; train it again.")
    read_head(folder)


def _check_tensors(folder: Path, name: str) -> None:
    """Every safetensors file is whole, and the named one is one of them and holds numbers only."""
    if not name.endswith(".safetensors"):
        raise Refused(f"{name!r} is no safetensors file; save the weights as safetensors.")
    headers = {str(file.relative_to(folder)): read_header(file) for file in sorted(folder.rglob("*.safetensors"))}
    check_finite(folder / name, headers[name])
