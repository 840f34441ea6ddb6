"""A search in one corpus with the score of every stage, the document that a passage stands in, and the map."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

from typing import Any

from hybrid.errors import HybridError
from hybrid.types import JSON
from hybrid.ui.client import Client, key_of
from hybrid.ui.library_map import EMPTY, HOVER_JS, WAYS, picture
from hybrid.ui.library_views import document_view, hits_list, picked_place, place
from hybrid.ui.sure import pick_list
from hybrid.ui.train import refused

#: passages that a search shows, and points of a map
HITS, SPOTS = 10, 1_500
#: what was opened is brought into sight
SHOW_JS = """
watch('value', () => {
  const here = element.querySelector('.hy-here') || element.querySelector('.hy-document');
  if (here) here.scrollIntoView({block: 'nearest', behavior: 'smooth'});
});
"""


class Search:
    """The section, wired; `corpus` holds the id of the corpus that is searched."""

    def __init__(self, client: Client, key: Any, corpus: Any) -> None:
        import gradio as gr

        self._client, self._key, self._corpus = client, key, corpus
        self.shown = gr.State("")
        self.found = gr.State(("", ()))
        self.drawn = gr.State(None)
        with gr.Column(visible=False) as self.view:
            with gr.Row(elem_classes="hy-tools"):
                self.query = gr.Textbox(
                    label="Search this corpus", placeholder="when does the ferry leave?", max_length=2000, scale=5,
                    elem_id="hy-query",
                )  # fmt: skip
                self.go = gr.Button("Search", variant="primary", size="sm", min_width=90, scale=0)
            self.hits = pick_list("hy-hits")
            self.page = gr.HTML("", js_on_load=SHOW_JS, elem_id="hy-page", apply_default_css=False)
            with gr.Row(elem_classes="hy-tools"):
                self.by = gr.Radio(list(WAYS), value=WAYS[0], label="Map, coloured by", scale=3, min_width=180)
                self.draw = gr.Button("Draw the map", size="sm", min_width=110, scale=0)
            self.map = pick_list("hy-map", HOVER_JS)
        self._wire()

    def _wire(self) -> None:
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        async def search(request: gr.Request, query: str, corpus: str, key: str) -> list[Any]:
            return await self._search(key_of(request, key), corpus, query.strip())

        async def draw(
            request: gr.Request, query: str, by: str, corpus: str, found: tuple[str, tuple[str, ...]], key: str
        ) -> list[Any]:
            return await self._draw(key_of(request, key), corpus, query.strip(), by, found)

        async def again(
            request: gr.Request, query: str, by: str, corpus: str, found: tuple[str, tuple[str, ...]], key: str,
            drawn: JSON | None,
        ) -> list[Any]:  # fmt: skip
            if drawn is None:
                return [gr.skip(), gr.skip()]
            return await self._draw(key_of(request, key), corpus, query.strip(), by, found)

        def recolour(by: str, drawn: JSON | None, found: tuple[str, tuple[str, ...]]) -> Any:
            return gr.skip() if drawn is None else picture(drawn, by, found[1])

        asked = [self.query, self.by, self._corpus, self.found, self._key]
        gr.on(
            [self.go.click, self.query.submit], search, [self.query, self._corpus, self._key],
            [self.hits, self.found, self.page],
            show_progress="minimal", show_progress_on=[self.hits], api_name="search_corpus",
        ).then(again, [*asked, self.drawn], [self.drawn, self.map], **quiet)  # fmt: skip
        self.draw.click(
            draw, asked, [self.drawn, self.map],
            show_progress="minimal", show_progress_on=[self.map], api_name="map_corpus",
        )  # fmt: skip
        self.by.input(recolour, [self.by, self.drawn, self.found], [self.map], **quiet)
        for each in (self.hits, self.map):
            self.opens(each)

    def follows(self, corpora: Any) -> None:
        """Starts afresh when the list of corpora, painted anew, has another one to be searched."""
        import gradio as gr

        def follow(corpus: str, shown: str) -> list[Any]:
            if corpus == shown:
                return [gr.skip()] * 7
            return [corpus, gr.Column(visible=bool(corpus)), "", ("", ()), "", None, EMPTY]

        corpora.change(
            follow, [self._corpus, self.shown],
            [self.shown, self.view, self.hits, self.found, self.page, self.drawn, self.map],
            show_progress="hidden", api_visibility="private", queue=False,
        )  # fmt: skip

    def opens(self, rows: Any) -> None:
        """Has a row that is picked open the passage, or the document, that it names."""
        import gradio as gr

        async def show(event: gr.SelectData, request: gr.Request, corpus: str, key: str) -> str:
            return await self._shown(key_of(request, key), corpus, str(event.value))

        rows.select(
            show, [self._corpus, self._key], [self.page],
            show_progress="minimal", show_progress_on=[self.page], api_visibility="private",
        )  # fmt: skip

    async def _search(self, key: str, corpus: str, query: str) -> list[Any]:
        if not query:
            return [refused("Say what to search for."), ("", ()), ""]
        try:
            hits = await self._client.search(key, corpus, query, HITS)
        except HybridError as error:
            return [refused(error.message), ("", ()), ""]
        return [hits_list(hits), (query, tuple(place(hit["file_id"], hit["filename"]) for hit in hits)), ""]

    async def _draw(self, key: str, corpus: str, query: str, by: str, found: tuple[str, tuple[str, ...]]) -> list[Any]:
        """The map, with what a search for this very query found marked in it."""
        try:
            told = await self._client.chart(key, corpus, query, SPOTS)
        except HybridError as error:
            return [None, refused(error.message)]
        return [told, picture(told, by, found[1] if found[0] == query else ())]

    async def _shown(self, key: str, corpus: str, picked: str) -> str:
        file_id, passage = picked_place(picked)
        if not file_id:
            return ""
        try:
            file, parts = await self._client.document(key, corpus, file_id)
        except HybridError as error:
            return refused(error.message)
        return document_view(file, parts, passage)
