"""The tab Evaluate: an order for the server, and how far it is. The work is the server's: a page may be closed."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the request by its type.

import time
from collections.abc import Sequence
from typing import Any

from hybrid.errors import BadRequest, HybridError
from hybrid.types import JSON
from hybrid.ui.cards import plain
from hybrid.ui.client import Client, key_of
from hybrid.ui.panels import esc
from hybrid.ui.reports import Reports
from hybrid.ui.sides import ACTIVE, evaluation_facts, plan_facts
from hybrid.ui.train import refused

EVERY_S = 1.0
#: arms by kind: all of a kind that apply to a task
KINDS = ("prompt", "few_shot", "rag", "adapter", "adapter+rag", "head", "mix", "moa", "self_moa", "auto", "base")
HELD_OUT = (
    '<p class="hy-warn">The test split is held out: look at it once, at the end. What is chosen by its scores is no '
    "longer measured by them.</p>"
)


class Evaluate:
    """The tab, wired. While an evaluation is at work and the tab in sight, it is looked at once a second."""

    def __init__(self, client: Client, key: Any) -> None:
        import gradio as gr

        self._client, self._key = client, key
        self.in_sight = gr.State(False)
        self.watched = gr.State(("", ""))
        self.timer = gr.Timer(EVERY_S, active=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                self._lay_order()
            with gr.Column(scale=5, min_width=320):
                self.reports = Reports(client, key)
        self._wire()

    def _lay_order(self) -> None:
        import gradio as gr

        gr.HTML(
            '<div class="hy-house"><h4>Evaluate</h4><p class="hy-empty">every arm on the same examples, by this '
            "server, in the background</p></div>",
            apply_default_css=False,
        )
        self.what = gr.Dropdown([], label="Suite or task", allow_custom_value=True, elem_id="hy-what")
        self.arms = gr.Dropdown(
            list(KINDS), label="Arms", multiselect=True, allow_custom_value=True,
            info="None: those of the suite, or all that apply.",
        )  # fmt: skip
        self.split = gr.Radio(["dev", "test"], value="dev", label="Split")
        self.held = gr.HTML("", apply_default_css=False)
        with gr.Row():
            self.limit = gr.Textbox("20", label="Examples a task", max_length=8, min_width=120)
            self.name = gr.Textbox(label="Report", placeholder="suite-split", max_length=80, min_width=120)
        with gr.Row(elem_classes="hy-verbs"):
            self.plan = gr.Button("Plan", size="sm", min_width=90)
            self.run = gr.Button("Run", variant="primary", size="sm", min_width=90)
        self.said = gr.HTML("", apply_default_css=False)
        with gr.Column(visible=False, elem_id="hy-evaluation") as self.view:
            self.facts = gr.HTML("", apply_default_css=False)
            self.cancel = gr.Button("Cancel", size="sm", min_width=90)

    def watch_tabs(self, tab: Any, others: Sequence[Any]) -> None:
        """Looks only while `tab` is the one that is open."""
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        async def open_(request: gr.Request, key: str, shown: str | None) -> list[Any]:
            return await self._opened(key_of(request, key), shown or "")

        outputs = [self.what, self.arms, self.reports.report, self.reports.fresh, self.said, self.in_sight]
        opened = tab.select(open_, [self._key, self.reports.report], outputs, **quiet)
        self.reports.follow(opened.then(self._look, self._known, self._screen, **quiet))
        for other in others:
            other.select(lambda: (False, gr.Timer(active=False)), None, [self.in_sight, self.timer], **quiet)

    def _wire(self) -> None:
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        self._known = [self._key, self.watched, self.in_sight]
        self._screen = [
            self.view, self.facts, self.cancel, self.watched, self.timer, self.reports.report, self.reports.fresh,
        ]  # fmt: skip
        order = [self.what, self.arms, self.split, self.limit, self.name, self._key]

        async def look(request: gr.Request, key: str, watched: tuple[str, str], in_sight: bool) -> list[Any]:
            return await self._painted(key_of(request, key), watched, in_sight)

        async def plan(
            request: gr.Request, what: str, arms: list[str], split: str, limit: str, name: str, key: str
        ) -> str:
            try:
                body = order_body(what, arms, split, limit, name)
                return plan_facts(await self._client.plan(key_of(request, key), body))
            except HybridError as error:
                return refused(error.message)

        async def run(
            request: gr.Request, what: str, arms: list[str], split: str, limit: str, name: str, key: str
        ) -> str:
            try:
                body = order_body(what, arms, split, limit, name)
                row = await self._client.evaluate(key_of(request, key), body)
            except HybridError as error:
                return refused(error.message)
            return f'<p class="hy-empty">Started {esc(row["report"])}. You may close this page.</p>'

        async def cancel(request: gr.Request, watched: tuple[str, str], key: str) -> None:
            try:
                await self._client.end_evaluation(key_of(request, key), watched[0])
            except HybridError as error:
                gr.Warning(plain(error.message))

        self._look = look
        looking: JSON = {"fn": look, "inputs": self._known, "outputs": self._screen, **quiet}
        self.reports.follow(self.timer.tick(trigger_mode="once", **looking))
        self.split.change(lambda split: HELD_OUT if split == "test" else "", [self.split], [self.held], **quiet)
        shown: JSON = {"show_progress": "minimal", "show_progress_on": [self.said]}
        self.plan.click(plan, order, [self.said], api_name="plan", **shown)
        self.run.click(run, order, [self.said], api_name="evaluate", **shown).then(**looking)
        loud: JSON = {"show_progress": "hidden", "api_visibility": "private"}  # a note is shown only from the queue
        self.cancel.click(cancel, [self.watched, self._key], None, **loud).then(**looking)

    async def _opened(self, key: str, shown: str) -> list[Any]:
        """The lists to choose from, and the newest report where none is shown."""
        import gradio as gr

        try:
            known, models = await self._client.suites(key), await self._client.models(key)
            reports = await self.reports.choices(key)
        except HybridError as error:
            return [*[gr.skip()] * 4, refused(error.message), True]
        what = subjects(known)
        arms = [*KINDS, *(model for model in models if model not in KINDS)]
        name = shown or (reports[0][1] if reports else None)
        fresh = gr.skip() if shown or not name else (name, time.time_ns())
        first = what[0][1] if what else None
        said = (
            "" if what else refused("Nothing to evaluate yet: put a task folder into eval/tasks, or set HYBRID_DATA.")
        )
        return [gr.Dropdown(what, value=first), gr.Dropdown(arms), gr.Dropdown(reports, value=name), fresh, said, True]

    async def _painted(self, key: str, watched: tuple[str, str], in_sight: bool) -> list[Any]:
        """The values of `_screen`: the evaluation at work, or the newest; its report once it has come to its end."""
        import gradio as gr

        if not in_sight:
            return [*[gr.skip()] * 4, gr.Timer(active=False), gr.skip(), gr.skip()]
        try:
            rows = await self._client.evaluations(key)
        except HybridError as error:
            return [gr.Column(visible=True), refused(error.message), *[gr.skip()] * 5]
        row = next((r for r in reversed(rows) if r["status"] in ACTIVE), rows[0] if rows else None)
        if row is None:
            return [gr.Column(visible=False), *[gr.skip()] * 3, gr.Timer(active=False), gr.skip(), gr.skip()]
        active = row["status"] in ACTIVE
        before = next((r for r in rows if r["id"] == watched[0]), None)
        news: list[Any] = [gr.skip(), gr.skip()]
        if watched[1] in ACTIVE and before is not None and before["status"] == "succeeded":
            name = before["report"]
            news = [gr.Dropdown(await self.reports.choices(key), value=name), (name, time.time_ns())]
        now = (row["id"], row["status"])
        return [
            gr.Column(visible=True), evaluation_facts(row), gr.Button(interactive=active), now,
            gr.Timer(active=active), *news,
        ]  # fmt: skip


def subjects(known: JSON) -> list[tuple[str, str]]:
    """The entries of the list of what can be evaluated; what cannot be read is left out."""
    suites = [(f"suite {row['name']}, {len(row['tasks'])} tasks", row["name"]) for row in readable(known["suites"])]
    tasks = [(f"task {row['name']}, {row['metric']}", row["path"]) for row in readable(known["tasks"])]
    return [*suites, *tasks]


def readable(rows: Sequence[JSON]) -> list[JSON]:
    """Those that came with facts and not with an error."""
    return [row for row in rows if "error" not in row]


def order_body(what: str | None, arms: Sequence[str] | None, split: str, limit: str, name: str) -> JSON:
    """The body of `POST /v1/evaluations`; what has a slash is a task folder. Raises BadRequest for what can be none."""
    asked, most = (what or "").strip(), limit.strip()
    if not asked:
        raise BadRequest("Choose a suite or a task first.", param="suite")
    if most and not (most.isascii() and most.isdigit()):
        raise BadRequest("Examples a task is a whole number; empty takes the suite's, or all.", param="limit")
    return {
        **({"tasks": [asked]} if "/" in asked else {"suite": asked}),
        "arms": list(arms or []),
        "split": split,
        **({"limit": int(most)} if most else {}),
        **({"name": name.strip()} if name.strip() else {}),
    }
