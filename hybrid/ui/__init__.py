"""The face: a page at `/` that talks to the gateway over HTTP, as any client does, with the caller's own key."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from hybrid.settings import Settings, offline_environment
from hybrid.ui.chat import Chat
from hybrid.ui.client import Client
from hybrid.ui.compare import Compare
from hybrid.ui.evaluate import Evaluate
from hybrid.ui.guard import Guard
from hybrid.ui.house import trouble_line
from hybrid.ui.jobs import Jobs
from hybrid.ui.library import Library
from hybrid.ui.shelf import Shelf
from hybrid.ui.status import Status
from hybrid.ui.theme import CSS, TITLE, theme
from hybrid.ui.train import Train

if TYPE_CHECKING:
    from fastapi import FastAPI

#: streams and polls of several people at once; a stream holds one place for as long as it lasts
CONCURRENCY = 64
#: an upload whose page went away before it was sent on
_STALE_S = 3600


def build_ui(base_url: str | None, settings: Settings) -> Any:
    """The page as a `gradio.Blocks`. Without `base_url` it calls the address in the settings."""
    import gradio as gr

    client = Client(base_url or f"http://{settings.server.host}:{settings.server.port}")
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(_STALE_S, _STALE_S)) as page:
        line = gr.HTML(trouble_line("Looking for the gateway…"), apply_default_css=False)
        key = gr.Textbox(
            label="API key",
            info="Sent with every question; kept in this browser alone.",
            type="password",
            visible=False,
            elem_id="hy-key",
        )
        with gr.Tab("Chat") as chatting:
            chat = Chat(client, settings, key)
        with gr.Tab("Compare") as comparing:
            compare = Compare(client, settings, key)
        with gr.Tab("Library", elem_id="hy-library-tab") as reading:
            library = Library(client, key)
        started = gr.State("")
        with gr.Tab("Adapters", elem_id="hy-house-tab") as adapters, gr.Row():
            with gr.Column(scale=3, min_width=320):
                shelf = Shelf(client, key)
                jobs = Jobs(client, key, shelf.seen, started)
            with gr.Column(scale=2, min_width=300):
                Train(client, key, started)
        with gr.Tab("Evaluate", elem_id="hy-eval-tab") as evaluating:
            evaluate = Evaluate(client, key)
        library.watch_tabs(reading, [chatting, comparing, adapters, evaluating])
        jobs.watch_tabs(adapters, [chatting, comparing, reading, evaluating])
        evaluate.watch_tabs(evaluating, [chatting, comparing, reading, adapters])
        _remember(page, key)
        screen = [line, shelf.table, library.seen, jobs.table, shelf.seen, jobs.seen]
        Status(client, screen=screen, key=key, pickers=[chat.model, *compare.models]).poll(page)
    page.queue(default_concurrency_limit=CONCURRENCY, api_open=False)
    return page


def mount_ui(app: FastAPI, settings: Settings, base_url: str | None = None) -> None:
    """Puts the face at `/` of a server whose API routes are there already (the first route that matches wins).

    Importing Gradio takes seconds: call this once, at start. `base_url` is where the app will answer.
    """
    offline_environment()
    import gradio as gr

    gr.mount_gradio_app(
        app,
        build_ui(base_url, settings),
        path="/",
        theme=theme(),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        allowed_paths=[],
        blocked_paths=[str(settings.rooms.root), str(settings.cache)],
        max_file_size=settings.server.max_file_bytes,
    )
    face = app.routes[-1]
    face.app = Guard(face.app)  # type: ignore[attr-defined]


def _remember(page: Any, key: Any) -> None:
    """Keeps the typed key in the browser's own storage, and nowhere else."""
    import gradio as gr

    kept = gr.BrowserState("", storage_key="hybrid-key")
    quiet: MutableMapping[str, Any] = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
    page.load(lambda value: gr.Textbox(value=value, visible=bool(value)), [kept], [key], **quiet)
    key.blur(lambda value: value, [key], [kept], **quiet)
    key.submit(lambda value: value, [key], [kept], **quiet)
