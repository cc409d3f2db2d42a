"""CSV and JSON as rows that were validated: a row has values, or errors that name the reasons."""

import csv
import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jiter
import orjson
from pydantic import ValidationError
from pydantic_core import to_json

from velikiy.bulk.columns import Columns, Reading, choose_columns
from velikiy.bulk.encoding import CrAsLf, Encoding, as_readable
from velikiy.bulk.input_file import BEGINNING_BYTES, BOM, CannotImport, format_by_name
from velikiy.bulk.json_objects import Objects
from velikiy.bulk.parts import Lines, Parts
from velikiy.resources.base import READ_ONLY, Body, Resource
from velikiy.resources.validation import errors_of

MAX_PREAMBLE_LINES = 10
"""Lines before the line that names the columns, such as a title or a version."""

SAMPLE_OBJECTS = 1000
"""Objects at the beginning of JSON whose members are the columns of the file."""

REJECT_MEMBERS = {"line", "errors", "row"}
"""The members of a rejected row (velikiy/bulk/rejects.py). It is imported as the row that it contains."""

FORMULA_BEGINNINGS = "=+\\-@\\t\\r\\n＝＋－＠"
"""Characters with which a cell becomes a formula in a spreadsheet, for regular expressions of Python and PostgreSQL.

An export for Excel puts an apostrophe before them, and one more before a value that begins with both already. So an
import can remove it."""


class Row(NamedTuple):
    line: int
    """The line at which the row begins, from 1."""

    given: Any
    """The row for the file of rejected rows: as the file has it, or its fields if the file has other columns."""

    values: list[Any]
    """A value for each field of the resource; empty if there are errors."""

    errors: list[dict[str, str]]

    lines: int = 1
    """The number of lines that the row occupies. Set only if the reader could not parse a row."""

    def refused(self, field: str, detail: str) -> "Row":
        """Return the same row with this error."""
        return self._replace(errors=[{"field": field, "detail": detail}])


class Input(NamedTuple):
    """The rows of a file, and the parts of the file that they come from."""

    parts: Parts
    rows: Iterator[Row]
    columns: Columns | None
    names: Sequence[str] = ()
    """The columns of the file."""

    def digest(self) -> bytes:
        """Return the digest of the parts so far, and then that of the way in which they were read."""
        way = [self.parts.noun, self.parts.encoding, self.columns.sources if self.columns else None]
        return self.parts.digest() + hashlib.blake2b(orjson.dumps(way), digest_size=8).digest()

    def continues(self, number: int, digest: bytes) -> bool:
        """Read the parts that an interrupted import has done. Return False if they have changed.

        Raises:
            CannotImport: They would be read in another way.
        """
        parts = self.parts.skip(number)
        if not digest.startswith(parts):
            return False
        if digest != self.digest():
            raise CannotImport(
                f"an import of this file was interrupted after {self.parts.noun} {number:,}, and read the file in"
                " another way",
                ": give the same --map, --encoding and --format again, or start over with --restart",
            )
        return True


def read(
    resource: Resource,
    file: str,
    content: io.BufferedReader,
    beginning: bytes,
    reading: Reading,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Input:
    """Return the rows of a file whose content begins so.

    Args:
        notify: Receives what the operator should know about the file.

    Raises:
        CannotImport
    """
    content, beginning, encoding = as_readable(content, beginning, reading.encoding)
    if not _is_json(reading.file_format or format_by_name(file), beginning, reading.file_format is not None):
        first_end = re.search(rb"\r\n?|\n", beginning)
        if first_end and first_end[0] == b"\r":
            content = io.BufferedReader(CrAsLf(content))
        lines = Lines(content, encoding)
        columns, rows, header = _csv(resource, lines, reading, notify)
        return Input(lines, rows, columns, header)
    parts, sample = _json_parts(resource, content, beginning, encoding)
    sampled = [members["row"] if is_reject(members) else members for members in sample]
    names = list(dict.fromkeys(name for row in sampled if isinstance(row, dict) for name in _names(row)))
    # Rejected rows have the names of the fields already, so only an option changes their columns.
    is_chosen = reading.maps or reading.ignore_unknown or not all(map(is_reject, sample))
    chosen = choose_columns(resource, names, reading) if names and is_chosen else None
    return Input(parts, _json(resource, parts, chosen), chosen, names)


def _is_json(file_format: str | None, beginning: bytes, is_given: bool) -> bool:
    if is_given:
        return file_format != "csv"
    first = beginning.removeprefix(BOM).lstrip(b" \t\r\n\x1e")[:1]
    # A file of this name whose first line is damaged is still NDJSON.
    return first in (b"{", b"[") or (
        file_format == "ndjson" and re.search(rb"^\s*{", beginning, re.MULTILINE) is not None
    )


# ---- CSV ----


def _csv(
    resource: Resource, lines: Lines, reading: Reading, notify: Callable[[str], None]
) -> tuple[Columns, Iterator[Row], list[str]]:
    consumed: list[str] = []
    delimiter, at, refusal = "", 1, None
    for first in itertools.islice(lines, MAX_PREAMBLE_LINES):
        if lines.flaw:
            raise CannotImport(lines.flaw)
        if separator := re.fullmatch(r'"?sep=(.)"?', first.strip("\r\n"), re.IGNORECASE):
            delimiter = separator[1]  # Excel's own line
            continue
        if first.startswith("#") or not first.strip():  # PowerShell writes #TYPE and the type of the objects
            continue
        at = lines.number
        # No name of a column contains a separator, so the most frequent candidate is the separator. Excel writes
        # semicolons in half of Europe.
        reader = csv.reader(
            _record(itertools.chain([first], lines), consumed),
            delimiter=delimiter or max(",;\t|", key=first.count),
            skipinitialspace=True,
            strict=True,
        )
        try:
            header = [_clean(name) for name in next(reader, [])]
        except csv.Error as error:
            raise refusal or CannotImport(f"line {at} is not CSV: {error}") from None
        while header and not header[-1]:
            header.pop()
        try:
            columns = choose_columns(resource, header, reading, at)
        except CannotImport as error:
            if len(header) > 1 or "@" in "".join(header):
                raise
            refusal = refusal or error
            continue  # a title or a version, if the next lines name the columns
        if refusal:
            notify(f"line {at} names the columns; the lines above it are left out")
        return columns, _csv_rows(resource, lines, consumed, reader, header, columns), header
    raise refusal or CannotImport(
        f"the file is empty; the first line of CSV names the columns: {','.join(resource.fields)}"
    )


def _clean(name: str) -> str:
    """Return the name of a column without blanks at its ends, and with one blank for several or for a line end."""
    return " ".join(name.replace("\ufeff", "").replace("\u200b", "").split())


def _record(lines: Iterable[str], consumed: list[str]) -> Iterator[str]:
    """Yield the lines, and append each line to `consumed`."""
    for line in lines:
        consumed.append(line)
        yield line


def _csv_rows(
    resource: Resource, lines: Lines, consumed: list[str], reader: Any, header: list[str], columns: Columns
) -> Iterator[Row]:
    """`consumed`: the lines that the CSV reader has read since the list was cleared."""
    fields = _csv_fields(header, columns, _optional_fields(resource))
    while True:
        line, lines.flaw = lines.number + 1, ""
        consumed.clear()
        try:
            values = [value.strip() for value in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            # The rejected row contains every line, so that it can be repaired: an unclosed quote includes the lines
            # after it.
            span = (
                f" (lines {line} to {lines.number}: a quote in line {line} may be unclosed)"
                if len(consumed) > 1
                else ""
            )
            row = Row(line, "".join(consumed), [], [], lines=len(consumed))
            yield row.refused("", lines.flaw or f"is not CSV: {error}{span}")
            continue
        if lines.is_for_excel:
            values = [_as_before_excel(value) for value in values]
        if len(values) > len(header) and not any(values[len(header) :]):
            del values[len(header) :]  # spreadsheets write empty cells for columns that were used once
        if lines.flaw:
            yield Row(line, values, [], []).refused("", lines.flaw)
        elif not any(values):
            continue
        elif len(values) != len(header):
            detail = f"has {len(values)} values for {len(header)} columns"
            yield Row(line, values, [], []).refused("", detail)
        else:
            texts = fields(values)
            given = dict(zip(header, values, strict=True)) if columns.is_plain else texts
            yield validated_row(
                resource, line, given, partial(resource.create_model.model_validate_strings, texts, strict=False)
            )


def _as_before_excel(value: str) -> str:
    return value[1:] if re.match(f"'+[{FORMULA_BEGINNINGS}]", value) else value


def _csv_fields(
    header: Sequence[str], columns: Columns, optional: set[str]
) -> Callable[[Sequence[str]], dict[str, str]]:
    """Return a function that returns the fields of a row. An optional field that is empty is left out."""
    places = {name: place for place, name in enumerate(header)}
    singles = [(field, places[alternatives[0][0]]) for field, alternatives in columns.sources.items()]
    is_simple = all(len(alternatives) == len(alternatives[0]) == 1 for alternatives in columns.sources.values())
    if is_simple and not columns.value_separator:
        return lambda values: {
            field: values[place] for field, place in singles if values[place] or field not in optional
        }

    def fields(values: Sequence[str]) -> dict[str, str]:
        sent = {
            field: columns.value(alternatives, lambda name: values[places[name]])
            for field, alternatives in columns.sources.items()
        }
        return {field: value for field, value in sent.items() if value or field not in optional}

    return fields


# ---- JSON ----


def _json_parts(
    resource: Resource, content: io.BufferedReader, beginning: bytes, encoding: Encoding
) -> tuple[Parts, list[dict[str, Any]]]:
    """Return the parts of a file of JSON, lines if each is an object, and the objects at its beginning."""
    is_whole = len(beginning) < BEGINNING_BYTES
    beginning = beginning.removeprefix(BOM).lstrip(b" \t\r\n")
    line, _, rest = beginning.partition(b"\n")
    path = _copy(beginning, encoding).find_path(resource.name, resource.fields, is_whole)
    if re.match(rb"\[\s*([{\]]|$)", beginning) or path or beginning.startswith(b"\x1e"):
        is_line_by_line = False
    elif not beginning.startswith(b"{"):
        is_line_by_line = True
    else:
        is_line_by_line = _parsed(line.decode(encoding.codec, "replace")) is not None
        # Otherwise the first object has several lines, or the first line is damaged.
        if not is_line_by_line and not rest.lstrip().startswith(b'"'):
            is_line_by_line = not _first_objects(_copy(beginning, encoding))
    if is_line_by_line:
        lines = beginning.split(b"\n", SAMPLE_OBJECTS)[:SAMPLE_OBJECTS]
        parsed = [_parsed(line.decode(encoding.codec, "replace")) for line in lines]
        return Lines(content, encoding), [members for members in parsed if members]
    return Objects(content, encoding, path), _first_objects(_copy(beginning, encoding, path))


def _copy(beginning: bytes, encoding: Encoding, path: tuple[str, ...] = ()) -> Objects:
    proven = Encoding(encoding.codec, encoding.label, is_proven=True)
    return Objects(io.BufferedReader(io.BytesIO(beginning)), proven, path)


def _first_objects(objects: Objects) -> list[dict[str, Any]]:
    sample = []
    try:
        for text in itertools.islice(objects, SAMPLE_OBJECTS):
            if members := _parsed(text):
                sample.append(members)
    except CannotImport:  # the beginning ends within an object, or the import will report the error
        pass
    return sample


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        members = jiter.from_json(text.encode())
    except ValueError:
        return None
    return members if isinstance(members, dict) else None


def is_reject(members: Any) -> bool:
    """Return True for a rejected row, as an import writes it."""
    return isinstance(members, dict) and members.keys() == REJECT_MEMBERS


def _names(members: dict[str, Any]) -> Iterator[str]:
    """Yield the names of members, with those of an inner object after a dot: "profile.email"."""
    for name, value in members.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name


def _member(members: dict[str, Any], name: str) -> Any:
    if name in members:
        return members[name]
    outer, _, inner = name.partition(".")
    value = members.get(outer)
    return value.get(inner) if isinstance(value, dict) else None


def _json(resource: Resource, parts: Parts, columns: Columns | None) -> Iterator[Row]:
    is_plain = columns is None or columns.is_plain
    optional = _optional_fields(resource)
    for text in parts:
        flaw, parts.flaw = parts.flaw, ""
        sent = text.encode().strip()
        if not sent:
            continue
        members: Any = None
        try:
            members = jiter.from_json(sent, catch_duplicate_keys=True, allow_inf_nan=False)
        except ValueError as error:
            flaw = flaw or f"is not JSON: {error}"
        if flaw:  # a part that was not text may be JSON after its bytes were replaced
            yield Row(parts.line, text, [], []).refused("", flaw)
            continue
        if b"\n" in sent:  # a rejected row is one line
            sent = b" ".join(line.strip() for line in sent.split(b"\n"))
        row = members["row"] if is_reject(members) else members
        if columns and not is_plain and isinstance(row, dict):
            row = _json_fields(columns, row)
        if row is not members:
            sent = to_json(row)
        validate: Callable[[], Body] = partial(resource.create_model.model_validate_json, sent)
        if is_reject(members) and isinstance(row, dict) and all(isinstance(value, str) for value in row.values()):
            # The row is from CSV, where every value is a text.
            texts = {name: value for name, value in row.items() if value or name not in optional}
            validate = partial(resource.create_model.model_validate_strings, texts, strict=False)
        yield validated_row(resource, parts.line, orjson.Fragment(sent), validate)


def _json_fields(columns: Columns, members: dict[str, Any]) -> dict[str, Any]:
    fields = {}
    used = set()
    for field, alternatives in columns.sources.items():
        names = {name for columns_ in alternatives for name in columns_}
        used |= names | {name.partition(".")[0] for name in names}
        value = columns.value(alternatives, partial(_member, members))
        if value is not None or alternatives[0][0] in members:
            fields[field] = value
    if columns.drops_others:
        return fields
    others = {name: value for name, value in members.items() if name not in used and name.casefold() not in READ_ONLY}
    return {**others, **fields}


def _optional_fields(resource: Resource) -> set[str]:
    return {name for name, field in resource.create_model.model_fields.items() if not field.is_required()}


def validated_row(resource: Resource, line: int, given: Any, validate: Callable[[], Body]) -> Row:
    """Return a row with the values that `validate` returns, or with the errors that it raises."""
    try:
        values = validate().model_dump()
    except ValidationError as error:
        return Row(line, given, [], errors_of(error))
    return Row(line, given, [values[field] for field in resource.fields], [])
