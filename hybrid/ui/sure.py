"""A second click before what cannot be taken back lightly, and the rows that can be picked."""

from __future__ import annotations

from typing import Any

#: rows that carry `data-pick` can be picked, by mouse or by their button; the mark outlives a repaint, unless what is
#: painted says in `data-picked` which one it is
PICK_JS = """
const mark = () => element.querySelectorAll('[data-pick]').forEach(
  (row) => row.classList.toggle('hy-picked', row.dataset.pick === element.dataset.picked));
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-pick]');
  if (!row) return;
  element.dataset.picked = row.dataset.pick;
  mark();
  trigger('select', {index: 0, value: row.dataset.pick});
});
watch('value', () => {
  const told = element.querySelector('[data-picked]');
  if (told) element.dataset.picked = told.dataset.picked;
  mark();
});
"""


def pick_list(elem_id: str, more: str = "") -> Any:
    """A table whose rows are picked: its event `select` carries `data-pick` as the value. `more` is JavaScript."""
    import gradio as gr

    return gr.HTML("", js_on_load=PICK_JS + more, elem_id=elem_id, apply_default_css=False)


class Sure:
    """The row that asks. `what` holds what is to be done until it is answered; `yes.click` does it."""

    def __init__(self) -> None:
        import gradio as gr

        self.what = gr.State(None)
        with gr.Row(visible=False, elem_classes="hy-sure") as self.row:
            self.question = gr.Markdown("", sanitize_html=True, latex_delimiters=[])
            self.yes = gr.Button("Yes", variant="primary", size="sm", min_width=90, scale=0)
            self.no = gr.Button("No", size="sm", min_width=90, scale=0)
        self.no.click(self.closed, None, self.outputs, show_progress="hidden", api_visibility="private", queue=False)

    @property
    def outputs(self) -> list[Any]:
        return [self.what, self.row, self.question]

    def asked(self, what: Any, question: str) -> list[Any]:
        """The values of `outputs` that ask `question` (Markdown)."""
        import gradio as gr

        return [what, gr.Row(visible=True), question]

    def closed(self) -> list[Any]:
        """The values of `outputs` that put the question away."""
        import gradio as gr

        return [None, gr.Row(visible=False), ""]
