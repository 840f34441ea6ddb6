"""What the names in a request mean in this home: a `model` is an arm, an adapter's name one immutable version."""

from __future__ import annotations

from collections.abc import Collection

from hybrid.adapters.hotload import HotLoader
from hybrid.adapters.kinds import is_reward
from hybrid.adapters.listing import SERVABLE, AdapterVersion, in_service
from hybrid.adapters.mix import parse_weights
from hybrid.adapters.mixes import Mixes
from hybrid.adapters.store import AdapterStore
from hybrid.engine import Engine
from hybrid.errors import ModelNotFound
from hybrid.knowledge.search import Library
from hybrid.knowledge.shelves import Shelves
from hybrid.strategies import STRATEGIES
from hybrid.types.arm import Arm
from hybrid.types.rights import Rights

#: strategy → how many parts its name may have after the first, where it is not one
_PARTS = {"base": 0, "prompt": 0, "adapter+rag": 2, "self_moa": 0}


OWNER = Rights()


class Names:
    """Looks names up. Nothing here falls back: an unknown name is an error that says what is known."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: AdapterStore,
        loader: HotLoader,
        library: Library,
        shelves: Shelves,
        mixes: Mixes,
        panels: Collection[str],
    ) -> None:
        self._engine = engine
        self._store = store
        self._loader = loader
        self._library = library
        self._shelves = shelves
        self._mixes = mixes
        self._panels = panels

    def arm(self, model: str, rights: Rights = OWNER) -> Arm | None:
        """The arm a `model` names; None for `auto`. Raises ModelNotFound, never falls back.

        What is not there and what the caller may not use are unknown alike.
        """
        try:
            arm = self._arm(model)
        except ModelNotFound:
            if rights.admin:
                raise
            raise _unknown(model) from None
        if arm is not None and not rights.may(arm):
            raise _unknown(model)
        return arm

    def knows(self, model: str, rights: Rights) -> bool:
        """Whether a `model` is one that the caller may ask for."""
        try:
            self.arm(model, rights)
        except ModelNotFound:
            return False
        return True

    def _arm(self, model: str) -> Arm | None:
        name = model.removeprefix("hybrid/")
        if name == "auto":
            return None
        if name in ("base", self._engine.status().model):
            return Arm("base")
        if name.startswith("base:"):
            return self._adapter_arm(name.removeprefix("base:"))
        if name.startswith("ft:"):
            return self._adapter_arm(self._store.resolve(name).id)
        try:
            arm = Arm.parse(name)
        except ValueError:
            return self._adapter_arm(name)
        return self._checked(arm, model)

    async def versions(self, arm: Arm) -> dict[str, AdapterVersion]:
        """What each adapter or head that the arm names is from here on, known to the engine where it must be.

        Raises ModelNotFound for a version that is not served, Refused, NotReady.
        """
        if arm.strategy == "head":
            return {arm.args[0]: self._store.head(arm.args[0])}
        if arm.strategy == "mix":
            return {str(arm): await self._mixes.serve(parse_weights(arm.args[0]))}
        return {spec: await self._version(spec) for spec in arm.adapters}

    async def _version(self, spec: str) -> AdapterVersion:
        version = in_service(self._store.model(spec))
        if version.ref.engine_name not in await self._engine.loaded():
            version = await self._loader.load_now(version.id)
        return version

    def reward(self, spec: str) -> AdapterVersion:
        """The newest reward model under `name` that passed its checks, or the one that `name@3` means. Raises
        ModelNotFound. No I/O."""
        name, _, number = spec.partition("@")
        known = [v for v in self._store.versions(name) if is_reward(v.card) and number in ("", str(v.version))]
        passed = [version for version in known if version.state in SERVABLE]
        if not passed:
            why = f"it is {known[-1].state}. {known[-1].reason}".rstrip() if known else "`--method reward` trains one."
            raise ModelNotFound(f"There is no reward model {spec[:80]!r} that rates answers: {why}", param="model")
        return max(passed, key=lambda version: version.version)

    def _adapter_arm(self, spec: str) -> Arm:
        self._store.model(spec)
        return Arm("adapter", (spec,))

    def _checked(self, arm: Arm, model: str) -> Arm:
        """The arm, once its strategy, adapters, corpus and task are known to exist."""
        if arm.strategy not in STRATEGIES:
            raise ModelNotFound(f"The strategy of {model[:80]!r} is not served here.", param="model")
        if arm.strategy in ("adapter", "adapter+rag") and not arm.adapter:
            raise ModelNotFound(f"{model[:80]!r} names no adapter; write {arm.strategy}:NAME.", param="model")
        if arm.strategy == "head":
            if not arm.args:
                raise ModelNotFound(f"{model[:80]!r} names no head; write head:NAME.", param="model")
            self._store.head(arm.args[0])
        if len(arm.args) > _PARTS.get(arm.strategy, 1):
            raise ModelNotFound(f"{model[:80]!r} has more parts than {arm.strategy} takes.", param="model")
        if arm.strategy == "mix" and arm.args:
            parse_weights(arm.args[0])
        if arm.strategy == "moa" and arm.args and arm.args[0] not in self._panels:
            known = ", ".join(self._panels) or "none yet: `[moa.panels.NAME]` in hybrid.toml makes one"
            raise ModelNotFound(f"There is no panel {arm.args[0][:80]!r}. Known: {known}.", param="model")
        for adapter in arm.adapters:
            self._store.model(adapter)
        if "rag" in arm.strategy:
            self._check_corpus(arm.corpus)
        if arm.strategy == "few_shot" and arm.args:
            self._shelves.get(arm.args[0])
        return arm

    def _check_corpus(self, corpus: str | None) -> None:
        names = self._library.names()
        if corpus and self._library.is_unreadable(corpus):
            return  # it exists: its search tells what is wrong with it
        if (corpus and corpus not in names) or not names:
            known = ", ".join(names) or "none yet: `hybrid index DIR --name NAME` makes one"
            raise ModelNotFound(f"There is no such corpus as {str(corpus)[:80]!r}. Known: {known}.", param="model")


def _unknown(model: str) -> ModelNotFound:
    return ModelNotFound(f"There is no model {model[:80]!r} for this key; GET /v1/models lists those.", param="model")
