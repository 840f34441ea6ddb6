"""The jobs, wherever they were started: a list, and of the one that is picked how it goes, with its verbs."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid.errors import HybridError
from hybrid.types import JSON
from hybrid.ui.cards import Point, curve_points, loss_plot, plain, plotted
from hybrid.ui.client import Client, event_number, key_of
from hybrid.ui.house import ACTIVE, job_facts, version_id
from hybrid.ui.panels import esc
from hybrid.ui.sure import Sure, pick_list

EVERY_S = 1.0
#: the verb, its button, and the states in which it means something
VERBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("pause", "Pause", ("validating_files", "queued", "running")),
    ("resume", "Resume", ("paused",)),
    ("cancel", "Cancel", ACTIVE),
)


@dataclass(frozen=True, slots=True)
class Watch:
    """The job that is looked at, and what of its events is known. Unless `picked`, a newer one takes its place."""

    job_id: str = ""
    newest: int = 0
    points: tuple[Point, ...] = ()
    picked: bool = False

    def with_events(self, events: Sequence[JSON]) -> "Watch":
        """Knows these too, which are newer."""
        if not events:
            return self
        fresh = curve_points([event["data"] for event in events if event["type"] == "metrics"])
        return Watch(self.job_id, event_number(events[-1]), (*self.points, *fresh), self.picked)


class Jobs:
    """The section, wired. `table` is painted and `seen` (id, name, status of each) kept by the status line.

    While a job is at work and the tab is in sight, it is looked at once a second.
    """

    def __init__(self, client: Client, key: Any, adapters: Any, started: Any) -> None:
        import gradio as gr

        self._client, self._key, self._adapters, self._started = client, key, adapters, started
        self.seen = gr.State(())
        self.in_sight = gr.State(False)
        self.watch = gr.State(Watch())
        self.table = pick_list("hy-jobs")
        self.timer = gr.Timer(EVERY_S, active=False)
        with gr.Column(visible=False, elem_id="hy-job") as self.view:
            self.facts = gr.HTML("", apply_default_css=False)
            self.plot = loss_plot()
            with gr.Row(elem_classes="hy-verbs"):
                self.verbs = [gr.Button(label, size="sm", min_width=90) for _, label, _ in VERBS]
            self.sure = Sure()
        self._wire()

    def watch_tabs(self, tab: Any, others: Sequence[Any]) -> None:
        """Looks only while `tab` is the one that is open."""
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        tab.select(lambda: True, None, [self.in_sight], **quiet).then(self._look, self._known, self._screen, **quiet)
        for other in others:
            other.select(lambda: (False, gr.Timer(active=False)), None, [self.in_sight, self.timer], **quiet)

    def _wire(self) -> None:
        import gradio as gr

        self._known = [self._key, self.seen, self.watch, self.in_sight, self._adapters]
        self._screen = [self.view, self.facts, self.plot, self.watch, self.timer, *self.verbs]
        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        async def look(
            request: gr.Request, key: str, seen: tuple[JSON, ...], watch: Watch, in_sight: bool, adapters: JSON
        ) -> list[Any]:
            return await self._painted(key_of(request, key), seen, watch, in_sight, adapters)

        def pick(event: gr.SelectData) -> list[Any]:
            return [Watch(str(event.value), picked=True), *self.sure.closed()]

        async def steer(request: gr.Request, what: JSON | None, key: str) -> list[Any]:
            await self._steer(key_of(request, key), what)
            return self.sure.closed()

        def cancel(watch: Watch) -> list[Any]:
            question = "Cancel this job? What it has learned so far is not published."
            return self.sure.asked({"job": watch.job_id, "verb": "cancel"}, question)

        async def at_once(request: gr.Request, watch: Watch, key: str, verb: str) -> None:
            await self._steer(key_of(request, key), {"job": watch.job_id, "verb": verb})

        self._look = look
        looking: JSON = {"fn": look, "inputs": self._known, "outputs": self._screen, **quiet}
        gr.on([self.timer.tick, self.table.change], trigger_mode="once", **looking)
        self.table.select(pick, None, [self.watch, *self.sure.outputs], **quiet).then(**looking)
        self._started.change(lambda job: Watch(job, picked=True), [self._started], [self.watch], **quiet).then(
            **looking
        )
        loud: JSON = {"show_progress": "hidden", "api_visibility": "private"}  # a note is shown only from the queue
        for button, (verb, _, _) in zip(self.verbs[:2], VERBS, strict=False):
            button.click(at_once, [self.watch, self._key, gr.State(verb)], None, **loud).then(**looking)
        self.verbs[2].click(cancel, [self.watch], self.sure.outputs, **quiet)
        self.sure.yes.click(steer, [self.sure.what, self._key], self.sure.outputs, **loud).then(**looking)

    async def _steer(self, key: str, what: JSON | None) -> None:
        import gradio as gr

        if what is None:
            return
        try:
            await self._client.steer(key, what["job"], what["verb"])
        except HybridError as error:
            gr.Warning(plain(error.message))

    async def _painted(
        self, key: str, seen: tuple[JSON, ...], watch: Watch, in_sight: bool, adapters: JSON
    ) -> list[Any]:
        """The values of `_screen`."""
        import gradio as gr

        still = gr.Timer(active=False)
        if not watch.picked and watch.job_id != (job_id := newest(seen)):
            watch = Watch(job_id)
        if not watch.job_id or not in_sight:
            return [gr.Column(visible=bool(watch.job_id)), gr.skip(), gr.skip(), watch, still, *[gr.skip()] * 3]
        try:
            job = await self._client.job(key, watch.job_id)
            events = await self._client.events(key, watch.job_id, newer_than=watch.newest)
        except HybridError as error:
            told = f'<div class="hy-panel"><p class="hy-bad">{esc(error.message)}</p></div>'
            return [gr.Column(visible=True), told, gr.skip(), watch, still, *[gr.Button(interactive=False)] * 3]
        now = watch.with_events(events)
        fresh = now.points != watch.points or not watch.newest
        status = str(job["status"])
        # paused waits for a person, and what waits changes its row: only what runs is worth a second look
        timer = gr.Timer(active=status in ACTIVE and status != "paused")
        told = job_facts(job) + how_to_ask(job, adapters)
        verbs = [gr.Button(interactive=status in states) for _, _, states in VERBS]
        return [gr.Column(visible=True), told, plotted(now.points) if fresh else gr.skip(), now, timer, *verbs]


def newest(jobs: Sequence[Mapping[str, Any]]) -> str:
    """The job to look at when none was picked: the newest one at work, else the newest."""
    active = [job for job in jobs if job["status"] in ACTIVE]
    return str((active or list(jobs) or [{"id": ""}])[0]["id"])


def how_to_ask(job: JSON, adapters: JSON) -> str:
    """The model name to ask for, once a job has made one."""
    if job["status"] != "succeeded":
        return ""
    name, version = job["hybrid"]["adapter"], job["hybrid"]["version"]
    made: JSON = next((a for a in adapters.get("adapters") or [] if version_id(a) == f"{name}@{version}"), {})
    if made.get("kind", "lora") != "lora" or made.get("state") in ("retired", "rejected"):
        return f'<p class="hy-ask">{esc(name)}@{esc(version)}: {esc(made.get("reason") or made["state"])}</p>'
    model = name if made.get("alias") else f"{name}@{version}"
    why = f" It did not take the name: {esc(made['reason'])}" if made.get("reason") and not made.get("alias") else ""
    return f'<p class="hy-ask">It answers to the model <code>{esc(model)}</code>.{why}</p>'
