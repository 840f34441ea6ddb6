"""Every kind of file is read for its words, and one that is broken, huge or hostile costs itself alone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.errors import DataError
from hybrid.knowledge.parse import Part
from hybrid.knowledge.parser import Limits, Parser
from hybrid.knowledge.read import Document, Problem, read, scan

MIB = 1 << 20
PARAGRAPH = "<w:p>{style}<w:r><w:t>{text}</w:t></w:r></w:p>"
HEADING = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'


def docx(body: str, *, doctype: str = "") -> bytes:
    """The least that is a Word document."""
    space = "http://schemas.openxmlformats.org/"
    document = (
        f'<?xml version="1.0"?>{doctype}<w:document xmlns:w="{space}wordprocessingml/2006/main">'
        f"<w:body>{body}</w:body></w:document>"
    )
    relation = (
        f'<Relationships xmlns="{space}package/2006/relationships"><Relationship Id="r" Target="word/document.xml" '
        f'Type="{space}officeDocument/2006/relationships/officeDocument"/></Relationships>'
    )
    types = (
        f'<Types xmlns="{space}package/2006/content-types"><Override PartName="/word/document.xml" ContentType='
        '"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/></Types>'
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", types)
        archive.writestr("_rels/.rels", relation)
        archive.writestr("word/document.xml", document)
    return out.getvalue()


def word(*paragraphs: str) -> str:
    return "".join(PARAGRAPH.format(style="", text=text) for text in paragraphs)


def pdf(text: str, password: str = "") -> bytes:
    """One page with one line, written by the library that reads it."""
    from pypdf import PdfWriter
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    fonts = DictionaryObject({NameObject("/F"): font})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    content = DecodedStreamObject()
    content.set_data(f"BT /F 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = content
    writer.add_metadata({"/Title": "Timetable"})
    if password:
        writer.encrypt(password, algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.fixture(scope="module")
def parser() -> Iterator[Parser]:
    with Parser(Limits(size=8 * MIB, memory=256 * MIB, seconds=20)) as parser:
        yield parser


def only(parser: Parser, file: Path) -> Part:
    [part] = parser.parse(file, file.suffix, file.stem)
    assert isinstance(part, Part)
    return part


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_page_becomes_its_words_headings_and_tables(parser: Parser, tmp_path: Path) -> None:
    page = write(
        tmp_path / "page.html",
        """<!doctype html><html><head><meta charset="iso-8859-1"><title>F\xe4hren</title><style>p{}</style></head><body>
        <nav>Home | About</nav><script>alert(1)</script>
        <article><h1>Ferries</h1><p>The ferry leaves at <a href="http://x/">seven</a>.</p><h2>Fares</h2>
        <table><tr><th>Who</th><th>Crowns</th></tr><tr><td>Adult</td><td>4</td></tr></table></article>
        <footer>All rights reserved</footer></body></html>""".encode("latin-1"),
    )
    part = only(parser, page)
    assert (part.title, part.markdown) == ("Fähren", True)
    assert part.text.splitlines()[0] == "# Ferries"
    assert "The ferry leaves at seven." in part.text
    assert "## Fares" in part.text
    assert "| Adult | 4 |" in part.text
    for furniture in ("alert", "Home", "rights", "http"):
        assert furniture not in part.text


def test_a_word_document_becomes_markdown(parser: Parser, tmp_path: Path) -> None:
    cell = "<w:tc>{}</w:tc>"
    table = f"<w:tbl><w:tr>{cell.format(word('Adult'))}{cell.format(word('4'))}</w:tr></w:tbl>"
    body = PARAGRAPH.format(style=HEADING, text="Ferries") + word("No bicycles.") + table
    part = only(parser, write(tmp_path / "note.docx", docx(body)))
    assert (part.title, part.markdown) == ("Ferries", True)
    assert "# Ferries" in part.text
    assert "No bicycles." in part.text
    assert "| Adult | 4 |" in part.text


def test_a_pdf_is_read_with_its_title(parser: Parser, tmp_path: Path) -> None:
    part = only(parser, write(tmp_path / "a.pdf", pdf("The ferry leaves at seven.")))
    assert (part.title, part.text.strip()) == ("Timetable", "The ferry leaves at seven.")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1251"])
def test_text_is_read_in_its_own_encoding(parser: Parser, tmp_path: Path, encoding: str) -> None:
    text = "Паром в Остерхольм отходит в семь часов утра и не перевозит велосипеды.\n"
    part = only(parser, write(tmp_path / "old.txt", text.encode(encoding)))
    assert part.text == text


def test_rows_are_documents_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "fares.csv", 'id,title,crowns\nadult,Adults,4\nchild,"Children, small",\n,x,y,z\nadult,again,1\n')
    write(tmp_path / "notes.jsonl", '{"text": "A note."}\n{"broken\n{"id": 7, "year": 1871, "who": "Ada"}\n')
    write(tmp_path / "one.json", json.dumps([{"name": "Gull Rock", "lit": True}, 5]))
    documents, problems = read(tmp_path)
    assert {d.id: (d.title, d.text) for d in documents} == {
        "fares.csv:adult": ("Adults", "id: adult\ntitle: Adults\ncrowns: 4"),
        "fares.csv:child": ("Children, small", "id: child\ntitle: Children, small"),
        "notes.jsonl:1": ("notes", "A note."),
        "notes.jsonl:7": ("notes", "id: 7\nyear: 1871\nwho: Ada"),
        "one.json:1": ("Gull Rock", "name: Gull Rock\nlit: true"),
    }
    assert {(p.file, p.line) for p in problems} == {
        ("fares.csv", 4),
        ("fares.csv", 5),
        ("notes.jsonl", 2),
        ("one.json", 2),
    }


# --- what is not -----------------------------------------------------------------------------------------------------


def bomb(megabytes: int) -> bytes:
    """A Word document of a few kilobytes that unpacks to as many megabytes."""
    return docx(word("A" * (megabytes * MIB)))


LAUGHS = "<!DOCTYPE d [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(b + 1)} '{f'&{chr(b)};' * 10}'>" for b in range(ord("a"), ord("i"))
)
BROKEN = {
    "junk.pdf": (bytes(range(256)) * 40, "PdfReadError|PdfStreamError|invalid"),
    "cut.pdf": (pdf("Never read.")[:200], ""),
    "secret.pdf": (pdf("Never read.", "swordfish"), "encrypted"),
    "junk.docx": (b"PK\x03\x04 and no more", "BadZipFile"),
    "laughs.docx": (docx(word("&j;"), doctype=LAUGHS + "]>"), ""),
    "deep.html": (b"<div>" * 5_000 + b"words", "deep"),
    "junk.txt": (bytes(range(256)) * 40, "no text|encoding"),
    "nul.txt": (b"some words\0and more", "no text"),
    "latin.txt": (b"caf\xe9", "UTF-8"),
    "huge.txt": (b"word " * (2 * MIB), "file_mb"),
    "bomb.docx": (bomb(100), "parse_mb|parse_s"),
}


def test_a_broken_file_costs_itself_alone(tmp_path: Path) -> None:
    for name, (content, _) in BROKEN.items():
        write(tmp_path / name, content)
        write(tmp_path / f"{name}.txt", f"The note beside {name}.")
    with Parser(Limits(size=8 * MIB, memory=256 * MIB, seconds=20)) as parser:
        found = scan(tmp_path, parser)
    problems = {item.file: item for item in found if isinstance(item, Problem)}
    assert {item.id for item in found if isinstance(item, Document)} == {f"{name}.txt" for name in BROKEN}
    assert set(problems) == set(BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert problems[name].kept
        assert any(word in problems[name].reason for word in reason.split("|")), problems[name]


def test_a_file_that_never_ends_is_given_up_and_the_next_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.txt")
    write(tmp_path / "next.txt", "Read.")
    with Parser(Limits(seconds=3.0)) as parser:
        with pytest.raises(DataError, match="longer than the 3 s"):
            parser.parse(tmp_path / "endless.txt", ".txt", "endless")
        assert only(parser, tmp_path / "next.txt").text == "Read."


def test_a_parser_reaches_nothing_but_its_file(tmp_path: Path) -> None:
    """What a parser could be talked into, said in an interpreter that confines itself as the worker does."""
    code = """
import os, socket, subprocess, sys
from hybrid.knowledge.confined import confine
confine(1 << 30)
for act in (
    lambda: socket.socket(),
    lambda: subprocess.run(["true"]),
    lambda: os.system("true"),
    lambda: open(sys.argv[1], "w"),
    lambda: os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT),
    lambda: os.remove(sys.argv[0]),
):
    try:
        act()
    except PermissionError:
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["refused"] * 6, done.stderr
    assert not (tmp_path / "x").exists()
