"""The versions of all adapters: a table, the card of the one that is picked, and what its name should mean."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

from typing import Any

from hybrid.errors import HybridError
from hybrid.types import JSON
from hybrid.ui.cards import card_markdown, curve_points, loss_plot, plain, plotted
from hybrid.ui.client import Client, key_of
from hybrid.ui.house import version_id
from hybrid.ui.sure import Sure, pick_list

_SERVABLE = ("candidate", "live", "draining")
QUESTIONS = {
    "promote": "Promote {id}? New requests for {name} go to it; answers begun on another version end there.",
    "rollback": "Roll {name} back to the version that had the name before?",
    "retire": "Retire {id}? It answers no more; its files stay.",
}
_DONE = {"promote": "{name} means version {version} now.", "rollback": "{name} means version {version} again.",
         "retire": "Version {version} of {name} is retired."}  # fmt: skip


class Shelf:
    """The section, wired. `table` is painted and `seen` (`adapters` and `aliases` of the status) kept by the status
    line."""

    def __init__(self, client: Client, key: Any) -> None:
        import gradio as gr

        self._client, self._key = client, key
        self.seen = gr.State({})
        self.picked = gr.State("")
        self.table = pick_list("hy-adapters")
        with gr.Column(visible=False, elem_id="hy-card") as self.view:
            with gr.Row(elem_classes="hy-verbs"):
                self.verbs = {
                    "promote": gr.Button("Promote", size="sm", min_width=90),
                    "rollback": gr.Button("Roll back", size="sm", min_width=90),
                    "retire": gr.Button("Retire", size="sm", min_width=90),
                }
            self.sure = Sure()
            self.card = gr.Markdown("", sanitize_html=True, latex_delimiters=[], container=True)
            self.plot = loss_plot()
        self._wire()

    def _wire(self) -> None:
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        screen = [self.view, self.card, self.plot, *self.verbs.values()]

        def pick(event: gr.SelectData, seen: JSON) -> list[Any]:
            return [event.value, *self.painted(seen, str(event.value)), *self.sure.closed()]

        self.table.select(pick, [self.seen], [self.picked, *screen, *self.sure.outputs], **quiet)
        self.table.change(self.painted, [self.seen, self.picked], screen, **quiet)
        for verb, button in self.verbs.items():
            self._ask(button, verb, quiet)

        async def do(request: gr.Request, what: JSON | None, key: str) -> list[Any]:
            await self._do(key_of(request, key), what)
            return self.sure.closed()

        # through the queue: Gradio shows a note only from there
        self.sure.yes.click(
            do, [self.sure.what, self._key], self.sure.outputs, show_progress="hidden", api_visibility="private"
        )

    def _ask(self, button: Any, verb: str, quiet: JSON) -> None:
        def ask(seen: JSON, picked: str) -> list[Any]:
            adapter = find(seen, picked)
            if adapter is None:
                return self.sure.closed()
            name = str(adapter["name"])
            body: JSON = {} if verb == "rollback" else {"version": adapter["version"]}
            if verb != "retire":
                body["revision"] = seen["aliases"][name]["revision"]
            words = QUESTIONS[verb].format(id=plain(picked), name=plain(name))
            return self.sure.asked({"verb": verb, "name": name, "body": body}, words)

        button.click(ask, [self.seen, self.picked], self.sure.outputs, **quiet)

    async def _do(self, key: str, what: JSON | None) -> None:
        """Does what was confirmed, and says so."""
        import gradio as gr

        if what is None:
            return
        try:
            told = await self._client.adapter(key, what["name"], what["verb"], what["body"])
        except HybridError as error:
            gr.Warning(plain(error.message))
        else:
            gr.Info(_DONE[what["verb"]].format(name=plain(what["name"]), version=told["version"]), duration=4)

    def painted(self, seen: JSON, picked: str) -> list[Any]:
        """The card of the version that is picked, and which verbs it takes."""
        import gradio as gr

        adapter = find(seen, picked)
        if adapter is None:
            return [gr.Column(visible=False), *[gr.skip()] * 5]
        lora = adapter.get("kind", "lora") == "lora"
        able = {
            "promote": lora and adapter["state"] in _SERVABLE and not adapter.get("alias"),
            "rollback": lora and bool(adapter.get("alias")),
            "retire": adapter["state"] != "retired",
        }
        points = curve_points((adapter.get("card") or {}).get("curve") or [])
        verbs = [gr.Button(interactive=able[verb]) for verb in self.verbs]
        return [gr.Column(visible=True), card_markdown(adapter), plotted(points), *verbs]


def find(seen: JSON, picked: str) -> JSON | None:
    """The version `name@3` among those of the status."""
    return next((a for a in seen.get("adapters") or [] if version_id(a) == picked), None)
