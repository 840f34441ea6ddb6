"""The tab Chat: a streamed conversation, and beside every answer how it was made.

The truth is a tuple of `Turn`s in the session; the chat window is a rendering of it, so a model's words are escaped on
the way to the screen and sent back to the gateway as they were.
"""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

from collections.abc import AsyncIterator
from typing import Any

from hybrid.prompts import task_message
from hybrid.quickstart import orders_sql, tickets
from hybrid.settings import Settings
from hybrid.types import JSON
from hybrid.ui.answer import Options, Turn, answers, stopped
from hybrid.ui.client import Client, key_of
from hybrid.ui.panels import explain, markdown, seconds
from hybrid.ui.picker import picker
from hybrid.ui.votes import vote

Turns = tuple[Turn, ...]

#: what works on the quickstart: its two adapters, the handbook, and none of them
EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "Message to JSON",
        task_message(
            tickets.CARD["instruction"], "where is my wireless kettle, order 48213? waiting since Monday, in Porto"
        ),
    ),
    ("Question to SQL", task_message(orders_sql.CARD["instruction"], "How many customers live in Lyon?")),
    ("About hybrid", "How does hybrid load a new adapter without a restart?"),
    ("Small talk", "Hello! How are you today?"),
)

WELCOME = (
    "### Ask anything\nThe gate picks an arm for each message: the base model, worked examples, a corpus, or a trained "
    "adapter. Beside the answer you see which, and why."
)


def messages(turns: Turns) -> list[JSON]:
    """The conversation as the chat window shows it: a question, a line about the arm, the answer."""
    out: list[JSON] = []
    for turn in turns:
        out.append({"role": "user", "content": markdown(turn.question)})
        out.extend(_answer_messages(turn))
    return out


def _answer_messages(turn: Turn) -> list[JSON]:
    if turn.error:
        return [
            {"role": "assistant", "content": f"{markdown(turn.answer)}\n\n**Not answered.** {markdown(turn.error)}"}
        ]
    if not turn.arm:
        return [{"role": "assistant", "content": "…"}]
    title = f"{turn.arm} · {turn.adapter}" if turn.adapter else turn.arm
    if turn.total_ms:
        title += f" · {seconds(turn.total_ms)}"
    why = turn.detail.get("reason") or ("Stopped." if turn.done else "Answering…")
    note = {"role": "assistant", "content": markdown(why), "metadata": {"title": title, "status": "done"}}
    return [note, {"role": "assistant", "content": markdown(turn.answer) or "…"}]


def place(turns: Turns, index: int) -> int:
    """Which turn the message at `index` of the chat window belongs to (the last one when there are fewer)."""
    seen = 0
    for number, turn in enumerate(turns):
        seen += 1 + len(_answer_messages(turn))
        if index < seen:
            return number
    return max(len(turns) - 1, 0)


def _index(event: Any) -> int:
    return int(event.index[0] if isinstance(event.index, (list, tuple)) else event.index)


class Chat:
    """The tab, wired. `model` is the picker, which the status line keeps filled."""

    def __init__(self, client: Client, settings: Settings, key: Any) -> None:
        self._client = client
        self._history_chars = 2 * settings.engine.max_model_len
        self._key = key
        self._layout(settings)
        self._wire()

    def _layout(self, settings: Settings) -> None:
        import gradio as gr

        self.turns = gr.State((), time_to_live=6 * 3600)
        with gr.Row(elem_classes="hy-chat"):
            with gr.Column(scale=3, min_width=320):
                self.window = gr.Chatbot(
                    elem_id="hy-window",
                    show_label=False,
                    layout="bubble",
                    sanitize_html=True,
                    allow_tags=False,
                    latex_delimiters=[],
                    editable="user",
                    buttons=["copy"],
                    placeholder=WELCOME,
                    examples=[
                        {"text": text, "display_text": f"{title}: {text.rpartition(chr(10))[2]}"}
                        for title, text in EXAMPLES
                    ],
                )
                self.box = gr.Textbox(
                    show_label=False,
                    placeholder="Write a message. Enter sends it, Shift+Enter begins a line.",
                    elem_id="hy-box",
                    submit_btn=True,
                    autofocus=True,
                    lines=1,
                    max_lines=8,
                )
                with gr.Row(elem_classes="hy-tools"):
                    self.model = picker("Answer with", "auto", container=False, scale=3, min_width=160)
                    self.fresh = gr.Button("New chat", size="md", scale=1, min_width=100)
                with gr.Accordion("Sampling", open=False):
                    self.temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature")
                    top = settings.engine.max_model_len // 2
                    self.max_tokens = gr.Slider(16, top, min(512, top), step=16, label="Longest answer, in tokens")
            with gr.Column(scale=2, min_width=300):
                self.panel = gr.HTML(explain(None), elem_id="hy-panel", apply_default_css=False)

    def _wire(self) -> None:
        import gradio as gr

        screen = [self.window, self.panel, self.turns, self.box]
        answering = self._answering(screen)
        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        def undo(event: gr.UndoData, turns: Turns) -> tuple[Any, ...]:
            at = place(turns, _index(event))
            return *_screen(turns[:at]), _idle(turns[at].question if turns else "")

        def select(event: gr.SelectData, turns: Turns) -> str:
            at = place(turns, _index(event))
            return explain(turns[at], f"Answer {at + 1}") if turns else explain(None)

        async def like(request: gr.Request, event: gr.LikeData, turns: Turns, key: str) -> None:
            if turns:
                turn = turns[place(turns, _index(event))]
                await vote(self._client, key_of(request, key), {turn.decision_id: float(event.liked is True)})

        self.box.stop(None, None, None, cancels=answering).then(_stopped, [self.turns], screen, **quiet)
        for begin in (self.fresh.click, self.window.clear):
            begin(None, None, None, cancels=answering).then(lambda: (*_screen(()), _idle("")), None, screen, **quiet)
        self.window.undo(undo, [self.turns], screen, **quiet)
        self.window.select(select, [self.turns], [self.panel], **quiet)
        # through the queue: Gradio shows a note only from there
        self.window.like(like, [self.turns, self._key], None, show_progress="hidden", api_visibility="private")

    def _answering(self, screen: list[Any]) -> list[Any]:
        """The events that make an answer; those that stop one cancel these."""
        import gradio as gr

        knobs = [self.turns, self.model, self.temperature, self.max_tokens, self._key]
        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private"}

        async def submit(
            request: gr.Request, text: str, turns: Turns, model: str, temperature: float, max_tokens: int, key: str
        ) -> AsyncIterator[Any]:
            async for update in self._run(request, text, turns, model, temperature, max_tokens, key):
                yield update

        async def example(request: gr.Request, event: gr.SelectData, *rest: Any) -> AsyncIterator[Any]:
            async for update in self._run(request, event.value["text"], *rest):
                yield update

        async def retry(request: gr.Request, event: gr.RetryData, turns: Turns, *rest: Any) -> AsyncIterator[Any]:
            at = place(turns, _index(event))
            async for update in self._run(request, turns[at].question, turns[:at], *rest):
                yield update

        async def edit(request: gr.Request, event: gr.EditData, turns: Turns, *rest: Any) -> AsyncIterator[Any]:
            at = place(turns, _index(event))
            async for update in self._run(request, str(event.value), turns[:at], *rest):
                yield update

        return [
            self.box.submit(submit, [self.box, *knobs], screen, show_progress="hidden", api_name="chat"),
            self.window.example_select(example, knobs, screen, **quiet),
            self.window.retry(retry, knobs, screen, **quiet),
            self.window.edit(edit, knobs, screen, **quiet),
        ]

    async def _run(
        self, request: Any, text: str, turns: Turns, model: str, temperature: float, max_tokens: float, key: str
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Answers `text` after `turns`, painting the screen as the answer grows."""
        import gradio as gr

        question = text.strip()
        if not question:
            yield (gr.skip(),) * 4
            return
        options = Options(
            model=model, temperature=temperature, max_tokens=int(max_tokens), history_chars=self._history_chars
        )
        box: Any = gr.Textbox(value="", submit_btn=False, stop_btn=True)
        shown = None
        async for turn in answers(self._client, key_of(request, key), question, turns, options):
            now = (*turns, turn)
            panel = explain(turn, f"Answer {len(now)}")
            # the panel changes twice in an answer; repainting it with every word would close what was opened
            yield messages(now), gr.skip() if panel == shown else panel, now, _idle() if turn.done else box
            shown, box = panel, gr.skip()


def _screen(turns: Turns) -> tuple[list[JSON], str, Turns]:
    return messages(turns), explain(turns[-1] if turns else None, f"Answer {len(turns)}"), turns


def _idle(text: str | None = None) -> Any:
    """The box when nothing is being answered."""
    import gradio as gr

    buttons: JSON = {"submit_btn": True, "stop_btn": False}
    return gr.Textbox(**buttons) if text is None else gr.Textbox(value=text, **buttons)


def _stopped(turns: Turns) -> tuple[Any, ...]:
    """The screen after the stop button: what had come stays."""
    if turns:
        turns = (*turns[:-1], stopped(turns[-1]))
    return *_screen(turns), _idle()
