"""What the room `adapters/` holds, as readers see it: one immutable listing of versions and aliases."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid.adapters.kinds import HEAD, LORA, OTHERS, kind_of, serve_with
from hybrid.adapters.preflight import read_card
from hybrid.engine import AdapterRef
from hybrid.errors import ModelNotFound, Refused
from hybrid.rooms import CARD, check_name

#: not yet decided; a crash in the middle leaves one of these, and the checks start again
PENDING = ("staged", "preflight", "loaded", "canary")
#: passed every check and may answer
SERVABLE = ("candidate", "live", "draining")

#: the name of all mixes, which nothing else can have: each is a version of it, and its card says what it mixes
MIX = "mix"

#: the file of a gate: a folder that holds it is no adapter, whatever its name
GATE_WEIGHTS = "gate.safetensors"

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One published version: what it is (`ref`, `card`), where it is in its life (`state`) and why (`reason`)."""

    ref: AdapterRef
    card: Mapping[str, Any]
    state: str
    reason: str = ""

    @property
    def name(self) -> str:
        return self.ref.name

    @property
    def version(self) -> int:
        return self.ref.version

    @property
    def id(self) -> str:
        """`name@version`."""
        return self.ref.id

    @property
    def kind(self) -> str:
        """What it is: "lora", the one kind that the engine loads, or "head", "weights", "peft", "prompt"."""
        return kind_of(self.card)

    @property
    def serve_with(self) -> str:
        """How it is asked for."""
        return self.id if self.kind == LORA else serve_with(self.card, self.ref.path)

    @property
    def refusal(self) -> str:
        """Why it is no `model`, for one that the engine does not load."""
        what = OTHERS.get(self.kind, ("no adapter", ""))[0]
        return f"{self.id} is {what}; {self.serve_with.rstrip('.')}."

    @property
    def tuned_as(self) -> str:
        """The `ft:…` name that its fine-tuning job gave it, or ""."""
        name = self.card.get("fine_tuned_model")
        return name if isinstance(name, str) and name.startswith("ft:") else ""

    @property
    def created(self) -> float:
        """Seconds since the epoch, as the card says."""
        value = self.card.get("created")
        return float(value) if isinstance(value, int | float) else 0.0


def in_service(version: AdapterVersion) -> AdapterVersion:
    """The version, where it answers or still may come to. Raises ModelNotFound for a refused or a retired one."""
    if version.state == "rejected":
        raise ModelNotFound(f"{version.id} was refused and is not served: {version.reason}", param="model")
    if version.state == "retired":
        raise ModelNotFound(f"{version.id} is retired; use another version of it.", param="model")
    return version


@dataclass(frozen=True, slots=True)
class Alias:
    """What a bare name means, and how often that has changed."""

    version: int
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """Every published version by name and number, and the aliases; replaced whole, never changed."""

    versions: Mapping[str, Mapping[int, AdapterVersion]] = field(default_factory=dict)
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    #: the `ft:…` name that a fine-tuning job gave its version → that version
    tuned: Mapping[str, AdapterVersion] = field(default_factory=dict)

    def resolve(self, spec: str) -> AdapterVersion:
        """The version that `name`, `name@3` or `ft:…` means, in whatever state. Raises ModelNotFound."""
        if spec in self.tuned:
            return self.tuned[spec]
        name, at, number = spec.partition("@")
        numbered = self.versions.get(name, {})
        if not numbered:
            raise ModelNotFound(f"There is no adapter {spec[:80]!r}; /v1/models lists what there is.", param="model")
        if not at:
            alias = self.aliases.get(name)
            if alias is None or alias.version not in numbered:
                raise ModelNotFound(f"No version of {name!r} has passed its checks yet; see /v1/status.", param="model")
            return numbered[alias.version]
        if not _VERSION.fullmatch(number) or int(number) not in numbered:
            raise ModelNotFound(f"{name!r} has no version {number[:20]!r}; see /v1/status.", param="model")
        return numbered[int(number)]

    def model(self, spec: str) -> AdapterVersion:
        """The adapter that `name` or `name@3` means as a model: one that the engine loads. Raises ModelNotFound."""
        numbered = self.versions.get(spec, {})
        if numbered and all(version.kind != LORA for version in numbered.values()):
            raise ModelNotFound(numbered[max(numbered)].refusal, param="model")
        version = self.resolve(spec)
        if version.kind != LORA:
            raise ModelNotFound(version.refusal, param="model")
        return version

    def head(self, spec: str) -> AdapterVersion:
        """The newest head under `name` that may answer, or the one that `name@3` means. Raises ModelNotFound."""
        name, _, number = spec.partition("@")
        heads = [version for version in self.versions.get(name, {}).values() if version.kind == HEAD]
        if number:
            heads = [version for version in heads if str(version.version) == number]
        if not heads:
            raise ModelNotFound(
                f"There is no head {spec[:80]!r}; `hybrid train DIR --set method=head` makes one.", param="model"
            )
        answering = [v for v in heads if v.state in SERVABLE and v.card.get("features", "embedder") == "embedder"]
        if not answering:
            last = max(heads, key=lambda version: version.version)
            why = last.serve_with if last.state in SERVABLE else f"it is {last.state}. {last.reason}".strip()
            raise ModelNotFound(f"{last.id} does not answer: {why}", param="model")
        return max(answering, key=lambda version: version.version)


def names_in(room: Path) -> list[str]:
    """The folders of the room whose names can name an adapter."""
    if not room.is_dir():
        return []
    with os.scandir(room) as entries:
        return [e.name for e in entries if e.is_dir(follow_symlinks=False) and _is_name(e.name)]


def numbers_in(folder: Path) -> list[int]:
    """The numbered folders of one name, published or not."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [int(e.name) for e in entries if _VERSION.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]


def published_in(room: Path) -> list[tuple[str, int]]:
    """(name, version) of every folder of the room that has its card and is no gate."""
    found = ((name, number, room / name / str(number)) for name in names_in(room) for number in numbers_in(room / name))
    return [
        (name, number) for name, number, path in found if (path / CARD).is_file() and not (path / GATE_WEIGHTS).exists()
    ]


def open_version(room: Path, name: str, number: int) -> AdapterVersion:
    """A published folder, as it is seen first: "staged", or "rejected" with the reason when its card is unusable."""
    path = room / name / str(number)
    try:
        card = read_card(path)
        sha256 = card.get("sha256")
        if (card.get("name"), card.get("version")) != (name, number) or not isinstance(sha256, str):
            raise Refused(f"{CARD} does not describe {name}@{number}; publish the adapter through hybrid.")
    except Refused as refusal:
        return AdapterVersion(AdapterRef(name, number, "", path), {}, "rejected", refusal.message)
    return AdapterVersion(AdapterRef(name, number, sha256, path), card, "staged")


def _is_name(name: str) -> bool:
    try:
        return name == MIX or check_name(name) == name
    except Refused:
        return False
