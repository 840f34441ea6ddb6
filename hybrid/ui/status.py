"""The line above every tab, the tab Adapters, and the pickers: one poll of the gateway keeps all of them true."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the request by its type.

from collections.abc import Sequence
from typing import Any

from hybrid.errors import HybridError, Unauthorized
from hybrid.ui.client import Client, key_of
from hybrid.ui.panels import house, status_line, trouble_line
from hybrid.ui.picker import choices

POLL_S = 2.0


class Status:
    """`line` and `house` are painted, `pickers` are filled, whenever something changed."""

    def __init__(self, client: Client, *, line: Any, table: Any, key: Any, pickers: Sequence[Any]) -> None:
        self._client = client
        self._line, self._table, self._key, self._pickers = line, table, key, pickers

    def poll(self, page: Any) -> None:
        """Wires the timer, and a first look when the page opens."""
        import gradio as gr

        seen = gr.State(("", "", ()))
        timer = gr.Timer(POLL_S)

        async def look(request: gr.Request, key: str, before: tuple[Any, ...]) -> list[Any]:
            line, table, models, locked = await self._look(key_of(request, key), before)
            keys = gr.skip() if not locked else gr.Textbox(visible=True)
            changed = [gr.skip() if new == old else new for new, old in zip((line, table), before, strict=False)]
            names = gr.skip() if models == before[2] else gr.Dropdown(choices=choices(models))
            return [*changed, keys, (line, table, models), *[names for _ in self._pickers]]

        gr.on(
            [page.load, timer.tick],
            look,
            [self._key, seen],
            [self._line, self._table, self._key, seen, *self._pickers],
            show_progress="hidden",
            api_visibility="private",
            queue=False,
            trigger_mode="once",
        )

    async def _look(self, key: str, before: tuple[Any, ...]) -> tuple[str, str, tuple[str, ...], bool]:
        """The line, the table, the names `model` may take, and whether the caller must give a key."""
        try:
            status = await self._client.status(key)
            table = house(status)
            # names change only when what they are made of does
            same = table == before[1] and before[2]
            models = before[2] if same else tuple(await self._client.models(key))
        except Unauthorized as error:
            return trouble_line(error.message), before[1], before[2], True
        except HybridError as error:
            return trouble_line(error.message), before[1], before[2], False
        return status_line(status), table, models, False
