"""CSV and NDJSON as rows that were validated: a row has values, or errors that name the reasons."""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jiter
import orjson
from pydantic import ValidationError

from velikiy.bulk.input_file import CannotImport, Lines
from velikiy.resources.base import READ_ONLY, Body, Resource
from velikiy.resources.validation import errors_of

REJECT_MEMBERS = {"line", "errors", "row"}
"""The members of a rejected row (velikiy/bulk/rejects.py). It is imported as the row that it contains."""


class Row(NamedTuple):
    line: int
    """The line at which the row begins, from 1."""

    given: Any
    """The row as the file has it."""

    values: list[Any]
    """A value for each field of the resource; empty if there are errors."""

    errors: list[dict[str, str]]

    lines: int = 1
    """The number of lines that the row occupies. Set only if the reader could not parse a row."""

    def refused(self, field: str, detail: str) -> "Row":
        """Return the same row with this error."""
        return self._replace(errors=[{"field": field, "detail": detail}])


FORMULA_BEGINNINGS = "=+\\-@\\t\\r\\n＝＋－＠"
"""Characters with which a cell becomes a formula in a spreadsheet, for regular expressions of Python and PostgreSQL.

An export for Excel puts an apostrophe before them, and one more before a value that begins with both already. So an
import can remove it."""


def _as_before_excel(value: str) -> str:
    return value[1:] if re.match(f"'+[{FORMULA_BEGINNINGS}]", value) else value


def _csv(resource: Resource, lines: Lines) -> Iterator[Row]:
    first = next(lines, "")
    if lines.flaw:
        raise CannotImport(lines.flaw)
    if not first:
        raise CannotImport(f"the file is empty; the first line of CSV names the columns: {','.join(resource.fields)}")
    # No name of a column contains a separator, so the most frequent candidate is the separator. Excel writes
    # semicolons in half of Europe.
    consumed: list[str] = []
    reader = csv.reader(
        _record(itertools.chain([first], lines), consumed), delimiter=max(",;\t", key=first.count), strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise CannotImport(f"line 1 is not CSV: {error}") from None
    optional = {name for name, field in resource.create_model.model_fields.items() if not field.is_required()}
    for name in header:
        if name not in resource.columns:
            raise CannotImport(
                f"line 1 must name the columns, and {resource.name} have no column {name!r}; the columns are "
                f"{', '.join(resource.fields)} (and {', '.join(READ_ONLY)}, which are ignored)"
            )
        if header.count(name) > 1:
            raise CannotImport(f"line 1 names the column {name} twice")
    if missing := [name for name in resource.fields if name not in header and name not in optional]:
        raise CannotImport(f"line 1 must name the columns, and lacks {', '.join(missing)}")
    return _csv_rows(resource, lines, consumed, reader, header, optional)


def _record(lines: Iterable[str], consumed: list[str]) -> Iterator[str]:
    """Yield the lines, and append each line to `consumed`."""
    for line in lines:
        consumed.append(line)
        yield line


def _csv_rows(
    resource: Resource, lines: Lines, consumed: list[str], reader: Any, header: list[str], optional: set[str]
) -> Iterator[Row]:
    """`consumed`: the lines that the CSV reader has read since the list was cleared."""
    while True:
        line, lines.flaw = lines.number + 1, ""
        consumed.clear()
        try:
            values = next(reader)
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
            yield row.refused("", f"is not CSV: {error}{span}")
            continue
        if lines.is_for_excel:
            values = [_as_before_excel(value) for value in values]
        if lines.flaw:
            yield Row(line, values, [], []).refused("", lines.flaw)
        elif values and len(values) != len(header):
            detail = f"has {len(values)} values for {len(header)} columns"
            yield Row(line, values, [], []).refused("", detail)
        elif values:
            given = dict(zip(header, values, strict=True))
            sent = {name: value for name, value in given.items() if value or name not in optional}
            yield validated_row(
                resource, line, given, partial(resource.create_model.model_validate_strings, sent, strict=False)
            )


def _ndjson(resource: Resource, lines: Lines) -> Iterator[Row]:
    for text in lines:
        flaw, lines.flaw = lines.flaw, ""
        sent = text.encode()
        if not sent.strip():
            continue
        try:
            given = jiter.from_json(sent, catch_duplicate_keys=True, allow_inf_nan=False)
        except ValueError as error:
            flaw = flaw or f"is not JSON: {error}"
        if flaw:  # a line that was not UTF-8 may be JSON after its bytes were replaced
            yield Row(lines.number, text, [], []).refused("", flaw)
            continue
        if isinstance(given, dict) and given.keys() == REJECT_MEMBERS:
            yield _rejected_row(resource, lines.number, given["row"])
            continue
        yield validated_row(
            resource,
            lines.number,
            orjson.Fragment(sent.strip()),
            partial(resource.create_model.model_validate_json, sent),
        )


def _rejected_row(resource: Resource, line: int, given: Any) -> Row:
    """Validate a row that an import has rejected before. Only strings: the row is from CSV."""
    model = resource.create_model
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        sent = json.dumps(given).encode()
        return validated_row(resource, line, orjson.Fragment(sent), partial(model.model_validate_json, sent))
    fields = model.model_fields
    values = {name: value for name, value in given.items() if value or name not in fields or fields[name].is_required()}
    return validated_row(resource, line, given, partial(model.model_validate_strings, values, strict=False))


READERS: dict[str, Callable[[Resource, Lines], Iterator[Row]]] = {"csv": _csv, "ndjson": _ndjson}


def validated_row(resource: Resource, line: int, given: Any, validate: Callable[[], Body]) -> Row:
    """Return a row with the values that `validate` returns, or with the errors that it raises."""
    try:
        values = validate().model_dump()
    except ValidationError as error:
        return Row(line, given, [], errors_of(error))
    return Row(line, given, [values[field] for field in resource.fields], [])
