"""Cuts a document into passages: at its headings first, then, where a section is long, where the text itself breaks.

The cutting inside a section is semchunk's: the largest pieces that fit, split at paragraphs before sentences before
words. A Markdown table stays whole, and one that is far too long is cut between its rows, the names of its columns in
every title. Every piece knows where it lies in the document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

#: a text this much over the limit stays whole: a sliver of a few tokens is no use to a reader
SLACK = 1.25
JOINT = " › "
#: a table up to so many times the limit stays whole: half a table answers no question
TABLE = 3
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
#: a table's head, the line of dashes below it, and its rows
_TABLE = re.compile(r"^ {0,3}\|.*\|[ \t]*\n {0,3}\|[ \t:|-]+\|[ \t]*(?:\n {0,3}\|.*)*", re.MULTILINE)
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
    """Cuts to `limit` tokens as `count` counts them; neighbours cut from one section share `overlap` tokens."""

    def __init__(self, count: CountTokens, limit: int, overlap: int = 0) -> None:
        self._count = count
        self._limit = limit
        self._overlap = min(overlap, limit // 2)
        self._split: Callable[..., tuple[list[str], list[tuple[int, int]]]] | None = None

    @property
    def rule(self) -> str:
        """What a cut depends on besides the text: a document is cut again when this changes."""
        return f"headings+tables+semchunk/{self._limit}/{self._overlap}"

    def cut(self, title: str, text: str, *, markdown: bool = False) -> list[Piece]:
        """The passages of one document, in order. A document that fits is one passage: all of it."""
        if self._fits(text):
            return [_stripped(title, text, 0, len(text))]
        sections = list(_sections(title, text)) if markdown else [_stripped(title, text, 0, len(text))]
        return [piece for section in sections if section.text for piece in self._cut_section(section, markdown)]

    def _cut_section(self, section: Piece, markdown: bool) -> Iterator[Piece]:
        if self._fits(section.text):
            yield section
            return
        done = 0
        for table in _TABLE.finditer(section.text) if markdown else ():
            yield from self._cut_prose(_within(section, done, table.start()))
            yield from self._cut_table(_within(section, *table.span()))
            done = table.end()
        yield from self._cut_prose(_within(section, done, len(section.text)))

    def _cut_prose(self, part: Piece) -> Iterator[Piece]:
        if not part.text or self._fits(part.text):
            yield from [part] if part.text else []
            return
        texts, offsets = self._splitter()(part.text, offsets=True, overlap=self._overlap or None)
        for piece, (start, end) in zip(texts, offsets, strict=True):
            yield Piece(part.title, piece, part.start + start, part.start + end)

    def _cut_table(self, table: Piece) -> Iterator[Piece]:
        """The table, or runs of its rows under a title that names its columns."""
        if self._fits(table.text, TABLE):
            yield table
            return
        columns = table.text.split("\n", 1)[0].strip(" |\t")
        named = Piece(f"{table.title}{JOINT}{columns}", table.text, table.start, table.end)
        lines = table.text.splitlines(keepends=True)
        start = end = tokens = 0
        for line, count in zip(lines, self._count(lines), strict=True):
            if tokens and tokens + count > self._limit:
                yield _within(named, start, end)
                start, tokens = end, 0
            end += len(line)
            tokens += count
        yield _within(named, start, end)

    def _fits(self, text: str, slack: float = SLACK) -> bool:
        room = int(self._limit * slack)
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


def _within(piece: Piece, start: int, end: int) -> Piece:
    """A part of a piece, from `start` to `end` in its text."""
    part = _stripped(piece.title, piece.text, start, end)
    return Piece(part.title, part.text, piece.start + part.start, piece.start + part.end)


def _stripped(title: str, text: str, start: int, end: int) -> Piece:
    """The text from `start` to `end` without the blanks around it."""
    inner = text[start:end]
    start += len(inner) - len(inner.lstrip())
    inner = inner.strip()
    return Piece(title, inner, start, start + len(inner))
