"""A new version from an upload: what the file holds, how to train on it, and the order."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the request by its type.

import asyncio
import os
import re
from pathlib import Path
from typing import Any

from hybrid.errors import HybridError
from hybrid.training.methods import METHODS
from hybrid.training.recipes import Recipe, parse_sets
from hybrid.types import JSON
from hybrid.ui.client import Client, key_of
from hybrid.ui.panels import esc

FILE_TYPES = [".jsonl", ".json", ".txt", ".md"]
#: what kind of rows ask for
USUAL = {"chat": "lora", "preference": "dpo", "text": "pretrain"}
_KINDS = {"chat": "questions with answers", "preference": "preference pairs", "text": "plain text"}
_KNOBS = ("epochs", "rank", "learning_rate")
_SHOWN = 5


def local_only(file: Any) -> Any:
    """Gradio's File, for files that this page uploaded and no others: it would fetch an address that is sent as one,
    and, below an app of ours, read any file of the server."""
    import gradio as gr

    move = file.async_move_resource_to_block_cache
    uploads = os.path.realpath(file.GRADIO_CACHE)

    def is_ours(path: str) -> bool:
        return "://" not in path and os.path.realpath(path).startswith(uploads + os.sep)

    async def local(path: Any) -> Any:
        if not is_ours(str(path)):
            raise gr.Error("Upload a file; addresses are not fetched, and files of the server not read.")
        return await move(path)

    file.async_move_resource_to_block_cache = local  # a subclass would make Gradio write a file beside this one
    return file


class Train:
    """The section, wired. `started` is told the id of the job that was ordered last."""

    def __init__(self, client: Client, key: Any, started: Any) -> None:
        import gradio as gr

        self._client, self._key = client, key
        self.file_id = gr.State("")
        self._started = started
        gr.HTML(
            '<div class="hy-house"><h4>Train</h4><p class="hy-empty">on rows (.jsonl, .json) or on a document '
            "(.txt, .md)</p></div>",
            apply_default_css=False,
        )
        self.file = local_only(
            gr.File(label="Training file", show_label=False, file_types=FILE_TYPES, height=120, elem_id="hy-file")
        )
        self.found = gr.HTML("", apply_default_css=False)
        with gr.Row():
            self.name = gr.Textbox(label="Name", placeholder="tickets", max_length=64, scale=1, min_width=140)
            self.method = gr.Dropdown(list(METHODS), value="lora", label="Method", scale=1, min_width=140)
        self.about = gr.Markdown(about("lora"), elem_classes="hy-about", sanitize_html=True, latex_delimiters=[])
        with gr.Accordion("Knobs", open=False):
            with gr.Row():
                self.knobs = [
                    gr.Textbox(label=label, placeholder=usual, max_length=20, min_width=90)
                    for label, usual in zip(("Epochs", "Rank", "Learning rate"), usual_knobs("lora"), strict=True)
                ]
            self.more = gr.Textbox(
                label="More of the recipe", placeholder="batch_size=8\nseed=1", lines=2, max_lines=8,
                info="key=value, one a line; the keys of `hybrid train --set`.",
            )  # fmt: skip
            self.promote = gr.Checkbox(True, label="It takes the name, unless it is measured worse")
        self.start = gr.Button("Start training", variant="primary", interactive=False)
        self.said = gr.HTML("", apply_default_css=False)
        self._wire()

    def _wire(self) -> None:
        import gradio as gr

        async def upload(request: gr.Request, path: str, name: str, key: str) -> list[Any]:
            return await self._upload(key_of(request, key), path, name)

        def choose(method: str) -> list[Any]:
            return [about(method), *[gr.Textbox(placeholder=usual) for usual in usual_knobs(method)]]

        async def start(
            request: gr.Request, file_id: str, name: str, method: str, more: str, promote: bool, key: str,
            epochs: str, rank: str, learning_rate: str,
        ) -> list[Any]:  # fmt: skip
            knobs = (epochs, rank, learning_rate)
            return await self._start(key_of(request, key), file_id, name, method, more, promote, knobs)

        self.file.upload(
            upload,
            [self.file, self.name, self._key],
            [self.file, self.file_id, self.found, self.name, self.method, self.start, self.said],
            show_progress="minimal", show_progress_on=[self.found], api_name="upload",
        )  # fmt: skip
        self.method.change(
            choose, [self.method], [self.about, *self.knobs],
            show_progress="hidden", api_visibility="private", queue=False,
        )  # fmt: skip
        self.start.click(
            start,
            [self.file_id, self.name, self.method, self.more, self.promote, self._key, *self.knobs],
            [self.said, self._started],
            show_progress="minimal", show_progress_on=[self.said], api_name="train",
        )  # fmt: skip

    async def _upload(self, key: str, path: str, name: str) -> list[Any]:
        """Sends the file on and shows what it holds; the copy that the page took goes."""
        import gradio as gr

        file = Path(path)
        try:
            row = await self._client.upload(key, file)
        except HybridError as error:
            return [None, "", refused(error.message), gr.skip(), gr.skip(), gr.Button(interactive=False), ""]
        finally:
            await asyncio.to_thread(file.unlink, missing_ok=True)
        named = name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.")[:64]
        try:
            found = await self._client.check(key, row["id"])
        except HybridError as error:  # a job looks for itself, and says the same where it matters
            return [None, row["id"], refused(error.message), named, gr.skip(), gr.Button(interactive=True), ""]
        ready = gr.Button(interactive=bool(found["ok"]))
        return [None, row["id"], findings(file.name, found), named, USUAL[found["kind"]], ready, ""]

    async def _start(
        self, key: str, file_id: str, name: str, method: str, more: str, promote: bool, knobs: tuple[str, ...]
    ) -> list[Any]:
        import gradio as gr

        try:
            said = [f"{key}={value}" for key, value in zip(_KNOBS, knobs, strict=True) if value.strip()]
            recipe = parse_sets([*said, *filter(str.strip, more.splitlines())])
            ours: JSON = {"method": method, "promote": promote, **recipe}
            if name.strip():
                ours["name"] = name.strip()
            job = await self._client.train(key, {"model": "base", "training_file": file_id, "hybrid": ours})
        except HybridError as error:
            return [refused(error.message), gr.skip()]
        return [f'<p class="hy-empty">Started {esc(job["id"])}.</p>', job["id"]]


def about(method: str) -> str:
    """What there is to know of a method before choosing it."""
    row = METHODS[method]
    return f"**When** {row.use}. **Costs** {row.cost}. **Served** {row.served}."


def usual_knobs(method: str) -> list[str]:
    """What epochs, rank and learning rate are when they are left alone."""
    recipe = Recipe(method=method)
    return [f"{getattr(recipe, key):g}" for key in _KNOBS]


def refused(message: str) -> str:
    """Why it does not go on."""
    return f'<p class="hy-bad" role="alert">{esc(message)}</p>'


def findings(filename: str, found: JSON) -> str:
    """What training would make of a file."""
    rows = found["rows"]
    facts = [
        ("kind", _KINDS.get(found["kind"], found["kind"])),
        ("to learn from", f"{rows['train']:,}"),
        ("to measure on", f"{rows['dev']:,}"),
    ]
    counts = found["counts"]
    dropped = counts["duplicates"] + counts["near_duplicates"] + counts["leaked"]
    if dropped:
        facts.append(("repeated, left out", f"{dropped:,}"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{esc(value)}</dd></div>" for name, value in facts)
    verdict = "" if found["ok"] else refused("Training would refuse it: too much of it cannot be used.")
    return (
        f'<div class="hy-panel"><h4>{esc(filename)}</h4><dl class="hy-facts">{cells}</dl>{verdict}'
        f"{_labels(found['balance']['labels'])}{_complaints(found['complaints'])}</div>"
    )


def _labels(labels: JSON | None) -> str:
    """The most and least frequent labels as bars."""
    if not labels:
        return ""
    counts = {**labels["most"], **labels["least"]}
    top = max(counts.values(), default=1) or 1
    rows = "".join(
        f'<tr><th scope="row">{esc(label[:40])}</th><td><div class="hy-bar"><i style="width:{100 * n / top:.0f}%">'
        f"</i></div></td><td>{n:,}</td></tr>"
        for label, n in counts.items()
    )
    left = labels["distinct"] - len(counts)
    caption = f"{labels['distinct']} labels" + (f", the {left} in the middle not shown" if left else "")
    warning = '<p class="hy-warn">Some labels have no row.</p>' if labels["imbalance"] is None else ""
    return f'<table class="hy-scores"><caption>{caption}</caption>{rows}</table>{warning}'


def _complaints(complaints: list[str]) -> str:
    if not complaints:
        return ""
    items = "".join(f"<li>{esc(line)}</li>" for line in complaints[:_SHOWN])
    more = f"<li>… and {len(complaints) - _SHOWN} more</li>" if len(complaints) > _SHOWN else ""
    return f'<h5>{len(complaints)} rows cannot be used</h5><ul class="hy-folds">{items}{more}</ul>'
