"""The import of a file that a browser sends in pieces, for the console (docs/console.md).

A request carries one line of JSON, the options, and then the bytes of a piece. Each piece is one transaction, which is
carried out once for its Idempotency-Key: a sender that lost the response repeats the request, and a sender that begins
again with the same keys continues where it was.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from flask import Blueprint, Flask, Response
from pydantic import Field, ValidationError

from velikiy.bulk import upload
from velikiy.bulk.columns import Reading
from velikiy.bulk.encoding import CANDIDATES
from velikiy.bulk.input_file import CannotImport, WrongColumns
from velikiy.bulk.insert import OnConflict, Outcome, chunk
from velikiy.bulk.readers import Row
from velikiy.bulk.rejects import json_line
from velikiy.bulk.upload import Piece, Place
from velikiy.coherence import Gate
from velikiy.http import requests, responses
from velikiy.http.requests import MAX_BATCH_BYTES
from velikiy.postgres import Connection
from velikiy.resources.base import Resource, Strict
from velikiy.resources.idempotency import IdempotencyKeys, StoredResponse
from velikiy.resources.problems import Problem
from velikiy.resources.validation import errors_of

MEDIA_TYPE = "application/octet-stream"
"""No form can send this type, so a browser asks first whether a page of another origin may."""

TIMEOUT_FACTOR = 6
"""The time of a piece, in times of one request. The edge's deadline for writes may end it earlier."""

PREVIEW_ROWS = 10

MAX_OPTIONS_BYTES = 64 * 1024

Text = Annotated[str, Field(max_length=1000)]


class Options(Strict):
    """The first line of a request."""

    resource: Text = "users"
    format: Literal["csv", "ndjson"] | None = None
    encoding: Text | None = None
    maps: Annotated[list[Text], Field(max_length=100, default_factory=list)]
    """Texts such as "First Name+Last Name=name". Other columns are left out if there are any."""

    on_conflict: OnConflict = "reject"
    head: Annotated[int, Field(ge=0)] = 0
    line: Annotated[int, Field(ge=0)] = 0
    done: Annotated[int, Field(ge=0)] = 0
    is_last: bool = False
    rows: Annotated[int, Field(ge=1, le=upload.MAX_ROWS)] = upload.MAX_ROWS
    """Rows to read at most. The page takes fewer while the database is slow."""

    @property
    def reading(self) -> Reading:
        # The page shows the columns, and its user has accepted them.
        return Reading(lambda columns: None, self.format, self.encoding, self.maps, ignore_unknown=bool(self.maps))


def install(app: Flask, resources: Mapping[str, Resource], gate: Gate, keys: IdempotencyKeys) -> None:
    """Add `POST /console/import/preview` and `POST /console/import`."""
    routes = Blueprint("console_import", __name__, url_prefix="/console/import")

    @routes.post("/preview")
    def preview() -> Response:
        requests.parameters()
        options, resource, content = _request(resources)
        fields = {name: field.is_required() for name, field in resource.create_model.model_fields.items()}
        answer: dict[str, Any] = {"fields": fields, "encodings": ["utf-8", *CANDIDATES.values()]}
        try:
            piece = _read(resource, content, options, PREVIEW_ROWS)
        except WrongColumns as error:
            return responses.json({**answer, "names": error.names, "columns": None, "rows": []})
        columns = piece.columns.sources if piece.columns else {}
        rows = [_shown(resource, row) for row in piece.rows]
        form = {
            "format": "csv" if piece.is_csv else "ndjson",
            "encoding": piece.codec,
            "is_whole": piece.done > 0,  # JSON that is not one object a line, which cannot be cut
        }
        return responses.json({**answer, **form, "names": piece.names, "columns": columns, "rows": rows})

    @routes.post("")
    def run() -> Response:
        deadline = requests.deadline(gate.database.timeout)
        requests.parameters()
        options, resource, content = _request(resources)
        try:
            piece = _read(resource, content, options, options.rows)
        except WrongColumns as error:
            raise _refusal(error) from None
        valid = [row for row in piece.rows if not row.errors]
        positions = {id(row.values): position for position, row in enumerate(valid)}

        def record(_: Connection, outcome: Outcome) -> StoredResponse:
            # Without the values of the rows: they would stay in the table of keys for a day.
            refused = [[positions[id(row.values)], row.errors] for row in outcome.refused]
            counts = {
                "created": outcome.created,
                "updated": outcome.updated,
                "unchanged": outcome.unchanged,
                "skipped": outcome.skipped,
            }
            return StoredResponse(200, {"counts": counts, "refused": refused})

        seconds = TIMEOUT_FACTOR * gate.database.timeout
        change = chunk(resource, valid, options.on_conflict, record, seconds, seconds)
        keyed = keys.once(requests.idempotency_key(options, content), change)
        stored = gate.write(keyed, TIMEOUT_FACTOR, deadline=deadline, author=requests.author())
        for position, errors in stored.members["refused"]:
            valid[position] = valid[position]._replace(errors=errors)
        return responses.json(_result(piece, valid, stored), headers=stored.headers)

    app.register_blueprint(routes)


def _request(resources: Mapping[str, Resource]) -> tuple[Options, Resource, bytes]:
    """Return the options and the piece that the request carries.

    Raises:
        Problem
    """
    line, _, content = requests.content((MEDIA_TYPE,), MAX_BATCH_BYTES).partition(b"\n")
    try:
        options = Options.model_validate_json(line[:MAX_OPTIONS_BYTES])
    except ValidationError as error:
        raise Problem("invalid", "The first line of the body must be the options.", errors_of(error)) from None
    resource = resources.get(options.resource)
    if resource is None:
        raise requests.bad("resource", "is not the name of a resource")
    return options, resource, content


def _read(resource: Resource, content: bytes, options: Options, most: int) -> Piece:
    """Raises: Problem, WrongColumns"""
    place = Place(options.head, options.line, options.done, options.is_last)
    try:
        return upload.read_piece(resource, content, options.reading, place, most)
    except WrongColumns:
        raise
    except CannotImport as error:
        raise _refusal(error) from None


def _refusal(error: CannotImport) -> Problem:
    """Return the refusal without the advice, which names options of the command line: the page has choices instead."""
    sentence = error.sentence
    return Problem("invalid", f"{sentence[:1].upper()}{sentence[1:]}.", [])


def _shown(resource: Resource, row: Row) -> dict[str, Any]:
    values = dict(zip(resource.fields, row.values, strict=False))
    return {"line": row.line, "values": values, "given": row.given, "errors": row.errors}


def _result(piece: Piece, tried: list[Row], stored: StoredResponse) -> dict[str, Any]:
    """`tried`: the rows that PostgreSQL has accepted, or refused with errors."""
    rejected = [row for row in (*piece.rows, *tried) if row.errors]
    rejected.sort(key=lambda row: row.line)
    return {
        **stored.members["counts"],
        "rejected": sum(row.lines for row in rejected),
        "rejects": b"".join(map(json_line, rejected)).decode(),
        "read": piece.read,
        "head": piece.head,
        "line": piece.line,
        "done": piece.done,
        "is_end": piece.is_end,
    }
