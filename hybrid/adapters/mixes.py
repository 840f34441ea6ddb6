"""The mixes of a home: each published once as an immutable adapter, found again by its weights, few at a time.

A mix is `mix@N` in `adapters/mix/`, a name that nothing else can have. No list of adapters shows it and the gate does
not know it. It goes through preflight and the canary's first question, whether it changes the engine's answers; that
the engine agrees with PEFT was shown of each member, and the sum of their updates is exact.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.adapters import lora_config
from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.listing import MIX, PENDING, AdapterVersion, in_service
from hybrid.adapters.mix import STEPS, concatenated, padded, quantised, read_factors, write_factors
from hybrid.adapters.store import AdapterStore
from hybrid.engine import Engine
from hybrid.errors import BadRequest, Overloaded, Refused

Members = Sequence[AdapterVersion]


class Mixes:
    """Finds or makes the adapter of a weighted mix. At most `limit` are kept, of rank `max_rank` at most.

    `in_use` tells how many answers an adapter is making now: such a mix is never taken away.
    """

    def __init__(
        self,
        store: AdapterStore,
        loader: HotLoader,
        engine: Engine,
        *,
        max_rank: int,
        limit: int,
        in_use: Callable[[str], int],
    ) -> None:
        self._store = store
        self._loader = loader
        self._engine = engine
        self._max_rank = max_rank
        self._limit = limit
        self._in_use = in_use
        self._clock = itertools.count(1)
        self._used: dict[str, int] = {}
        self._awaited: Counter[str] = Counter()
        self._making = asyncio.Lock()

    def check(self, names: Mapping[str, float]) -> None:
        """Raises ModelNotFound unless every name is that of an adapter."""
        for name in names:
            self._store.model(name)

    async def serve(self, weights: Mapping[str, float]) -> AdapterVersion:
        """The loaded mix of the adapters named (`name` or `name@version`), as they are now.

        Raises ModelNotFound, BadRequest (nothing to mix, too large a rank), Refused, Overloaded, the engine's errors.
        """
        found = [await self._member(name) for name in weights]
        members = {version.id: version for version in found}
        if len(members) < len(found):
            raise BadRequest("The mix names one version twice; give each adapter one weight.", param="model")
        wanted = quantised(dict(zip(members, weights.values(), strict=True)))
        if lost := members.keys() - wanted.keys():
            raise BadRequest(
                f"{min(lost)} has less than one part in {2 * STEPS} of the mix, which is too little to count; "
                "give it more, or leave it out.",
                param="model",
            )
        async with self._making:
            version = self._find(wanted) or await self._make(wanted, [members[id] for id in wanted])
            self._used[version.id] = next(self._clock)
            self._awaited[version.id] += 1
        try:
            return await self._loader.load_now(version.id)
        finally:
            self._awaited[version.id] -= 1

    async def _member(self, name: str) -> AdapterVersion:
        """A member that has passed its checks, going through them now if need be."""
        version = in_service(self._store.model(name))
        if version.name == MIX:
            raise BadRequest(f"{version.id} is a mix itself; name its members.", param="model")
        return await self._loader.load_now(version.id) if version.state in PENDING else version

    def _find(self, wanted: Mapping[str, float]) -> AdapterVersion | None:
        return next((version for version in self._kept() if version.card.get("mix") == wanted), None)

    def _kept(self) -> list[AdapterVersion]:
        return [version for version in self._store.versions(MIX) if version.state != "retired"]

    async def _make(self, wanted: Mapping[str, float], members: Members) -> AdapterVersion:
        self._check_fit(members)
        await self._make_room()
        return await asyncio.to_thread(self._store.publish_mix, lambda folder: fill_mix(folder, wanted, members))

    def _check_fit(self, members: Members) -> None:
        ranks = {v.id: lora_config.read(v.ref.path, self._max_rank).rank for v in members}
        if padded(sum(ranks.values())) > self._max_rank:
            told = " + ".join(map(str, ranks.values()))
            raise BadRequest(
                f"The mix would have rank {told} and the engine holds {self._max_rank}: mix fewer or smaller "
                "adapters, raise engine.max_lora_rank and restart, or make one of less rank with "
                "`hybrid adapters merge --method svd`.",
                param="model",
            )

    async def _make_room(self) -> None:
        """Takes the least recently used mixes away until one more may be made. Raises Overloaded."""
        kept = sorted(self._kept(), key=lambda version: (self._used.get(version.id, 0), version.version))
        idle = [v for v in kept if not self._busy(v)]
        surplus = len(kept) - self._limit + 1
        if surplus > len(idle):
            raise Overloaded(f"All {len(kept)} mixes are answering; repeat in a moment, or raise engine.max_mixes.")
        for version in idle[: max(surplus, 0)]:
            await asyncio.to_thread(self._store.retire, MIX, version.version)
        await self._clear_away()

    def _busy(self, version: AdapterVersion) -> bool:
        """Whether an answer needs the mix, or it is being loaded."""
        waits = self._loader.is_loading(version.id) or self._awaited[version.id]
        return bool(waits or self._in_use(version.ref.engine_name))

    async def _clear_away(self) -> None:
        """Removes what was retired, but for a mix that an answer got hold of just before: its files may be read yet."""
        for version in self._store.versions(MIX):
            if version.state == "retired" and not self._busy(version):
                await self._engine.unload(version.ref.engine_name)
                await asyncio.to_thread(self._store.remove_mix, version.version)


def fill_mix(folder: Path, weights: Mapping[str, float], members: Members) -> dict[str, Any]:
    """Writes the exact mix of `members` by `weights` (keyed by id) into a staging folder and returns its card.

    Raises Refused when the members were not trained on one base.
    """
    base = one_base(members)
    factors = concatenated([(weights[v.id], read_factors(v.ref.path)) for v in members])
    write_factors(folder, factors)
    card = {"kind": "lora", "method": MIX, "mix": dict(weights), "rank": factors.rank}
    return card | ({"base_sha256": base} if base else {})


def one_base(members: Members) -> str:
    """The hash of the base that the members were trained on, "" where no card says it. Raises Refused for two."""
    bases = {str(base) for v in members if (base := v.card.get("base_sha256"))}
    if len(bases) > 1:
        raise Refused("these adapters were trained on different base models; take those of one base.")
    return bases.pop() if bases else ""
