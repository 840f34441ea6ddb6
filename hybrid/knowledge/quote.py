"""What a passage says to a question, word for word: what a person can hold an answer against.

A small model often says something else than the passage it was shown. Where a corpus has a reader, the sentence is the
one that holds the words it points at; elsewhere the one nearest to the question. A short one is quoted with what
follows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from hybrid.knowledge.embed import Embedder
from hybrid.knowledge.reader import Reader, as_read
from hybrid.types.passage import Passage

#: words of a quote at most; of a longer sentence those around the words that answer
MOST = 60
#: words of a sentence and those after it that are quoted together
TOGETHER = 40
#: sentences of one passage that are compared with the question
_COMPARED = 32
_END = re.compile(r"(?<=[.!?])([\"'”’)\]]*)\s+(?=[^\sa-z])|(?<=[。！？])|\n{2,}")
_WORD = re.compile(r"\w+")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Quote:
    """Sentences as they stand in a passage, but for their blanks; `answer` are the words in them that answer, where a
    reader pointed at them."""

    text: str
    answer: str = ""

    def is_said_in(self, text: str) -> bool:
        """Whether a text holds the words that answer, or the whole quote where none are known."""
        return f" {_plain(self.answer or self.text)} " in f" {_plain(text)} "


def quote(question: str, passage: Passage, embedder: Embedder, reader: Reader | None) -> Quote | None:
    """What a passage says to a question; None of one without words."""
    text = passage.text.strip()
    sentences = _sentences(text)
    if not sentences:
        return None
    answer = _pointed_at(question, passage, text, reader) if reader else (0, 0)
    holding = [n for n, span in enumerate(sentences) if span[0] < answer[1] and answer[0] < span[1]]
    first, last = (holding[0], holding[-1]) if holding else [_nearest(question, text, sentences, embedder)] * 2
    start, end = sentences[first][0], sentences[last][1]
    for _, later in sentences[last + 1 :]:
        if len(text[start:later].split()) > TOGETHER:
            break
        end = later
    return Quote(_shortened(text, (start, end), answer), text[slice(*answer)])


def _pointed_at(question: str, passage: Passage, text: str, reader: Reader) -> Span:
    """The words of the text that a reader points at; (0, 0) where those are the title's, or none."""
    whole = as_read(passage)
    before = len(whole) - len(text)
    start, end = (place - before for place in reader.point(question, whole))
    return (start, end) if 0 <= start < end else (0, 0)


def _sentences(text: str) -> list[Span]:
    ends = [(match.end(1) if match[1] else match.start(), match.end()) for match in _END.finditer(text)]
    begins = [0, *(end for _, end in ends)]
    spans = zip(begins, [*(start for start, _ in ends), len(text)], strict=True)
    return [span for span in spans if _WORD.search(text, *span)]


def _nearest(question: str, text: str, sentences: list[Span], embedder: Embedder) -> int:
    vectors = embedder.embed_queries([text[slice(*span)] for span in sentences[:_COMPARED]])
    return int(np.argmax(vectors @ embedder.embed_query(question)))


def _shortened(text: str, part: Span, answer: Span) -> str:
    """A part of a text with single blanks, or `MOST` words of it with those that answer in their middle."""
    found = list(re.finditer(r"\S+", text[slice(*part)]))
    middle = sum(match.end() + part[0] <= answer[0] for match in found)
    start = max(0, min(middle - MOST // 2, len(found) - MOST))
    kept = " ".join(match.group() for match in found[start : start + MOST])
    return f"{'… ' if start else ''}{kept}{' …' if start + MOST < len(found) else ''}"


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.casefold()))
