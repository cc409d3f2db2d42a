"""Import a file that arrives in pieces, each of which is one transaction (docs/decisions/0188-import-in-pieces.md).

The sender cuts the file anywhere and repeats its *head*, the lines up to the one that names the columns, before each
piece but the first. So each piece reads like a small file, and nothing has to be kept between two pieces. The result
says how much of a piece was read: it may end within a row, or have more rows than one transaction takes.
"""

import io
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from velikiy.bulk.columns import Columns, Reading
from velikiy.bulk.encoding import certain, codec_of
from velikiy.bulk.input_file import BEGINNING_BYTES, CannotImport
from velikiy.bulk.insert import MAX_INVALIDATED_ROWS
from velikiy.bulk.readers import Input, Row, read
from velikiy.bulk.unpack import MAGIC_BYTES, refuse_other_kinds
from velikiy.resources.base import Resource

MAX_ROWS = MAX_INVALIDATED_ROWS
"""Rows of one piece. The caches drop the paths of these rows; a chunk of more rows would empty the caches."""

PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"PK\x03\x04", "zip"))


class Place(NamedTuple):
    """The place of a piece in its file."""

    head: int = 0
    """Bytes of the head, with which the piece begins. 0 for the first piece."""

    line: int = 0
    """Lines of the file before the piece, those of the head included."""

    done: int = 0
    """Objects that are done, if the piece is a whole file of JSON with more than MAX_ROWS objects."""

    is_last: bool = True
    """The piece ends with the file."""


class Piece(NamedTuple):
    """The rows of a piece, and the place of the next piece."""

    rows: list[Row]
    columns: Columns | None
    names: Sequence[str]
    """The columns of the file."""

    is_csv: bool
    codec: str
    read: int
    """Bytes that were read, without the head. The next piece begins there."""

    head: int
    line: int
    done: int
    is_end: bool
    """Nothing of the file is left."""


def read_piece(resource: Resource, content: bytes, reading: Reading, place: Place, most: int = MAX_ROWS) -> Piece:
    """Return the first rows of a piece.

    Raises:
        CannotImport
    """
    beginning = content[:MAGIC_BYTES]
    if packing := next((name for magic, name in PACKED if beginning.startswith(magic)), None):
        raise CannotImport(f"the file is compressed with {packing}: unpack it first")
    refuse_other_kinds(beginning)
    codec = certain(content[:BEGINNING_BYTES]) or (codec_of(reading.encoding) if reading.encoding else "utf-8")
    content, newline = _with_line_feeds(content, codec)
    whole = content if place.is_last else content[: max(_line_ends(content, newline), default=0)]
    source = read(resource, "", io.BufferedReader(io.BytesIO(whole)), whole[:BEGINNING_BYTES], reading)
    if source.parts.noun != "line":
        return _piece_of_json(source, place, codec, len(whole), most)
    head_lines = source.parts.number
    head = _end_of_line(whole, newline, head_lines)
    if place.head not in (0, head):
        raise CannotImport("the first lines of the file have changed")
    rows = list(islice(source.rows, most + 1))
    is_end = place.is_last and len(rows) <= most
    lines, end = source.parts.number, len(whole)
    if not is_end:  # the last row may go on in the next piece
        lines = rows[-1].line - 1 if rows else head_lines
        end = _end_of_line(whole, newline, lines)
        rows = rows[:-1]
    earlier = max(0, place.line - head_lines)
    rows = [row._replace(line=row.line + earlier) for row in rows]
    read_bytes = end - head if place.head else end
    return Piece(
        rows, source.columns, source.names, head > 0, codec, read_bytes, head, lines + earlier, done=0, is_end=is_end
    )


def _piece_of_json(source: Input, place: Place, codec: str, size: int, most: int) -> Piece:
    if not place.is_last:
        raise CannotImport("a JSON file of this size must have one object on each line (NDJSON), or be CSV")
    source.parts.skip(place.done)
    rows = list(islice(source.rows, most + 1))
    is_end = len(rows) <= most
    return Piece(
        rows[:most],
        source.columns,
        source.names,
        is_csv=False,
        codec=codec,
        read=size if is_end else 0,
        head=0,
        line=0,
        done=place.done + min(len(rows), most),
        is_end=is_end,
    )


def _with_line_feeds(content: bytes, codec: str) -> tuple[bytes, bytes]:
    """Return the content with line feeds for the carriage returns of old Macs, and the bytes of a line feed."""
    newline = "\n\n".encode(codec)[len("\n".encode(codec)) :]  # the first may begin with a byte order mark
    if len(newline) == 1:
        first = re.search(rb"\r\n?|\n", content)
        return content.replace(b"\r", b"\n") if first and first[0] == b"\r" else content, newline
    if newline not in content:
        raise CannotImport("the file has no line feed: save it as UTF-8")
    return content, newline


def _line_ends(content: bytes, newline: bytes) -> Iterator[int]:
    """Yield the end of each line. In UTF-16 the bytes of a line feed may also be halves of two characters."""
    at = content.find(newline)
    while at >= 0:
        if at % len(newline):
            at = content.find(newline, at + 1)
        else:
            yield at + len(newline)
            at = content.find(newline, at + len(newline))


def _end_of_line(content: bytes, newline: bytes, number: int) -> int:
    """Return the offset behind the line with this number, counted from 1; 0 for no line."""
    return next(islice(_line_ends(content, newline), number - 1, None), len(content)) if number else 0
