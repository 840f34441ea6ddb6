"""The tab Library: what the corpora hold and what is on its way; a search with every stage's score; a map."""

from __future__ import annotations

from typing import Any

from hybrid.ui.client import Client
from hybrid.ui.library_documents import Documents
from hybrid.ui.library_search import Search


class Library:
    """The tab, wired. What changes `seen` (the status line's corpora) has the lists painted anew."""

    def __init__(self, client: Client, key: Any) -> None:
        import gradio as gr

        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                documents = Documents(client, key)
            with gr.Column(scale=3, min_width=320):
                search = Search(client, key, documents.corpus)
        search.follows(documents.corpora)
        search.opens(documents.list)
        # a document that was taken away is not looked at any more
        documents.done.then(
            lambda picked: gr.skip() if picked else "", [documents.picked], [search.page],
            show_progress="hidden", api_visibility="private", queue=False,
        )  # fmt: skip
        self.watch_tabs = documents.watch_tabs
        self.seen = documents.seen
