"""The file that is imported, as lines of text: uncompressed, counted, and with a digest of the lines that were read."""

import gzip
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
"""A file with a longer line is no table, and the line would have to fit into memory."""

BEGINNING_BYTES = 1 << 20
"""Bytes, uncompressed, whose digest identifies a file."""

FORMATS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}

BOM = b"\xef\xbb\xbf"


class CannotImport(Exception):
    """The reason why a file cannot be imported, or not to its end, as a sentence for the operator."""


def format_by_name(file: str) -> str | None:
    """Return the format that the name of the file implies, or None."""
    return FORMATS.get(Path(file.lower().removesuffix(".gz")).suffix)


@contextmanager
def open_input(file: str) -> Iterator[tuple[io.FileIO, io.BufferedReader, bytes]]:
    """Yield the file, its uncompressed content as a stream, and the beginning of that content."""
    with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as raw:
        magic, stream = _peek(raw, 2)
        beginning, content = _peek(gzip.GzipFile(fileobj=stream) if magic == b"\x1f\x8b" else stream, BEGINNING_BYTES)
        if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise CannotImport("the file is UTF-16; convert it to UTF-8: iconv -f utf-16 -t utf-8")
        yield raw, content, beginning


def _peek(stream: Any, size: int) -> tuple[bytes, io.BufferedReader]:
    """Return the first bytes, and a stream with all of the content. A pipe cannot be rewound."""
    beginning = b""
    while len(beginning) < size and (more := stream.read(size - len(beginning))):
        beginning += more
    return beginning, io.BufferedReader(_Concatenated(io.BytesIO(beginning), stream), 1 << 17)


class _Concatenated(io.RawIOBase):
    """Several streams, read one after the other."""

    def __init__(self, *streams: Any) -> None:
        self.streams = list(streams)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.streams:
            if size := self.streams[0].readinto(buffer):
                return int(size)
            del self.streams[0]
        return 0


def format_by_content(beginning: bytes) -> str:
    """Return the format of content that begins so.

    Raises:
        CannotImport
    """
    first = beginning.removeprefix(BOM).lstrip()[:1]
    if first == b"[":
        raise CannotImport("the file is a JSON array; convert it to NDJSON, one object a line: jq -c '.[]'")
    return "ndjson" if first == b"{" else "csv"


class Lines:
    """The lines of a text, counted, and with a digest of every line that was read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._digest = hashlib.blake2b(digest_size=32)
        self.number = 0
        """The number of the last line that was read, from 1."""

        self.flaw = ""
        """The reason why a line is not text, else empty. The reader of the line resets it."""

        self.is_for_excel = False
        """The text begins with the byte order mark with which Excel marks UTF-8."""

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._read()
        if self.number == 1 and line.startswith(BOM):
            line = line.removeprefix(BOM)
            self.is_for_excel = True
        if b"\0" in line:
            self.flaw = f"line {self.number} contains a NUL byte"
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.flaw = f"line {self.number} is not UTF-8 (byte 0x{line[error.start]:02x})"
            return line.decode(errors="replace")

    def _read(self) -> bytes:
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == MAX_LINE_BYTES and line[-1:] != b"\n":
            raise CannotImport(f"line {self.number:,} is longer than {MAX_LINE_BYTES:,} bytes")
        self._digest.update(line)
        return line

    def digest(self) -> bytes:
        return self._digest.digest()

    def skip(self, to: int) -> bytes:
        """Read up to this line, or to the end of a shorter file. Return the digest of all lines."""
        with suppress(StopIteration):
            while self.number < to:
                self._read()
        return self.digest()
