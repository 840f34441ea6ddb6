"""`hybrid serve`: UI and API on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

from hybrid.cli.say import bar, say
from hybrid.gateway import Gateway
from hybrid.lifecycle.looping import Looping
from hybrid.lifecycle.measure import Measuring
from hybrid.lifecycle.quickstart import Quickstart
from hybrid.server.run import serve as run
from hybrid.settings import Settings
from hybrid.ui import mount_ui


def serve(
    host: Annotated[str | None, typer.Option(help="address to listen on [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on [8000]; 0 takes a free one")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, scripted, or the URL of a running vLLM server")] = None,
    ui: Annotated[bool | None, typer.Option("--ui/--no-ui", help="the Gradio face at /")] = None,
    quickstart: Annotated[
        bool | None, typer.Option("--quickstart/--no-quickstart", help="train the quickstart adapters on a first start")
    ] = None,
) -> None:
    """Serves the UI at /, the API at /v1, and keeps the engine alive behind them.

    hybrid serve
    hybrid serve --port 9000 --engine http://127.0.0.1:8001
    """
    server = _given(host=host, port=port, ui=ui, quickstart=quickstart)
    overrides: dict[str, Any] = {}
    if server:
        overrides["server"] = server
    if engine is not None:
        overrides["engine"] = {"kind": engine}
    settings = Settings.load(**overrides)

    async def beside(gateway: Gateway) -> None:
        work: list[Coroutine[Any, Any, None]] = [first_hour(gateway)] if settings.server.quickstart else []
        if settings.training.measure:
            work.append(Measuring(gateway).run())
            work += [Looping(gateway).run()] if settings.training.loop else []
        await asyncio.gather(*work)

    async def first_hour(gateway: Gateway) -> None:
        await Quickstart(settings, state=gateway.state, store=gateway.store, library=gateway.library).run()

    with bar() as progress:
        run(
            settings,
            progress=progress,
            announce=say,
            face=(lambda app, url: mount_ui(app, settings, url)) if settings.server.ui else None,
            background=beside,
        )


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}
