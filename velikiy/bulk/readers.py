"""CSV and NDJSON, compressed or not, as rows that are valid or say why not."""

import csv
import gzip
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jiter
import orjson
from pydantic import ValidationError

from velikiy.resources.base import READ_ONLY, Body, Resource
from velikiy.resources.validation import errors_of

LONGEST = 1 << 20
"""Bytes of one line: what has longer ones is no table, and would have to fit into memory."""


BEGINNING = 1 << 20
"""Bytes, uncompressed, by whose digest a file is recognised."""


FORMATS = {".csv": "csv", ".ndjson": "ndjson", ".jsonl": "ndjson"}


class Unreadable(Exception):
    """A file that cannot be imported, or not any further; the text says why."""


class Row(NamedTuple):
    line: int
    """Where it begins, from 1."""

    given: Any
    """As it came."""

    values: list[Any]
    """Of the resource's fields, where there are no errors."""

    errors: list[dict[str, str]]

    lines: int = 1
    """That it takes, where it is no row."""

    def refused(self, field: str, detail: str) -> "Row":
        return self._replace(errors=[{"field": field, "detail": detail}])


def by_name(file: str) -> str | None:
    return FORMATS.get(Path(file.lower().removesuffix(".gz")).suffix)


@contextmanager
def content(file: str) -> Iterator[tuple[io.FileIO, io.BufferedReader, bytes]]:
    """The file, what is in it when it is uncompressed, and how that begins."""
    with open(0 if file == "-" else file, "rb", buffering=0, closefd=file != "-") as raw:
        magic, whole = _peeked(raw, 2)
        beginning, whole = _peeked(gzip.GzipFile(fileobj=whole) if magic == b"\x1f\x8b" else whole, BEGINNING)
        if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise Unreadable("the file is UTF-16; convert it to UTF-8: iconv -f utf-16 -t utf-8")
        yield raw, whole, beginning


def _peeked(stream: Any, size: int) -> tuple[bytes, io.BufferedReader]:
    """Its first bytes, and all of it: a pipe cannot be wound back."""
    beginning = b""
    while len(beginning) < size and (more := stream.read(size - len(beginning))):
        beginning += more
    return beginning, io.BufferedReader(_Joined(io.BytesIO(beginning), stream), 1 << 17)


class _Joined(io.RawIOBase):
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


def by_content(beginning: bytes) -> str:
    first = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"[":
        raise Unreadable("the file is a JSON array; convert it to NDJSON, one object a line: jq -c '.[]'")
    return "ndjson" if first == b"{" else "csv"


class Lines:
    """The lines of a text, counted, and with a digest of all that was read."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._digest = hashlib.blake2b(digest_size=32)
        self.number = 0
        """Of the last one, from 1."""

        self.flaw = ""
        """Why one is no text; to be reset by whoever has read it."""

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._read()
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # Excel marks UTF-8 so
        if b"\0" in line:
            self.flaw = f"line {self.number} contains a NUL byte"
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.flaw = f"line {self.number} is not UTF-8 (byte 0x{line[error.start]:02x})"
            return line.decode(errors="replace")

    def _read(self) -> bytes:
        line = self._stream.readline(LONGEST)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == LONGEST and line[-1:] != b"\n":
            raise Unreadable(f"line {self.number:,} is longer than {LONGEST:,} bytes")
        self._digest.update(line)
        return line

    def so_far(self) -> bytes:
        return self._digest.digest()

    def skip(self, to: int) -> bytes:
        """The digest up to this line, or to the end of a shorter file."""
        with suppress(StopIteration):
            while self.number < to:
                self._read()
        return self.so_far()


def _csv(resource: Resource, lines: Lines) -> Iterator[Row]:
    first = next(lines, "")
    if lines.flaw:
        raise Unreadable(lines.flaw)
    if not first:
        raise Unreadable(f"the file is empty; the first line of CSV names the columns: {','.join(resource.fields)}")
    # No name of a column has one of these, so the one that is there separates: Excel takes ; in half of Europe.
    taken: list[str] = []
    reader = csv.reader(
        _kept(itertools.chain([first], lines), taken), delimiter=max(",;\t", key=first.count), strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise Unreadable(f"line 1 is not CSV: {error}") from None
    optional = {name for name, field in resource.create_model.model_fields.items() if not field.is_required()}
    for name in header:
        if name not in resource.columns:
            raise Unreadable(
                f"line 1 must name the columns, and {resource.name} have no column {name!r}; the columns are "
                f"{', '.join(resource.fields)} (and {', '.join(READ_ONLY)}, which are ignored)"
            )
        if header.count(name) > 1:
            raise Unreadable(f"line 1 names the column {name} twice")
    if lacking := [name for name in resource.fields if name not in header and name not in optional]:
        raise Unreadable(f"line 1 must name the columns, and lacks {', '.join(lacking)}")
    return _csv_rows(resource, lines, taken, reader, header, optional)


def _kept(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _csv_rows(
    resource: Resource, lines: Lines, taken: list[str], reader: Any, header: list[str], optional: set[str]
) -> Iterator[Row]:
    """`taken`: lines as the reader has taken them."""
    while True:
        line, lines.flaw = lines.number + 1, ""
        taken.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # All of it, for whoever mends it: a quote that is not closed takes the lines after it along.
            within = (
                f" (lines {line} to {lines.number}: a quote in line {line} may be unclosed)" if len(taken) > 1 else ""
            )
            row = Row(line, "".join(taken), [], [], lines=len(taken))
            yield row.refused("", f"is not CSV: {error}{within}")
            continue
        if lines.flaw:
            yield Row(line, values, [], []).refused("", lines.flaw)
        elif values and len(values) != len(header):
            detail = f"has {len(values)} values for {len(header)} columns"
            yield Row(line, values, [], []).refused("", detail)
        elif values:
            given = dict(zip(header, values, strict=True))
            sent = {name: value for name, value in given.items() if value or name not in optional}
            yield checked(
                resource, line, given, partial(resource.create_model.model_validate_strings, sent, strict=False)
            )


def _ndjson(resource: Resource, lines: Lines) -> Iterator[Row]:
    for text in lines:
        flaw, lines.flaw = lines.flaw, ""
        sent = text.encode()
        if not sent.strip():
            continue
        try:
            jiter.from_json(sent, catch_duplicate_keys=True, allow_inf_nan=False)
        except ValueError as error:
            flaw = flaw or f"is not JSON: {error}"
        if flaw:  # what is not UTF-8 may be JSON by now, of other characters
            yield Row(lines.number, text, [], []).refused("", flaw)
            continue
        yield checked(
            resource,
            lines.number,
            orjson.Fragment(sent.strip()),
            partial(resource.create_model.model_validate_json, sent),
        )


READERS: dict[str, Callable[[Resource, Lines], Iterator[Row]]] = {"csv": _csv, "ndjson": _ndjson}


def checked(resource: Resource, line: int, given: Any, validated: Callable[[], Body]) -> Row:
    try:
        values = validated().model_dump()
    except ValidationError as error:
        return Row(line, given, [], errors_of(error))
    return Row(line, given, [values[field] for field in resource.fields], [])
