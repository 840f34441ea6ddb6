"""The reports of the home: what one says, its pictures, and down to one example with every arm's answer."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

import asyncio
from typing import Any

from hybrid.errors import HybridError
from hybrid.evaluation.page import board
from hybrid.types import JSON
from hybrid.ui.client import Client, key_of
from hybrid.ui.sides import ORDERS, examples_table, ordered, report_label, side_by_side, verdict
from hybrid.ui.sure import pick_list
from hybrid.ui.train import refused

EMPTY = (
    '<div class="hy-panel hy-empty">No report yet. Choose a suite or a task and run it; what comes of it is here.</div>'
)


class Reports:
    """The section, wired. What sets `fresh` (a name, and any new number) and is then given to `follow` has that report
    read again."""

    def __init__(self, client: Client, key: Any) -> None:
        import gradio as gr

        self._client, self._key = client, key
        self._drawing = asyncio.Lock()  # matplotlib's settings are one for all threads
        self.fresh = gr.State(("", 0))
        self.shown = gr.State(("", 0))
        self.examples = gr.State(())
        self.report = gr.Dropdown([], label="Report", allow_custom_value=True, elem_id="hy-report")
        self.verdict = gr.HTML(EMPTY, apply_default_css=False)
        self.board = gr.HTML("", apply_default_css=False, elem_id="hy-board")
        with gr.Column(visible=False) as self.drill:
            with gr.Row():
                self.task = gr.Dropdown([], label="Examples of", allow_custom_value=True, min_width=140)
                self.order = gr.Dropdown(list(ORDERS), value=next(iter(ORDERS)), label="In order", min_width=140)
            with gr.Row():
                with gr.Column(scale=2, min_width=260, elem_id="hy-examples"):
                    self.list = pick_list("hy-example-list")
                with gr.Column(scale=3, min_width=280):
                    self.sides = gr.HTML("", apply_default_css=False)
        self._wire()

    def _wire(self) -> None:
        import gradio as gr

        screen = [self.verdict, self.board, self.drill, self.task]
        lists = [self.examples, self.list, self.sides]

        async def read(request: gr.Request, name: str | None, key: str) -> list[Any]:
            return (await self._read(key_of(request, key), name or ""))[1]

        async def again(
            request: gr.Request, fresh: tuple[str, int], shown: tuple[str, int], order: str, key: str
        ) -> list[Any]:
            if fresh == shown:
                return [gr.skip()] * 8
            who = key_of(request, key)
            task, told = await self._read(who, fresh[0])
            return [fresh, *told, *await self._look(who, fresh[0], task, order)]

        async def look(request: gr.Request, name: str | None, task: str | None, order: str, key: str) -> list[Any]:
            return await self._look(key_of(request, key), name or "", task or "", order)

        async def sort(
            request: gr.Request, name: str, task: str, examples: tuple[JSON, ...], order: str, key: str
        ) -> list[Any]:
            return await self._sorted(key_of(request, key), name, task, examples, order)

        async def pick(event: gr.SelectData, request: gr.Request, name: str, task: str, key: str) -> str:
            return await self._sides(key_of(request, key), name, task, str(event.value))

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private"}
        looking: JSON = {
            "fn": look, "inputs": [self.report, self.task, self.order, self._key], "outputs": lists, **quiet,
        }  # fmt: skip
        self.report.input(
            read, [self.report, self._key], screen,
            show_progress="minimal", show_progress_on=[self.verdict], api_name="report",
        ).then(**looking)  # fmt: skip
        self._again: JSON = {
            "fn": again, "inputs": [self.fresh, self.shown, self.order, self._key],
            "outputs": [self.shown, *screen, *lists], **quiet,
        }  # fmt: skip
        self.task.input(
            look, looking["inputs"], lists, show_progress="minimal", show_progress_on=[self.sides], api_name="examples"
        )
        self.order.input(
            sort, [self.report, self.task, self.examples, self.order, self._key], [self.list, self.sides], **quiet
        )
        self.list.select(pick, [self.report, self.task, self._key], [self.sides], **quiet)

    def follow(self, event: Any) -> None:
        """Reads the report of `fresh` after an event that may have set it."""
        event.then(**self._again)

    async def choices(self, key: str) -> list[tuple[str, str]]:
        """The entries of the list of reports, newest first. Raises HybridError."""
        return [(report_label(row), str(row["name"])) for row in await self._client.reports(key)]

    async def _read(self, key: str, name: str) -> tuple[str, list[Any]]:
        """The first task whose examples can be looked at, and what a report says."""
        import gradio as gr

        if not name:
            return "", [EMPTY, "", gr.Column(visible=False), gr.skip()]
        try:
            report = await self._client.report(key, name)
            async with self._drawing:
                drawn = await asyncio.to_thread(board, report)
            tasks = list(report["tasks"])
            shown = [verdict(name, report), f'<div class="hy-board">{drawn}</div>']
        except HybridError as error:
            return "", [refused(error.message), "", gr.Column(visible=False), gr.skip()]
        except (KeyError, TypeError, ValueError):
            wrong = refused(f"{name} is no report that this version can draw; `hybrid eval` writes it again.")
            return "", [wrong, "", gr.Column(visible=False), gr.skip()]
        first = tasks[0] if tasks else ""
        return first, [*shown, gr.Column(visible=bool(tasks)), gr.Dropdown(tasks, value=first or None)]

    async def _look(self, key: str, name: str, task: str, order: str) -> list[Any]:
        """The examples of a task, and the answers to the first."""
        if not name or not task:
            return [(), "", ""]
        try:
            examples = tuple(await self._client.examples(key, name, task))
        except HybridError as error:
            return [(), refused(error.message), ""]
        return [examples, *await self._sorted(key, name, task, examples, order)]

    async def _sorted(self, key: str, name: str, task: str, examples: tuple[JSON, ...], order: str) -> list[Any]:
        found = ordered(examples, order)
        sides = await self._sides(key, name, task, str(found[0]["id"])) if found else ""
        return [examples_table(found), sides]

    async def _sides(self, key: str, name: str, task: str, example: str) -> str:
        try:
            return side_by_side(await self._client.example(key, name, task, example))
        except HybridError as error:
            return refused(error.message)
