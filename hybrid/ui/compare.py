"""The tab Compare: one question, two arms side by side, and a vote."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the request by its type.

from collections.abc import AsyncIterator, Sequence
from typing import Any

from hybrid.settings import Settings
from hybrid.ui.answer import Options, Turn, answers, stopped
from hybrid.ui.client import Client, key_of
from hybrid.ui.panels import badge, explain, markdown
from hybrid.ui.picker import picker
from hybrid.ui.votes import vote

#: the button, and what it says of the left and of the right answer
VOTES: tuple[tuple[str, float, float], ...] = (
    ("Left is better", 1.0, 0.0),
    ("Both good", 1.0, 1.0),
    ("Both bad", 0.0, 0.0),
    ("Right is better", 0.0, 1.0),
)


class Side:
    """One of the two columns: a picker and an answer, and further down its panel."""

    def __init__(self, label: str, model: str) -> None:
        import gradio as gr

        with gr.Column(min_width=280):
            self.model = picker(label, model)
            self.text = gr.Markdown(
                "*The answer appears here.*",
                container=True,
                min_height=120,
                sanitize_html=True,
                latex_delimiters=[],
                line_breaks=True,
                buttons=["copy"],
                elem_classes="hy-answer",
            )
            self.badge = gr.HTML("", apply_default_css=False)
        self.label = label
        self.turn = gr.State(None, time_to_live=6 * 3600)

    @property
    def outputs(self) -> list[Any]:
        return [self.text, self.badge, self.panel, self.turn]

    def painted(self, turn: Turn) -> tuple[str, str, str, Turn]:
        """The values of `outputs`; the panel comes with the last word."""
        return _words(turn), badge(turn), explain(turn, self.label) if turn.done else "", turn

    def stopped(self, turn: Turn | None) -> tuple[Any, ...]:
        """The same after the stop button."""
        import gradio as gr

        return self.painted(stopped(turn)) if turn else (gr.skip(),) * 4

    def lay_panel(self) -> None:
        """The panel goes below the votes, so that these stay near the answers."""
        import gradio as gr

        with gr.Column(min_width=280):
            self.panel = gr.HTML("", apply_default_css=False)


class Compare:
    """The tab, wired. `models` are the pickers, which the status line keeps filled."""

    def __init__(self, client: Client, settings: Settings, key: Any) -> None:
        import gradio as gr

        self._client = client
        self._key = key
        self._max_tokens = min(512, settings.engine.max_model_len // 2)
        self.question = gr.Textbox(
            label="One question for both",
            placeholder="Enter asks both at once.",
            submit_btn=True,
            lines=1,
            max_lines=8,
            elem_id="hy-question",
        )
        with gr.Row():
            self.sides = (Side("Left", "auto"), Side("Right", "base"))
        with gr.Row(elem_classes="hy-votes"):
            self.buttons = [gr.Button(label, size="sm", min_width=110) for label, _, _ in VOTES]
            self.stop = gr.Button("Stop", size="sm", variant="stop", min_width=110)
        with gr.Row():
            for side in self.sides:
                side.lay_panel()
        self._wire()

    @property
    def models(self) -> Sequence[Any]:
        return [side.model for side in self.sides]

    def _wire(self) -> None:
        stopping = self.stop.click(None, None, None, cancels=[self._ask(side) for side in self.sides])
        for side in self.sides:
            stopping.then(side.stopped, [side.turn], side.outputs, show_progress="hidden", api_visibility="private")
        for button, (_, left, right) in zip(self.buttons, VOTES, strict=True):
            self._vote(button, left, right)

    def _ask(self, side: Side) -> Any:
        """Each side is an event of its own, so both stream at once."""
        import gradio as gr

        async def ask(request: gr.Request, text: str, model: str, key: str) -> AsyncIterator[tuple[Any, ...]]:
            question = text.strip()
            if not question:
                yield (gr.skip(),) * 4
                return
            options = Options(model=model, max_tokens=self._max_tokens)
            async for turn in answers(self._client, key_of(request, key), question, (), options):
                yield side.painted(turn)

        return self.question.submit(
            ask,
            [self.question, side.model, self._key],
            side.outputs,
            show_progress="hidden",
            api_visibility="private",
        )

    def _vote(self, button: Any, left: float, right: float) -> None:
        import gradio as gr

        async def cast(request: gr.Request, a: Turn | None, b: Turn | None, key: str) -> None:
            if not (a and b and a.done and b.done):
                gr.Info("Ask both first; then say which answer is better.", duration=3)
                return
            await vote(self._client, key_of(request, key), {a.decision_id: left, b.decision_id: right})

        turns = [side.turn for side in self.sides]
        button.click(cast, [*turns, self._key], None, show_progress="hidden", api_visibility="private")


def _words(turn: Turn) -> str:
    if turn.error:
        return f"{markdown(turn.answer)}\n\n**Not answered.** {markdown(turn.error)}"
    return markdown(turn.answer) or "…"
