"""A form with one file, written to disk as it comes: neither the file nor a field is ever held whole beyond a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO

from starlette.requests import Request

from hybrid.errors import BadRequest

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4 << 10


@dataclass(slots=True)
class Form:
    """What came: the text fields, and the name its sender gave the file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(request: Request, sink: IO[bytes], *, file_field: str = "file") -> Form:
    """Reads a `multipart/form-data` body; the bytes of its file go to `sink`. Raises BadRequest (and TooLarge)."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest("Send the file as multipart/form-data, with the fields `file` and `purpose`.", param="file")
    parts = _Parts(sink, file_field, lambda value: parse_options_header(value)[1])
    try:
        parser = MultipartParser(boundary, {
            "on_part_begin": parts.begin, "on_part_data": parts.data, "on_part_end": parts.end,
            "on_header_field": parts.header_name, "on_header_value": parts.header_value,
            "on_header_end": parts.header_end, "on_headers_finished": parts.headers_finished,
        })  # fmt: skip
        async for chunk in request.stream():
            await asyncio.to_thread(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"The form cannot be read: {str(error)[:200]}.", param="file") from error
    if not parts.complete:
        raise BadRequest("The form breaks off before its end; send it whole.", param="file")
    return parts.form


class _Parts:
    """The parser's callbacks: which part is being read, and where its bytes go."""

    def __init__(self, sink: IO[bytes], file_field: str, options: Callable[[bytes], dict[bytes, bytes]]) -> None:
        self.form = Form()
        self.complete = True
        self._sink = sink
        self._file_field = file_field
        self._options = options
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._name, self._text, self._is_file = "", bytearray(), False

    def begin(self) -> None:
        self.complete = False
        self._disposition, self._text, self._is_file = b"", bytearray(), False

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def headers_finished(self) -> None:
        options = self._options(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = self._name == self._file_field
        if self._is_file:
            if self.form.filename is not None:
                raise BadRequest("The form holds two files; send one at a time.", param="file")
            self.form.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif len(self.form.fields) >= MAX_FIELDS:
            raise BadRequest(f"The form has more than {MAX_FIELDS} fields.")

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._sink.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MAX_FIELD_BYTES:
            raise BadRequest(f"A field of the form is longer than {MAX_FIELD_BYTES:,} bytes.", param=self._name[:80])

    def end(self) -> None:
        self.complete = True
        if not self._is_file:
            self.form.fields[self._name] = self._text.decode("utf-8", "replace")
