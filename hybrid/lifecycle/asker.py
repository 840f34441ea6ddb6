"""Whom an evaluation asks: the server of its home, an engine started for it, or nobody where all is known already."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from hybrid import reach
from hybrid.boot import Progress, open_gateway, wait_ready
from hybrid.evaluation.asking import Asker, GatewayAsker, Offer, Remembered, ServerAsker, shown_settings
from hybrid.knowledge.lending import lending
from hybrid.lifecycle.rating import Raters
from hybrid.models import ModelFiles
from hybrid.settings import Settings

#: while everything is asked at once, a gate and a panel's members may take their time: their choice and their answers
#: are measured, not the queue before them
_GATE_DEADLINE_MS, _MEMBER_DEADLINE_S = 10_000.0, 600.0


@contextlib.asynccontextmanager
async def open_asker(
    settings: Settings,
    model: ModelFiles,
    *,
    lent: Mapping[str, Path],
    kept: Callable[[], Offer | None],
    told: Progress,
    embeds: bool = True,
) -> AsyncIterator[Asker]:
    """Someone who answers, whoever it is with the same arms.

    `lent` are the task folders, by name, that few-shot prompts may draw on. `kept` returns what is on offer where
    every answer to it is kept already: then no engine is started. `embeds` says that some arm looks things up.
    Raises NotReady, SetupError.
    """
    with lending(settings.rooms, lent):
        server = reach.find(settings.rooms.server_file)
        if server is not None:
            async with server.connect() as session:
                yield ServerAsker(session, shown_settings(settings), model.sha256)
            return
        # what an engine elsewhere offers must be asked there
        offer = None if settings.engine.kind.startswith("http") else await asyncio.to_thread(kept)
        if offer is not None:
            yield Remembered(offer)
            return
        told("starting an engine for this run (`hybrid serve` keeps one running)", 0, 1)
        async with open_gateway(_patient(settings), told, Raters(settings)) as gateway:
            await wait_ready(gateway, settings.engine.start_timeout_s, told)
            if embeds:
                await gateway.embed(["."])  # loaded now, so that no answer's latency holds its start
            yield GatewayAsker(gateway, model.sha256)


def _patient(settings: Settings) -> Settings:
    gate = settings.gate.model_copy(update={"deadline_ms": _GATE_DEADLINE_MS})
    moa = settings.moa.model_copy(update={"deadline_s": max(_MEMBER_DEADLINE_S, settings.moa.deadline_s)})
    return settings.model_copy(update={"gate": gate, "moa": moa})
