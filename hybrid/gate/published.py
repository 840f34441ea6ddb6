"""Gates that outcomes taught: `adapters/<name>/<n>/` holds `gate.safetensors` and `card.json`, whose `kind` is "gate".

`live.json` beside the versions says which of them answers under the bare name, and which did before.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from hybrid.adapters.listing import GATE_WEIGHTS, numbers_in
from hybrid.errors import BadRequest, Conflict, NotFound, Refused
from hybrid.gate.bandit import Bandit
from hybrid.gate.learned import Learned
from hybrid.rooms import CARD, Home, check_name, publish, sha256_file, write_json
from hybrid.types import JSON

#: the name whose taught gate serves
GATE = "gate"
#: the name under which what feedback taught is kept, with versions of its own
FEEDBACK = "gate-feedback"
_FILE = GATE_WEIGHTS
_LIVE = "live.json"


def publish_learned(home: Home, name: str, learned: Learned, embedder: str, facts: JSON) -> int:
    """Publishes a taught gate as the next version of `name` and returns its number; what is live stays live.

    `embedder` is the digest of what embedded its queries, `facts` go on the card. Raises Refused for a bad name, or
    one that adapters have.
    """
    if name != GATE:
        check_name(name, "gate")
    if any(card.get("kind") != GATE for card in _cards(home, name).values()) and name != GATE:
        raise Refused(f"{name!r} is the name of an adapter; give the gate another one.", param="name")
    told = {"model": learned.kind, "arms": list(learned.arms)}
    return _publish(home, name, learned.tensors(), embedder, {**facts, **told})


def publish_bandit(home: Home, bandit: Bandit, embedder: str, facts: JSON) -> int:
    """Publishes what feedback taught as the next version of `FEEDBACK` and returns its number; what is live stays."""
    told = {"model": "feedback", "arms": list(bandit.arms)}
    return _publish(home, FEEDBACK, bandit.tensors(), embedder, {**facts, **told})


def load_bandit(home: Home, embedder: str) -> Bandit | None:
    """What feedback taught, in its live version; None where there is none. Raises what `load_learned` raises."""
    number = live_version(home, FEEDBACK)
    return None if number is None else Bandit.load(_read(home, FEEDBACK, number, embedder)[0])


def _publish(home: Home, name: str, tensors: Mapping[str, npt.NDArray[Any]], embedder: str, facts: JSON) -> int:
    from safetensors.numpy import save_file

    with _numbered(home, name) as version, publish(home.adapters / name / str(version)) as staging:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, staging / _FILE)
        card = {
            "name": name,
            "version": version,
            "kind": GATE,
            "created": int(time.time()),
            "embedder": embedder,
            "weights": _FILE,
            "sha256": sha256_file(staging / _FILE),
        }
        write_json(staging / CARD, {**facts, **card})
    return version


def learned_versions(home: Home, name: str = GATE) -> list[int]:
    """The published versions of a taught gate, oldest first."""
    return [number for number, card in _cards(home, name).items() if card.get("kind") == GATE]


def live_version(home: Home, name: str = GATE) -> int | None:
    """The version that the bare name means; None where none was promoted."""
    line = _line(home, name)
    return line[-1] if line else None


def serving_version(spec: str) -> int | None:
    """The version that `gate@V` names; None for the live one. Raises BadRequest for any other name."""
    name, at, number = spec.partition("@")
    if name != GATE or (at and not number.isdecimal()):
        raise BadRequest(f"{spec[:80]!r} is not the gate that serves; write {GATE} or {GATE}@VERSION.", param="gate")
    return int(number) if at else None


def load_learned(
    home: Home, name: str = GATE, version: int | None = None, embedder: str = ""
) -> tuple[Learned, JSON] | None:
    """A taught gate and its card: a version, or the live one; None where none is live.

    Raises NotFound for a version that is not published, Refused when its file was changed or another embedder's
    digest than `embedder` is on the card.
    """
    number = live_version(home, name) if version is None else version
    if number is None:
        return None
    tensors, card = _read(home, name, number, embedder)
    return Learned.load(tensors), card


def _read(home: Home, name: str, number: int, embedder: str) -> tuple[dict[str, npt.NDArray[Any]], JSON]:
    """The tensors of a version and its card. Raises what `load_learned` raises."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    card = learned_card(home, name, number)
    if card.get("embedder") != embedder:
        raise Refused(f"{name}@{number} was taught with another embedder. Teach a new gate.", param="gate")
    try:
        content = (home.adapters / name / str(number) / _FILE).read_bytes()
        if card.get("sha256") != hashlib.sha256(content).hexdigest():
            raise Refused(f"{name}@{number} is not the file that was published. Teach a new gate.", param="gate")
        return load(content), card
    except (OSError, SafetensorError) as error:
        raise Refused(f"{name}@{number} cannot be read ({error}). Teach a new gate.", param="gate") from error


def learned_card(home: Home, name: str, version: int) -> JSON:
    """The card of a version of a taught gate. Raises NotFound."""
    cards = {number: card for number, card in _cards(home, name).items() if card.get("kind") == GATE}
    if version not in cards:
        known = ", ".join(map(str, cards)) or "none"
        raise NotFound(f"There is no taught gate {name}@{version}; published versions: {known}.", param="gate")
    return cards[version]


def promote(home: Home, name: str, version: int) -> None:
    """Lets the bare name mean `version`. Raises NotFound for one that is not published."""
    learned_card(home, name, version)
    with _locked(home, name):
        line = _line(home, name)
        if line[-1:] != [version]:
            write_json(home.adapters / name / _LIVE, {"line": [*line, version]})


def rollback(home: Home, name: str = GATE) -> int:
    """Lets the bare name mean the version that it meant before, and returns it. Raises Conflict where there is none."""
    with _locked(home, name):
        line = _line(home, name)
        if len(line) < 2:
            raise Conflict(f"{name[:80]!r} has no earlier taught gate to go back to; promote one by its number.")
        write_json(home.adapters / name / _LIVE, {"line": line[:-1]})
        return line[-2]


def _line(home: Home, name: str) -> list[int]:
    """The versions that the bare name meant, in order; the last is live."""
    try:
        line = json.loads((home.adapters / name / _LIVE).read_text(encoding="utf-8"))["line"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"adapters/{name}/{_LIVE} cannot be read ({error}); promote a gate by its number.") from error
    published = set(learned_versions(home, name))
    return [number for number in line if number in published]


def _cards(home: Home, name: str) -> dict[int, JSON]:
    """Every published version of a name with its card, oldest first; {} for a card that cannot be read."""
    cards: dict[int, JSON] = {}
    for number in sorted(numbers_in(home.adapters / name)):
        path = home.adapters / name / str(number) / CARD
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            card = {}
        cards[number] = card if isinstance(card, dict) else {}
    return cards


@contextmanager
def _locked(home: Home, name: str) -> Iterator[None]:
    """One change of a name's gates at a time, over all processes."""
    lock = home.hidden / "locks" / f"gate-{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


@contextmanager
def _numbered(home: Home, name: str) -> Iterator[int]:
    """The next number of a name, which no other process takes meanwhile."""
    with _locked(home, name):
        yield max(numbers_in(home.adapters / name), default=0) + 1
