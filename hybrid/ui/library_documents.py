"""The corpora, what is in the one that is looked at, and what is on its way into it. The work is the server's."""
# Annotations are evaluated here (no `from __future__`): Gradio finds the event and the request by their types.

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from hybrid.errors import BadRequest, HybridError
from hybrid.types import JSON
from hybrid.ui.cards import plain
from hybrid.ui.client import Client, key_of
from hybrid.ui.library_views import (
    arrived,
    at_work,
    corpora_table,
    corpus_head,
    documents_table,
    picked_place,
    rebuilding,
)
from hybrid.ui.sure import Sure, pick_list
from hybrid.ui.train import local_only, refused

EVERY_S = 1.0
#: so many documents are listed at first, and more at a time
PAGE = 50
#: which documents are listed, and how the API calls that
STATES = {"all": "", "on their way": "in_progress", "failed": "failed"}
QUESTIONS = {
    "document": "Take **{name}** out of **{corpus}**? No search finds it any more; an uploaded file stays yours.",
    "corpus": "Delete the corpus **{corpus}** with {count} documents? No answer comes from it any more.",
}


class Documents:
    """The section, wired. `corpus` is the id of the one that is looked at; what changes `seen` has the lists painted.

    While a corpus is being read into or made again, and the tab in sight, they are looked at once a second.
    """

    def __init__(self, client: Client, key: Any) -> None:
        import gradio as gr

        self._client, self._key = client, key
        self.corpus = gr.State("")
        self.picked = gr.State("")
        self.seen = gr.HTML("", visible="hidden", apply_default_css=False)  # a state would tell nobody of its change
        self.in_sight = gr.State(False)
        self.most = gr.State(PAGE)
        self.painted = gr.State(("", "", ""))
        self.timer = gr.Timer(EVERY_S, active=False)
        with gr.Row(elem_classes="hy-tools"):
            self.name = gr.Textbox(label="New corpus", placeholder="handbook", max_length=64, scale=3, min_width=140)
            self.create = gr.Button("Create", size="sm", min_width=90, scale=0)
        self.told = gr.HTML("", apply_default_css=False)
        self.corpora = pick_list("hy-corpora")
        with gr.Column(visible=False, elem_id="hy-corpus") as self.view:
            self._lay_corpus()
        self._screen = [
            self.corpora, self.corpus, self.view, self.head, self.list, self.more, self.stop, self.rebuild,
            self.painted, self.timer,
        ]  # fmt: skip
        self._wire()

    def _lay_corpus(self) -> None:
        import gradio as gr

        self.head = gr.HTML("", apply_default_css=False)
        self.files = local_only(
            gr.File(label="Documents", show_label=False, file_count="multiple", height=120, elem_id="hy-drop")
        )
        self.said = gr.HTML("", apply_default_css=False)
        self.state = gr.Radio(list(STATES), value="all", label="Documents", show_label=False, container=False)
        self.list = pick_list("hy-documents")
        with gr.Row(elem_classes="hy-verbs"):
            self.more = gr.Button("More", size="sm", min_width=70, visible=False)
            self.delete = gr.Button("Delete document", size="sm", min_width=130, interactive=False)
            self.rebuild = gr.Button("Re-index", size="sm", min_width=90)
            self.stop = gr.Button("Stop re-indexing", size="sm", min_width=120, visible=False)
            self.drop = gr.Button("Delete corpus", size="sm", min_width=110)
        self.sure = Sure()

    def watch_tabs(self, tab: Any, others: Sequence[Any]) -> None:
        """Looks only while `tab` is the one that is open."""
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        tab.select(lambda: True, None, [self.in_sight], **quiet).then(**self._looking)
        for other in others:
            other.select(lambda: (False, gr.Timer(active=False)), None, [self.in_sight, self.timer], **quiet)

    def _wire(self) -> None:
        import gradio as gr

        quiet: JSON = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        loud: JSON = {"show_progress": "hidden", "api_visibility": "private"}  # a note is shown only from the queue

        async def look(
            request: gr.Request, key: str, corpus: str, state: str, most: int, painted: tuple[str, ...], in_sight: bool
        ) -> list[Any]:
            return await self._painted(key_of(request, key), corpus, state, most, painted, in_sight)

        known = [self._key, self.corpus, self.state, self.most, self.painted, self.in_sight]
        self._looking: JSON = {"fn": look, "inputs": known, "outputs": self._screen, **quiet}
        gr.on([self.timer.tick, self.seen.change], trigger_mode="once", **self._looking)

        async def create(request: gr.Request, name: str, key: str) -> list[Any]:
            return await self._create(key_of(request, key), name)

        gr.on(
            [self.create.click, self.name.submit], create, [self.name, self._key],
            [self.corpus, self.name, self.told, self.picked, self.delete],
            show_progress="hidden", api_name="new_corpus",
        ).then(**self._looking)  # fmt: skip

        async def upload(
            request: gr.Request, files: list[str] | None, corpus: str, key: str
        ) -> AsyncIterator[list[Any]]:
            async for said in self._upload(key_of(request, key), corpus, files or []):
                yield [None, said]

        self.files.upload(
            upload, [self.files, self.corpus, self._key], [self.files, self.said],
            show_progress="minimal", show_progress_on=[self.said], trigger_mode="multiple", api_name="add_documents",
        ).then(**self._looking)  # fmt: skip

        def pick_corpus(event: gr.SelectData) -> list[Any]:
            return [str(event.value), "", gr.Button(interactive=False), PAGE, "", "", *self.sure.closed()]

        self.corpora.select(
            pick_corpus,
            None,
            [self.corpus, self.picked, self.delete, self.most, self.said, self.told, *self.sure.outputs],
            **quiet,
        ).then(**self._looking)

        def pick(event: gr.SelectData) -> list[Any]:
            return [str(event.value), gr.Button(interactive=True), *self.sure.closed()]

        self.list.select(pick, None, [self.picked, self.delete, *self.sure.outputs], **quiet)
        self.state.input(lambda: PAGE, None, [self.most], **quiet).then(**self._looking)
        self.more.click(lambda most: most + PAGE, [self.most], [self.most], **quiet).then(**self._looking)
        self._wire_verbs(quiet, loud)

    def _wire_verbs(self, quiet: JSON, loud: JSON) -> None:
        import gradio as gr

        async def ask(request: gr.Request, kind: str, corpus: str, picked: str, key: str) -> list[Any]:
            return await self._ask(key_of(request, key), kind, corpus, picked)

        async def do(request: gr.Request, what: JSON | None, picked: str, key: str) -> list[Any]:
            done = await self._do(key_of(request, key), what)
            return [*(["", gr.Button(interactive=False)] if done else [picked, gr.skip()]), *self.sure.closed()]

        async def remake(request: gr.Request, corpus: str, key: str, end: bool) -> None:
            try:
                await self._client.rebuild(key_of(request, key), corpus, end=end)
            except HybridError as error:
                gr.Warning(plain(error.message))

        for kind, button in (("document", self.delete), ("corpus", self.drop)):
            button.click(ask, [gr.State(kind), self.corpus, self.picked, self._key], self.sure.outputs, **loud)
        self.done = self.sure.yes.click(
            do, [self.sure.what, self.picked, self._key], [self.picked, self.delete, *self.sure.outputs], **loud
        )
        self.done.then(**self._looking)
        for button, end in ((self.rebuild, False), (self.stop, True)):
            button.click(remake, [self.corpus, self._key, gr.State(end)], None, **loud).then(**self._looking)

    async def _create(self, key: str, name: str) -> list[Any]:
        import gradio as gr

        try:
            if not name.strip():
                raise BadRequest("Give the corpus a name first.", param="name")
            store = await self._client.create_store(key, name.strip())
        except HybridError as error:
            return [gr.skip(), gr.skip(), refused(error.message), gr.skip(), gr.skip()]
        return [store["id"], "", "", "", gr.Button(interactive=False)]

    async def _upload(self, key: str, corpus: str, files: Sequence[str]) -> AsyncIterator[str]:
        """Sends files on into a corpus, one after another, and says how far that is; what is wrong with one is told,
        and the next one sent."""
        sent = 0
        wrong: list[tuple[str, str]] = []
        for done, path in enumerate(map(Path, files), 1):
            why = await self._put(key, corpus, path)
            sent += why is None
            wrong += [] if why is None else [(path.name, why)]
            yield arrived(sent, wrong, len(files) - done)

    async def _put(self, key: str, corpus: str, path: Path) -> str | None:
        """Why a file was not taken; None for one that was. The copy that the page took goes."""
        try:
            file_id = (await self._client.upload(key, path, "assistants"))["id"]
            try:
                await self._client.attach(key, corpus, file_id)
            except HybridError:
                await self._client.discard(key, file_id)
                raise
        except HybridError as error:
            return error.message
        finally:
            await asyncio.to_thread(path.unlink, missing_ok=True)
        return None

    async def _ask(self, key: str, kind: str, corpus: str, picked: str) -> list[Any]:
        """The question before what cannot be taken back."""
        import gradio as gr

        file_id = picked_place(picked)[0] if kind == "document" else ""
        if kind == "document" and not file_id:
            return self.sure.closed()
        try:
            store = await self._client.store(key, corpus)
            name = (await self._client.document(key, corpus, file_id))[0]["hybrid"]["filename"] if file_id else ""
        except HybridError as error:
            gr.Warning(plain(error.message))
            return self.sure.closed()
        count = store["file_counts"]["completed"]
        words = QUESTIONS[kind].format(name=plain(name), corpus=plain(store["name"]), count=count)
        return self.sure.asked({"kind": kind, "corpus": corpus, "document": file_id}, words)

    async def _do(self, key: str, what: JSON | None) -> bool:
        """Does what was confirmed; whether it was done."""
        import gradio as gr

        if what is None:
            return False
        try:
            if what["kind"] == "document":
                await self._client.delete_document(key, what["corpus"], what["document"])
            else:
                await self._client.delete_store(key, what["corpus"])
        except HybridError as error:
            gr.Warning(plain(error.message))
            return False
        return True

    async def _painted(
        self, key: str, corpus: str, state: str, most: int, painted: tuple[str, ...], in_sight: bool
    ) -> list[Any]:
        """The values of `_screen`: the newest corpus where the one that was looked at is gone."""
        import gradio as gr

        still = gr.Timer(active=False)
        if not in_sight:
            return [*[gr.skip()] * 9, still]
        try:
            stores = await self._client.stores(key)
            store = next((one for one in stores if one["id"] == corpus), stores[0] if stores else None)
            files: list[JSON] = []
            more = False
            if store is not None:
                files, more = await self._client.documents(key, store["id"], STATES[state], most)
        except HybridError as error:
            return [refused(error.message), *[gr.skip()] * 7, ("", "", ""), still]
        seen = store["id"] if store else ""
        now = (
            corpora_table(stores, seen),
            corpus_head(store) if store else "",
            documents_table(files, more) if store else "",
        )
        # a list that is painted anew takes the focus from it
        fresh = [gr.skip() if old == new else new for old, new in zip(painted, now, strict=True)]
        making = store is not None and rebuilding(store)
        return [
            fresh[0],
            gr.skip() if seen == corpus else seen,
            gr.Column(visible=store is not None),
            *fresh[1:],
            gr.Button(visible=more),
            gr.Button(visible=making),
            gr.Button(interactive=bool(store and store["hybrid"]["passages"]) and not making),
            now,
            gr.Timer(active=any(map(at_work, stores))),
        ]
