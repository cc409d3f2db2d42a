"""The parts of a text, one after the other, counted, and with a digest of every part that was read."""

import hashlib
import io
from contextlib import suppress

from velikiy.bulk.encoding import Encoding
from velikiy.bulk.input_file import BOM, CannotImport

MAX_LINE_BYTES = 1 << 20
"""A file with a longer line is no table, and the line would have to fit into memory."""


class Parts:
    """An import counts parts, to continue after an interruption behind the last part that was committed."""

    noun = "line"

    def __init__(self, stream: io.BufferedReader, encoding: Encoding) -> None:
        self._stream = stream
        self._encoding = encoding
        self._digest = hashlib.blake2b(digest_size=32)
        self.number = 0
        """The number of the last part that was read, from 1."""

        self.flaw = ""
        """The reason why a part is not text, else empty. The reader of the part resets it."""

    def __iter__(self) -> "Parts":
        return self

    def __next__(self) -> str:
        raise NotImplementedError

    @property
    def line(self) -> int:
        """The number of the line at which the last part begins, from 1."""
        return self.number

    def digest(self) -> bytes:
        return self._digest.digest()

    def skip(self, to: int) -> bytes:
        """Read up to this part, or to the end of a shorter file. Return the digest of all parts."""
        with suppress(StopIteration):
            while self.number < to:
                next(self)
        self.flaw = ""
        return self.digest()

    @property
    def encoding(self) -> str:
        """The encoding that was needed so far: empty after nothing but ASCII."""
        return self._encoding.codec if self._encoding.is_proven else ""


class Lines(Parts):
    is_for_excel = False
    """The text begins with a byte order mark, as Excel writes Unicode. Known after the first line."""

    def __next__(self) -> str:
        line = self._read()
        if self.number == 1 and line.startswith(BOM):
            line = line.removeprefix(BOM)
            self.is_for_excel = True
        if b"\0" in line:
            self.flaw = f"line {self.number} contains a NUL byte"
        try:
            text = line.decode(self._encoding.codec)
        except UnicodeDecodeError as error:
            if not self._encoding.is_proven:
                raise self._encoding.refusal(line, self.number, error) from None
            self.flaw = f"line {self.number} is not {self._encoding.label} (byte 0x{line[error.start]:02x})"
            return line.decode(self._encoding.codec, errors="replace")
        if not self._encoding.is_proven and not text.isascii():
            self._encoding.is_proven = True
        return text

    def _read(self) -> bytes:
        line = self._stream.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == MAX_LINE_BYTES and line[-1:] != b"\n":
            raise CannotImport(f"line {self.number:,} is longer than {MAX_LINE_BYTES:,} bytes")
        self._digest.update(line)
        return line
