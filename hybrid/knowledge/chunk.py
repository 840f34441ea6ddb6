"""Cuts a document into passages: at its headings first, then, where a section is long, where the text itself breaks.

The cutting inside a section is semchunk's: the largest pieces that fit, split at paragraphs before sentences before
words. Every piece knows where it lies in the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: a text this much over the limit stays whole: a sliver of a few tokens is no use to a reader
SLACK = 1.25
JOINT = " › "
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")

CountTokens = Callable[[Sequence[str]], list[int]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A passage to be: `text` is the document from `start` to `end` (in characters)."""

    title: str
    text: str
    start: int
    end: int


class Chunker:
    """Cuts to `limit` tokens as `count` counts them."""

    def __init__(self, count: CountTokens, limit: int) -> None:
        self._count = count
        self._limit = limit
        self._split: Callable[..., tuple[list[str], list[tuple[int, int]]]] | None = None

    @property
    def rule(self) -> str:
        """What a cut depends on besides the text: a document is cut again when this changes."""
        return f"headings+semchunk/{self._limit}"

    def cut(self, title: str, text: str, *, markdown: bool = False) -> list[Piece]:
        """The passages of one document, in order. A document that fits is one passage: all of it."""
        if self._fits(text):
            return [_stripped(title, text, 0, len(text))]
        sections = list(_sections(title, text)) if markdown else [_stripped(title, text, 0, len(text))]
        return [piece for section in sections if section.text for piece in self._cut_section(section)]

    def _cut_section(self, section: Piece) -> Iterator[Piece]:
        if self._fits(section.text):
            yield section
            return
        texts, offsets = self._splitter()(section.text, offsets=True)
        for piece, (start, end) in zip(texts, offsets, strict=True):
            yield Piece(section.title, piece, section.start + start, section.start + end)

    def _fits(self, text: str) -> bool:
        room = int(self._limit * SLACK)
        return len(text) <= room or self._count([text])[0] <= room

    def _splitter(self) -> Callable[..., tuple[list[str], list[tuple[int, int]]]]:
        if self._split is None:
            import semchunk

            self._split = semchunk.chunkerify(lambda text: self._count([text])[0], self._limit, cache_maxsize=4096)
        return self._split


def markdown_title(text: str, otherwise: str) -> str:
    """The first top heading of a Markdown text, or `otherwise`."""
    return next((title for level, title, _, _ in _headings(text) if level == 1), otherwise)


def _headings(text: str) -> Iterator[tuple[int, str, int, int]]:
    """Every heading outside code: its level, words, and where its line starts and ends."""
    fence = ""
    start = 0
    for line in text.splitlines(keepends=True):
        end = start + len(line)
        if mark := _FENCE.match(line):
            fence = "" if fence == mark[1] else fence or mark[1]
        elif not fence and (heading := _HEADING.match(line.rstrip("\r\n"))):
            yield len(heading[1]), heading[2], start, end
        start = end


def _sections(title: str, text: str) -> Iterator[Piece]:
    """The text between headings, each under its path of headings: `Document › Section › Part`."""
    path: dict[int, str] = {}
    start = 0
    for level, words, heading_start, heading_end in _headings(text):
        yield _stripped(_path(title, path), text, start, heading_start)
        path = {depth: name for depth, name in path.items() if depth < level} | {level: words}
        start = heading_end
    yield _stripped(_path(title, path), text, start, len(text))


def _path(title: str, headings: dict[int, str]) -> str:
    names = list(headings.values())
    return JOINT.join(names if names[:1] == [title] else [title, *names])


def _stripped(title: str, text: str, start: int, end: int) -> Piece:
    """The text from `start` to `end` without the blanks around it."""
    inner = text[start:end]
    start += len(inner) - len(inner.lstrip())
    inner = inner.strip()
    return Piece(title, inner, start, start + len(inner))
