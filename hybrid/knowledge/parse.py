"""Files of many kinds, turned into text: kept libraries do the reading, and this says what of it is words.

What runs here runs in a process with limits (`confined.py`): strangers write these files. HTML, and DOCX by way of
HTML, become Markdown, so that the chunker sees their headings and tables.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hybrid.knowledge.chunk import markdown_title

#: raised when the same bytes would become another text: every file is then read again
RULE = "read-1"
#: an encoding that is guessed must look this much like a language (charset-normalizer's coherence, 0..1)
COHERENT = 0.2
#: what stands on every page of a site and says nothing
_FURNITURE = ("script", "style", "noscript", "template", "nav", "footer", "aside", "form", "iframe", "svg")
_TITLES = ("title", "name", "heading", "subject")


@dataclass(frozen=True, slots=True)
class Part:
    """The words of a file, or of one row of it: then `key` is the row's id, or its number, and `line` that number."""

    title: str
    text: str
    markdown: bool = False
    key: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be read."""

    line: int
    reason: str


Parsed = Iterator[Part | Fault]


def parse(file: Path, suffix: str, name: str) -> Parsed:
    """The words of a file whose type is `suffix`; `name` is its title where it has none of its own.

    Raises ValueError, with the reason in words, for what is broken; a library's own exceptions pass through.
    """
    with file.open("rb") as stream:
        yield from KINDS[suffix](stream, name)


def _markdown(stream: IO[bytes], name: str) -> Parsed:
    text = _decoded(stream.read())
    yield Part(markdown_title(text, name), text, markdown=True)


def _text(stream: IO[bytes], name: str) -> Parsed:
    yield Part(name, _decoded(stream.read()))


def _html(stream: IO[bytes], name: str) -> Parsed:
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(stream.read(), "html.parser")  # bytes: the page says its own encoding
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    if soup.head:
        soup.head.decompose()
    for furniture in soup(_FURNITURE):
        furniture.decompose()
    text = _as_markdown(soup.find("main") or soup.find("article") or soup)
    yield Part(title or markdown_title(text, name), text, markdown=True)


def _docx(stream: IO[bytes], name: str) -> Parsed:
    import mammoth
    from bs4 import BeautifulSoup

    found = mammoth.convert_to_html(stream, convert_image=lambda _: [])
    text = _as_markdown(BeautifulSoup(found.value, "html.parser"))
    yield Part(markdown_title(text, name), text, markdown=True)


def _as_markdown(soup: Any) -> str:
    from markdownify import MarkdownConverter

    # links and pictures are for eyes; a first row is a table's head, so that its columns have names
    converter = MarkdownConverter(heading_style="ATX", strip=["a", "img"], table_infer_header=True, escape_misc=False)
    return str(converter.convert_soup(soup)).strip()


def _pdf(stream: IO[bytes], name: str) -> Parsed:
    from pypdf import PdfReader

    reader = PdfReader(stream)
    if reader.is_encrypted and not reader.decrypt(""):
        raise ValueError("it is encrypted; save it without a password")
    title = (reader.metadata.title if reader.metadata else None) or name
    pages = [page.extract_text() for page in reader.pages]
    if not any(page.strip() for page in pages):
        raise ValueError("its pages hold no text; a scan must go through text recognition first")
    yield Part(str(title), "\n\n".join(pages))


def _table(delimiter: str) -> Callable[[IO[bytes], str], Parsed]:
    def rows(stream: IO[bytes], name: str) -> Parsed:
        csv.field_size_limit(1 << 30)  # the size of the file is the limit
        reader = csv.DictReader(io.StringIO(_decoded(stream.read()), newline=""), delimiter=delimiter)
        if not reader.fieldnames:
            raise ValueError("it has no first line with the names of its columns")
        for row in reader:
            extra = [value for value in row.pop(None, []) if value]
            if extra:
                yield Fault(reader.line_num, "the row has more fields than the first line has names")
            else:
                yield _row(row, reader.line_num, name)

    return rows


def _json_lines(stream: IO[bytes], name: str) -> Parsed:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield _row(json.loads(line.decode("utf-8-sig")), number, name)
            except (ValueError, RecursionError) as error:
                yield Fault(number, str(error) or "nested too deep")


def _json(stream: IO[bytes], name: str) -> Parsed:
    value = json.loads(_decoded(stream.read()))
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        try:
            yield _row(row, number, name)
        except ValueError as error:
            yield Fault(number, str(error))


def _row(row: Any, number: int, name: str) -> Part:
    """A row with a `text` is that text; of another every field is told, `name: value` a line."""
    if not isinstance(row, dict):
        raise ValueError("a row is an object with named fields")
    fields = {str(key): value for key, value in row.items() if value not in (None, "")}
    key = str(fields.get("id", number))
    title = next((str(fields[t]) for t in _TITLES if t in fields), name)
    text = fields.get("text")
    if not isinstance(text, str):
        told = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in fields.items()}
        text = "\n".join(f"{k}: {v}" for k, v in told.items())
    f"{key}{title}{text}".encode()  # a lone surrogate is valid JSON and no text; UnicodeEncodeError is a ValueError
    return Part(title, text, key=key, line=number)


def _decoded(content: bytes) -> str:
    """UTF-8, or UTF-16 that says so, or what the bytes look like most; ValueError when that would be a guess."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = _guessed(content)
    if "\0" in text:
        raise ValueError("it holds bytes that are no text")
    return text


def _guessed(content: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(content).best() if b"\0" not in content else None
    if best is None or best.coherence < COHERENT:
        raise ValueError("its encoding is not UTF-8 and cannot be told from its bytes; save it as UTF-8")
    return str(best)


#: by suffix, how a file is read
KINDS: dict[str, Callable[[IO[bytes], str], Parsed]] = {
    **dict.fromkeys((".md", ".markdown"), _markdown),
    **dict.fromkeys((".txt", ".text", ".rst"), _text),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _html),
    ".pdf": _pdf,
    ".docx": _docx,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json,
}
#: those whose rows are documents of their own
ROWS = frozenset([".csv", ".tsv", ".jsonl", ".ndjson", ".json"])
