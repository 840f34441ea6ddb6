"""Long documents are cut at their headings, by the model's own tokens, and every piece knows where it lies."""

from __future__ import annotations

import pytest

from hybrid.knowledge.chunk import Chunker
from hybrid.knowledge.embed import Embedder
from hybrid.models import materialise
from hybrid.settings import Settings

PARAGRAPH = "The ferry to the island leaves at nine and returns at noon, unless the wind is from the north. "


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    settings = Settings.load()
    files = materialise(settings.embedder, settings.cache)
    return Embedder(files.path, files.name)


def test_tokens_are_counted_beyond_what_the_model_reads(embedder: Embedder) -> None:
    short, long = embedder.count_tokens(["one two three", "word " * 3000])
    assert short == 3
    assert long == 3000


def test_a_long_markdown_document_is_cut_at_its_headings(embedder: Embedder) -> None:
    text = f"# Ferries\n\n{PARAGRAPH * 4}\n\n## Winter\n\n{PARAGRAPH * 40}\n\n## Fares\n\nA ticket costs four crowns.\n"
    pieces = Chunker(embedder.count_tokens, 200).cut("Ferries", text, markdown=True)
    assert {piece.title for piece in pieces} == {"Ferries", "Ferries › Winter", "Ferries › Fares"}
    assert len([piece for piece in pieces if piece.title == "Ferries › Winter"]) > 3
    for piece in pieces:
        assert text[piece.start : piece.end] == piece.text
        assert embedder.count_tokens([piece.text])[0] <= 250
