"""Documents as they lie on disk, read into text. What cannot be read is told with its file, line and reason.

A file is one document; of a table or a file of JSON rows every row is one. A file whose bytes are those of the last
time is not parsed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.errors import DataError
from hybrid.knowledge.parse import KINDS, ROWS, RULE, Fault, Part
from hybrid.knowledge.parser import Limits, Parser
from hybrid.prompts import clean
from hybrid.rooms import sha256_file

CORPUS = "corpus.jsonl"
MARKDOWN = frozenset([".md", ".markdown"])
TEXT = frozenset([".txt", ".rst"])
READABLE = f"{', '.join(KINDS)} and {CORPUS}"

Unchanged = Callable[[str, str], bool]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Document:
    """A document before it is cut. `id` is the row's, or the file's path below the folder.

    `path` is the file it was read from, and `stamp` changes whenever what was read does.
    """

    id: str
    title: str
    text: str
    markdown: bool = False
    path: str = ""
    stamp: str = ""


@dataclass(frozen=True, slots=True)
class Same:
    """A document that is as it was."""

    id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that was skipped; `line` is 0 where the whole file was.

    `kept` says that the file may well hold what was read from it before: an ingest leaves that where it is.
    """

    file: str
    line: int
    reason: str
    kept: bool = False

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.reason}" + ("; what was read from it before stays" if self.kept else "")


Found = Document | Same | Problem


def read(path: Path) -> tuple[list[Document], list[Problem]]:
    """The documents of a folder (of its `corpus.jsonl` alone where there is one) or of one file, and what is wrong.

    Raises DataError when nothing at all can be read: an empty folder is a mistake, never an order to forget.
    """
    with Parser(Limits()) as parser:
        found = scan(path, parser)
    documents = [item for item in found if isinstance(item, Document)]
    return documents, [item for item in found if isinstance(item, Problem)]


def scan(
    path: Path,
    parser: Parser,
    unchanged: Unchanged = lambda _id, _stamp: False,
    progress: Progress = lambda _done, _total: None,
) -> list[Found]:
    """Like `read`; a document of which `unchanged(id, stamp)` is true comes as Same. Files in order, then rows."""
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of documents, or one that holds a {CORPUS}.")
    found = list(_once(_scan(path, parser, unchanged, progress)))
    if all(isinstance(item, Problem) for item in found):
        first = f" The first problem: {found[0]}." if found else ""
        raise DataError(f"{path} holds no document that can be read ({READABLE}).{first}")
    return found


def one_document(id_: str, title: str, text: str | None, file: Path | None, limits: Limits) -> Document:
    """A document from its words, or from a file, whose rows are then one text. Raises DataError without any words."""
    if (text is None) == (file is None):
        raise DataError("Give a document either its text or a file to read it from.", param="file")
    with Parser(limits) as parser:
        found = _document(id_, title, text or "") if file is None else _whole(file, id_, title, parser)
    if not clean(found.text).strip():
        raise DataError(f"The document {id_[:80]!r} is empty.", param="file")
    return found


def _whole(file: Path, id_: str, title: str, parser: Parser) -> Document:
    """A file as one document."""
    try:
        parts, _ = _parts(file, parser)
    except (OSError, DataError) as error:
        raise DataError(f"{file.name} cannot be read: {error}.", param="file") from error
    text = "\n\n".join(part.text for part in parts)
    own = parts[0].title if len(parts) == 1 else file.stem
    return _document(id_, title or own, text, markdown=any(part.markdown for part in parts))


def _once(found: Iterable[Found]) -> Iterator[Found]:
    """Every id once: a later document of the same id is a problem."""
    seen: dict[str, str] = {}
    for item in found:
        if isinstance(item, Document) and (first := seen.setdefault(item.id, item.path)) != item.path:
            yield Problem(item.path, 0, f"the id {item.id!r} was given by {first} already")
        else:
            yield item


def _scan(path: Path, parser: Parser, unchanged: Unchanged, progress: Progress) -> Iterator[Found]:
    rows = path if path.suffix == ".jsonl" else path / CORPUS
    if rows.is_file():
        yield from _corpus(rows, unchanged)
        return
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _is_visible(file, path)]
    root = path.parent if path.is_file() else path
    for done, file in enumerate(files, 1):
        yield from _contained(file, root, parser, unchanged)
        progress(done, len(files))


def _is_visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _contained(file: Path, root: Path, parser: Parser, unchanged: Unchanged) -> Iterator[Found]:
    name = file.relative_to(root).as_posix()
    suffix = file.suffix.lower()
    try:
        name.encode()
        if not file.resolve().is_relative_to(root.resolve()):
            yield Problem(name, 0, "a link that leads out of the folder is not followed")
        elif suffix not in KINDS:
            yield Problem(name, 0, f"files of type {suffix or '(none)'} are not read; {READABLE} are")
        elif suffix in ROWS:
            yield from _rows(file, name, parser, unchanged)
        else:
            yield _file(file, name, parser, unchanged)
    except UnicodeEncodeError:
        yield Problem(ascii(name), 0, "its name is no text")
    except (OSError, DataError) as error:
        yield Problem(name, 0, str(error), kept=True)


def _file(file: Path, name: str, parser: Parser, unchanged: Unchanged) -> Found:
    stamp = f"{RULE}:{sha256_file(file)}"
    if unchanged(name, stamp):
        return Same(name)
    [part], _ = _parts(file, parser)
    if not clean(part.text).strip():
        return Problem(name, 0, "empty")
    return Document(name, part.title, part.text, part.markdown, name, stamp)


def _rows(file: Path, name: str, parser: Parser, unchanged: Unchanged) -> Iterator[Found]:
    """The rows of a file as documents `file:key`; a bad one is a problem and the next is read."""
    parts, faults = _parts(file, parser)
    yield from (Problem(name, fault.line, fault.reason) for fault in faults)
    seen: dict[str, int] = {}
    for part in parts:
        if part.key in seen:
            yield Problem(name, part.line, f"the id {part.key!r} was given on line {seen[part.key]} already")
        elif not clean(part.text).strip():
            yield Problem(name, part.line, "empty")
        else:
            seen[part.key] = part.line
            yield _same(_document(f"{name}:{part.key}", part.title, part.text, path=name), unchanged)


def _corpus(file: Path, unchanged: Unchanged) -> Iterator[Found]:
    """The rows of a corpus file, a line at a time: it may be larger than any other file."""
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                document = _row(json.loads(line.decode("utf-8-sig")), file.name)
                if document.id in seen:
                    raise ValueError(f"the id {document.id!r} was given on line {seen[document.id]} already")
            except (ValueError, RecursionError) as error:
                yield Problem(file.name, number, str(error) or type(error).__name__)
                continue
            seen[document.id] = number
            yield _same(document, unchanged)


def _row(row: Any, path: str) -> Document:
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
    return _document(*values, path=path)


def _parts(file: Path, parser: Parser) -> tuple[list[Part], list[Fault]]:
    found = parser.parse(file, file.suffix.lower(), file.stem)
    return [f for f in found if isinstance(f, Part)], [f for f in found if isinstance(f, Fault)]


def _same(document: Document, unchanged: Unchanged) -> Found:
    return Same(document.id) if unchanged(document.id, document.stamp) else document


def _document(id_: str, title: str, text: str, *, markdown: bool = False, path: str = "") -> Document:
    """A document that is stamped by its words."""
    stamp = hashlib.sha256(f"{markdown:d}{title}\0{text}".encode()).hexdigest()
    return Document(id_, title, text, markdown, path, stamp)
