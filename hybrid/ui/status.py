"""The line above every tab, the lists of the tab Adapters, and the pickers: one poll of the gateway keeps all true."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the request by its type.

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hybrid.errors import HybridError, Unauthorized
from hybrid.types import JSON
from hybrid.ui.client import Client, key_of
from hybrid.ui.house import jobs_table, status_line, trouble_line, versions_table
from hybrid.ui.panels import esc
from hybrid.ui.picker import choices

POLL_S = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a poll found, in the order in which it is painted."""

    line: str = ""
    versions: str = ""
    corpora: str = ""
    jobs: str = ""
    adapters: JSON | None = None
    job_rows: tuple[JSON, ...] = ()
    models: tuple[str, ...] = ()


class Status:
    """Paints `screen` (the fields of `Seen` but the last) and fills `pickers`, whenever something changed."""

    def __init__(self, client: Client, *, screen: Sequence[Any], key: Any, pickers: Sequence[Any]) -> None:
        self._client = client
        self._screen, self._key, self._pickers = screen, key, pickers

    def poll(self, page: Any) -> None:
        """Wires the timer, and a first look when the page opens."""
        import gradio as gr

        seen = gr.State(Seen())
        timer = gr.Timer(POLL_S)

        async def look(request: gr.Request, key: str, before: Seen) -> list[Any]:
            now, locked = await self._look(key_of(request, key), before)
            keys = gr.skip() if not locked else gr.Textbox(visible=True)
            shown = [field.name for field in fields(Seen)][:-1]
            changed = [_changed(getattr(now, name), getattr(before, name)) for name in shown]
            names = gr.skip() if now.models == before.models else gr.Dropdown(choices=choices(now.models))
            return [*changed, keys, now, *[names for _ in self._pickers]]

        gr.on(
            [page.load, timer.tick],
            look,
            [self._key, seen],
            [*self._screen, self._key, seen, *self._pickers],
            show_progress="hidden",
            api_visibility="private",
            queue=False,
            trigger_mode="once",
        )

    async def _look(self, key: str, before: Seen) -> tuple[Seen, bool]:
        """What is so now, and whether the caller must give a key."""
        try:
            status = await self._client.status(key)
            adapters = {name: status.get(name) for name in ("adapters", "aliases")}
            now = Seen(
                line=status_line(status),
                versions=versions_table(status),
                corpora=esc(json.dumps(status.get("corpora") or [])),
                jobs=jobs_table(rows := job_rows(status)),
                adapters=adapters,
                job_rows=rows,
                models=before.models,
            )
            # names change only when what they are made of does
            made_of = (now.adapters, now.corpora)
            if not before.models or made_of != (before.adapters, before.corpora):
                now = replace(now, models=tuple(await self._client.models(key)))
        except HybridError as error:
            return replace(before, line=trouble_line(error.message)), isinstance(error, Unauthorized)
        return now, False


def _changed(now: Any, before: Any) -> Any:
    import gradio as gr

    return gr.skip() if now == before else now


def job_rows(status: JSON) -> tuple[JSON, ...]:
    """Of every job what changes seldom: repainting a list takes the focus from it."""
    return tuple(
        {
            "id": str(job.get("id", "")),
            "name": (job.get("spec") or {}).get("name", ""),
            "status": job.get("status", ""),
            "error": job.get("error") or "",
        }
        for job in status.get("jobs") or []
        if job.get("kind") != "evaluate"  # these have a tab of their own
    )
