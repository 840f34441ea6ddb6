"""Documents as they lie on disk, read into text. What cannot be read is told with its file, line and reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.knowledge.chunk import markdown_title
from hybrid.prompts import clean

CORPUS = "corpus.jsonl"
MARKDOWN = frozenset([".md", ".markdown"])
TEXT = frozenset([".txt", ".rst"])


@dataclass(frozen=True, slots=True)
class Document:
    """A document before it is cut. `id` is the row's, or the file's path below the folder."""

    id: str
    title: str
    text: str
    markdown: bool = False


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was skipped; `line` is 0 where the whole file was."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


def read(path: Path) -> tuple[list[Document], list[Problem]]:
    """The documents of a folder (of its `corpus.jsonl` alone where there is one) or of one file, and what is wrong.

    Raises DataError when nothing at all can be read: an empty folder is a mistake, never an order to forget.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of documents, or one that holds a {CORPUS}.")
    found = list(_read(path))
    documents = [item for item in found if isinstance(item, Document)]
    problems = [item for item in found if isinstance(item, Problem)]
    if not documents:
        first = f" The first problem: {problems[0]}." if problems else ""
        raise DataError(f"{path} holds no document that can be read (.md, .txt, .rst or a {CORPUS}).{first}")
    return documents, problems


def one_document(id_: str, title: str, text: str | None, file: Path | None) -> Document:
    """A document from its words, or from a file. Raises DataError when there are no words in it."""
    if (text is None) == (file is None):
        raise DataError("Give a document either its text or a file to read it from.", param="file")
    found = Document(id_, title, text) if text is not None else _file(file or Path(), id_)
    if isinstance(found, Problem):
        raise DataError(f"{found.file} cannot be read: {found.reason}.", param="file")
    if not clean(found.text).strip():
        raise DataError(f"The document {id_[:80]!r} is empty.", param="file")
    return replace(found, title=title or found.title)


def _read(path: Path) -> Iterator[Document | Problem]:
    rows = path if path.suffix == ".jsonl" else path / CORPUS
    if rows.is_file():
        yield from _rows(rows)
    elif path.is_file():
        yield _file(path, path.name)
    else:
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                yield _contained(file, path, inside.as_posix())


def _contained(file: Path, root: Path, name: str) -> Document | Problem:
    if not file.resolve().is_relative_to(root.resolve()):
        return Problem(name, 0, "a link that leads out of the folder is not followed")
    return _file(file, name)


def _file(file: Path, name: str) -> Document | Problem:
    suffix = file.suffix.lower()
    if suffix not in MARKDOWN | TEXT:
        return Problem(name, 0, f"files of type {suffix or '(none)'} are not read; .md, .txt and .rst are")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Problem(name, 0, f"not readable as UTF-8 text: {error}")
    if not clean(text).strip():
        return Problem(name, 0, "empty")
    markdown = suffix in MARKDOWN
    return Document(name, markdown_title(text, file.stem) if markdown else file.stem, text, markdown)


def _rows(file: Path) -> Iterator[Document | Problem]:
    """The rows of a JSONL file; a bad one is a problem and the next is read."""
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                document = _row(json.loads(line.decode("utf-8-sig")))
                if document.id in seen:
                    raise ValueError(f"the id {document.id!r} was given on line {seen[document.id]} already")
            except (ValueError, RecursionError) as error:
                yield Problem(file.name, number, str(error) or type(error).__name__)
                continue
            seen[document.id] = number
            yield document


def _row(row: Any) -> Document:
    """One row as a document. Raises ValueError saying what is missing or of the wrong kind."""
    if not isinstance(row, dict):
        raise ValueError('a row is an object like {"id": "...", "title": "...", "text": "..."}')
    values: list[Any] = [row.get("id"), row.get("title") or "", row.get("text")]
    for key, value in zip(("id", "title", "text"), values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"`{key}` is {'missing' if value is None else 'not a string'}")
        value.encode()  # a lone surrogate is valid JSON and no text; UnicodeEncodeError is a ValueError
    if not values[0].strip() or not clean(values[2]).strip():
        raise ValueError(f"`{'text' if values[0].strip() else 'id'}` is empty")
    return Document(*values)
