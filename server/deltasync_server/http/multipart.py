"""A multipart form read as a stream: a few short fields, and one file that goes to a spool (spec H-42)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deltasync.core.bundle import Source
from deltasync.core.errors import LimitExceeded, UsageError
from deltasync_server.http.problems import HttpRefusal

PARTS_MAX = 32
PART_HEADER_BYTES_MAX = 8192
FIELD_BYTES_MAX = 8192
OUTSIDE_BYTES_MAX = 4096
"""What may stand before the first part and behind the last."""
PIECE_BYTES = 256 * 1024


@dataclass(slots=True)
class Form:
    """What a form holds: its fields by name, and how many bytes of the file went to the spool (None without one)."""

    fields: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a Content-Type names."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise HttpRefusal(415, "this route takes multipart/form-data")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise UsageError("the multipart form names no boundary of 1 to 70 bytes")
    return boundary


def read_form(source: Source, boundary: bytes, file_field: str, spool: BinaryIO, limit_bytes: int) -> Form:
    """Read a whole form; the file's bytes go to the spool as they come, whatever its part calls itself."""
    parts = _Parts(file_field, spool, limit_bytes)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.begin,
            "on_header_field": parts.header_name,
            "on_header_value": parts.header_value,
            "on_header_end": parts.header_end,
            "on_part_data": parts.content,
            "on_part_end": parts.end,
            "on_end": parts.close,
        },
    )
    try:
        while piece := source.read(PIECE_BYTES):
            parts.count_outside(len(piece))
            parser.write(piece)
    except FormParserError as error:
        raise UsageError("the multipart form is malformed") from error
    if not parts.is_closed:
        raise UsageError("the multipart form is truncated")
    return parts.form


class _Parts:
    """Takes the parser's calls; every one of them is bounded."""

    def __init__(self, file_field: str, spool: BinaryIO, limit_bytes: int) -> None:
        self.form = Form()
        self.is_closed = False
        self._file_field, self._spool, self._limit_bytes = file_field, spool, limit_bytes
        self._parts = self._outside_bytes = self._header_bytes = 0
        self._name = ""
        self._header, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._is_file = False

    def count_outside(self, size: int) -> None:
        """Bound what comes before the first part and behind the last; the parser skips it in silence."""
        if self._parts and not self.is_closed:
            return
        if self._outside_bytes > OUTSIDE_BYTES_MAX:
            raise UsageError("the multipart form has too much outside of its parts")
        self._outside_bytes += size

    def begin(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise UsageError(f"the multipart form has more than {PARTS_MAX} parts")
        self._header_bytes, self._name, self._is_file = 0, "", False
        self._text.clear()

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._add_header(self._header, data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._add_header(self._value, data[start:end])

    def _add_header(self, target: bytearray, piece: bytes) -> None:
        self._header_bytes += len(piece)
        if self._header_bytes > PART_HEADER_BYTES_MAX:
            raise UsageError(f"a part of the form has more than {PART_HEADER_BYTES_MAX} bytes of headers")
        target += piece

    def header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._named(parse_options_header(bytes(self._value))[1].get(b"name", b""))
        self._header.clear()
        self._value.clear()

    def _named(self, name: bytes) -> None:
        self._name = _text(name)
        self._is_file = self._name == self._file_field
        if self._name in self.form.fields or (self._is_file and self.form.file_bytes is not None):
            raise UsageError(f"the form has {self._name!r} twice")
        if self._is_file:
            self.form.file_bytes = 0

    def content(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self.form.file_bytes = (self.form.file_bytes or 0) + end - start
            if self.form.file_bytes > self._limit_bytes:
                raise LimitExceeded("H-41", f"a bundle here has at most {self._limit_bytes} bytes")
            self._spool.write(memoryview(data)[start:end])
        elif len(self._text) + end - start > FIELD_BYTES_MAX:
            raise UsageError(f"the field {self._name!r} has more than {FIELD_BYTES_MAX} bytes")
        else:
            self._text += data[start:end]

    def end(self) -> None:
        if self._name and not self._is_file:
            self.form.fields[self._name] = _text(bytes(self._text))

    def close(self) -> None:
        self.is_closed = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise UsageError("the multipart form is not UTF-8") from None
