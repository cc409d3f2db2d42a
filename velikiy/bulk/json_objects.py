"""JSON that is not one object a line: arrays, indented objects, and arrays within an object, read as a stream.

Python's own decoder finds the end of each object. The text of an object is then read as a line of NDJSON is.
"""

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from velikiy.bulk.encoding import Encoding
from velikiy.bulk.input_file import CannotImport
from velikiy.bulk.parts import MAX_LINE_BYTES, Parts

READ_BYTES = 1 << 17

BLANK = re.compile(r"[ \t\r\n\x1e\ufeff]*")
"""White space of JSON, the separator of JSON text sequences, and the byte order mark."""

DECODER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=str)
"""Numbers stay text, because only the end of each value is of interest."""

WRAPPERS = ("data", "items", "value", "results", "records", "resources", "members", "entries", "rows")
"""Members of an object that hold the rows of an export, besides the name of the resource."""

MAX_DEPTH = 3


class Objects(Parts):
    """The objects of a text in JSON."""

    noun = "object"

    def __init__(self, stream: io.BufferedReader, encoding: Encoding, path: tuple[str, ...] = ()) -> None:
        """
        Args:
            path: The names of the members that lead to the array of the rows, if an object holds it.
        """
        super().__init__(stream, encoding)
        self._path = path
        self._decoder = codecs.getincrementaldecoder(encoding.codec)("surrogateescape")
        self._buffer = ""
        self._at = 0
        self._counted = 0
        self._line = 1
        """The line at `_counted` in the buffer."""

        self._is_at_end = False
        self._first_line = 1
        self._texts = self._documents()

    def __next__(self) -> str:
        try:
            text = next(self._texts)
        except RecursionError:
            raise CannotImport(f"line {self._count():,}: the JSON is nested too deeply") from None
        self.number += 1
        self._digest.update(text.encode("utf-8", "surrogatepass"))
        if invalid := re.search("[\udc80-\udcff]", text):
            byte = ord(invalid[0]) - 0xDC00
            if not self._encoding.is_proven:
                lines = text.encode(self._encoding.codec, "surrogateescape")
                error = UnicodeDecodeError(self._encoding.codec, bytes([byte]), 0, 1, "invalid")
                raise self._encoding.refusal(lines, self.line, error)
            self.flaw = f"line {self.line} is not {self._encoding.label} (byte 0x{byte:02x})"
            return re.sub("[\udc80-\udcff]+", "\ufffd", text)
        if not self._encoding.is_proven and not text.isascii():
            self._encoding.is_proven = True
        return text

    @property
    def line(self) -> int:
        return self._first_line

    def find_path(self, name: str, fields: Iterable[str], is_whole: bool) -> tuple[str, ...]:
        """Return the path to the array of the rows in the first object; () if the object itself is a row.

        This reads the object, so it needs a copy of the beginning.

        Args:
            is_whole: The copy has all of the file.

        Raises:
            CannotImport: The beginning does not show where the rows are.
        """
        arrays: list[tuple[str, ...]] = []
        members: set[str] = set()
        is_cut = False
        try:
            if self._peek() == "{":
                self._survey((), arrays, members)
        except (CannotImport, RecursionError):  # the beginning ends within the object, or the import reports the error
            is_cut = not is_whole
        if members.issuperset(fields):
            return ()
        ranks = {wrapper: rank for rank, wrapper in enumerate((name, *WRAPPERS))}
        if named := [path for path in arrays if path[-1].lower() in ranks]:
            return min(named, key=lambda path: ranks[path[-1].lower()])
        if is_cut:
            raise CannotImport(
                f"the JSON is a large object, and {name!r} is no array at its beginning. Extract the rows:"
                f" jq -c '.{name}[]' FILE"
            )
        return arrays[0] if len(arrays) == len(members) == 1 else ()

    def _survey(self, path: tuple[str, ...], arrays: list[tuple[str, ...]], members: set[str]) -> None:
        for name in self._members():
            if not path:
                members.add(name)
            first = self._peek()
            if first == "[":
                arrays.append((*path, name))
                for index in self._elements():
                    if index == 0 and self._peek() != "{":
                        arrays.pop()
                    self._skip()
            elif first == "{" and name.lower() in WRAPPERS and len(path) + 1 < MAX_DEPTH:
                self._survey((*path, name), arrays, members)
            else:
                self._skip()

    def _documents(self) -> Iterator[str]:
        while first := self._peek():
            if first == ",":  # objects with commas between them, and without the brackets of an array
                self._at += 1
            elif first == "[":
                yield from self._array()
            elif first == "{" and self._path:
                yield from self._rows_within(self._path)
            else:
                yield self._row()

    def _array(self) -> Iterator[str]:
        for _ in self._elements():
            yield self._row()

    def _rows_within(self, path: tuple[str, ...]) -> Iterator[str]:
        for name in self._members():
            first = self._peek()
            if name != path[0]:
                self._skip()
            elif first == "[" and len(path) == 1:
                yield from self._array()
            elif first == "{" and len(path) > 1:
                yield from self._rows_within(path[1:])
            else:
                self._skip()

    def _row(self) -> str:
        self._peek()
        self._first_line = self._count()
        return self._value()

    def _skip(self) -> None:
        """Pass a value, of any size."""
        first = self._peek()
        if first == "[":
            for _ in self._elements():
                self._skip()
        elif first == "{":
            for _ in self._members():
                self._skip()
        else:
            self._value()

    def _elements(self) -> Iterator[int]:
        """Yield the index of each element of an array; the caller reads the element."""
        self._take("[")
        index = 0
        while self._peek() != "]":
            yield index
            index += 1
            if self._take(",", "]") == "]":
                return
        self._at += 1

    def _members(self) -> Iterator[str]:
        """Yield the name of each member of an object; the caller reads the value."""
        self._take("{")
        while self._peek() != "}":
            if self._peek() != '"':
                raise self._refusal("the name of a member must be a string")
            name = json.loads(self._value(), strict=False)
            self._take(":")
            yield name
            if self._take(",", "}") == "}":
                return
        self._at += 1

    def _take(self, *expected: str) -> str:
        found = self._peek()
        if found not in expected:
            raise self._refusal(f"{' or '.join(map(repr, expected))} is missing")
        self._at += 1
        return found

    def _peek(self) -> str:
        """Pass blanks, and return the next character; empty at the end."""
        while True:
            blank: Any = BLANK.match(self._buffer, self._at)
            self._at = blank.end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._fill():
                return ""

    def _value(self) -> str:
        """Return the text of the next value."""
        while True:
            reason, failed_at = "the file ends within a value", self._at
            try:
                _, end = DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                reason, end, failed_at = error.msg.lower(), -1, error.pos
                is_cut = error.pos >= len(self._buffer) or error.msg.startswith("Unterminated")
                if self._is_at_end and is_cut:
                    raise CannotImport("the JSON is incomplete: the file ends within an object") from None
            if 0 <= end < len(self._buffer) or (end >= 0 and self._is_at_end):
                text, self._at = self._buffer[self._at : end], end
                return text
            if len(self._buffer) - self._at > MAX_LINE_BYTES:
                raise self._refusal(f"{reason}, or the object is longer than {MAX_LINE_BYTES:,} characters")
            if not self._fill():
                self._at = failed_at
                raise self._refusal(reason)

    def _refusal(self, reason: str) -> CannotImport:
        at = f"after object {self.number:,}, " if self.number else ""
        if self._is_at_end and not BLANK.sub("", self._buffer[self._at :], count=1):
            return CannotImport(f"the JSON is incomplete: {at}the file ends too early")
        return CannotImport(f"line {self._count():,} is not JSON: {at}{reason}")

    def _count(self) -> int:
        """Return the number of the line of the next character."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _fill(self) -> bool:
        """Drop what was read, and append the next bytes. Return False at the end of the file."""
        if self._is_at_end:
            return False
        self._count()
        data = self._stream.read1(READ_BYTES)
        self._is_at_end = not data
        self._buffer = self._buffer[self._at :] + self._decoder.decode(data, final=self._is_at_end)
        self._at = self._counted = 0
        return True
