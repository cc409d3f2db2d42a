"""Errors as RFC 9457 `application/problem+json`, translated once, here at the border; each kind has a page of its own
under /problems/. What Nginx answers itself uses the same kinds (edge/nginx.conf)."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import orjson
import psycopg
import structlog
from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException

from velikiy.coherence import TooLate
from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()


PROBLEM = "application/problem+json"


class Kind(NamedTuple):
    status: int
    title: str
    advice: str
    """What it means, and what to do about it."""


KINDS = {
    "bad-request": Kind(
        400, "Bad Request", "The request is malformed. `detail` names the part at fault and the reason."
    ),
    "not-json": Kind(400, "Not JSON", "The body is not valid JSON (RFC 8259), or it repeats a key."),
    "forbidden": Kind(
        403,
        "Forbidden",
        "A web page may write only to the origin that served it (`Sec-Fetch-Site`, `Origin`). Write from a page of"
        " this origin, or from a program, which sends neither header.",
    ),
    "not-found": Kind(
        404, "Not Found", "Nothing exists at this address, or it was deleted. Write paths without percent-encoding."
    ),
    "method-not-allowed": Kind(
        405, "Method Not Allowed", "The `Allow` header lists the methods that this address supports."
    ),
    "not-acceptable": Kind(406, "Not Acceptable", "Responses are JSON: allow `application/json` in `Accept`."),
    "request-timeout": Kind(408, "Request Timeout", "The request did not arrive in time. Send it again."),
    "taken": Kind(409, "Taken", "Another row already has this value, which must be unique. Choose another value."),
    "batch-refused": Kind(
        409,
        "Batch Refused",
        "`errors` lists each operation that cannot be carried out. The batch had no effect. Correct these operations"
        " and send it again.",
    ),
    "in-flight": Kind(
        409,
        "In Flight",
        "A request with this Idempotency-Key is still in progress. Retry after `Retry-After` seconds.",
    ),
    "length-required": Kind(411, "Length Required", "Send `Content-Length`."),
    "precondition-failed": Kind(
        412,
        "Precondition Failed",
        "The resource has changed since you read it. Fetch it again and retry with its new ETag.",
    ),
    "content-too-large": Kind(
        413,
        "Content Too Large",
        "A body may have up to 64 kB, and the body of a batch up to 2 MB. Split the request into smaller requests.",
    ),
    "uri-too-long": Kind(414, "URI Too Long", "The address is longer than 4 kB. Shorten it."),
    "unsupported-media-type": Kind(
        415, "Unsupported Media Type", "Send JSON in UTF-8 and declare it: `Content-Type: application/json`."
    ),
    "range-not-satisfiable": Kind(416, "Range Not Satisfiable", "The response has no such range. Omit `Range`."),
    "expectation-failed": Kind(
        417, "Expectation Failed", "The service does not support this value of `Expect`. Omit the header."
    ),
    "invalid": Kind(422, "Invalid", "`errors` lists each invalid field and the reason."),
    "key-reused": Kind(
        422, "Key Reused", "This Idempotency-Key was already used for a different request. Use a new key."
    ),
    "too-many-requests": Kind(429, "Too Many Requests", "Retry after `Retry-After` seconds."),
    "header-fields-too-large": Kind(431, "Request Header Fields Too Large", "Send fewer or shorter header fields."),
    "internal-error": Kind(
        500,
        "Internal Server Error",
        "An unexpected error occurred. The logs have the details under `request_id`: report this id to the operator of"
        " the service.",
    ),
    "not-implemented": Kind(501, "Not Implemented", "The service does not know this method."),
    "bad-gateway": Kind(
        502,
        "Bad Gateway",
        "No app instance answered. The outcome of a write is unknown: read before you retry.",
    ),
    "unavailable": Kind(
        503,
        "Service Unavailable",
        "The database does not answer in time, or cannot serve the request at the moment. Retry after `Retry-After`"
        " seconds. The outcome of a write is unknown: read before you retry, or send writes with an Idempotency-Key.",
    ),
    "gateway-timeout": Kind(
        504,
        "Gateway Timeout",
        "No app instance answered in time. The outcome of a write is unknown: read before you retry.",
    ),
    "http-version-not-supported": Kind(505, "HTTP Version Not Supported", "Use HTTP/1.1."),
}

BY_STATUS = {kind.status: name for name, kind in reversed(KINDS.items())}
"""The general one of each status, for what the framework raises."""


class Problem(Exception):
    """An answer that is not a success.

    `kind` is a key of KINDS; `detail` a sentence for the person who reads it; `errors` one entry for each bad field:
    `{"field": "email", "detail": "..."}`.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        errors: list[dict[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def body(self, **more: str) -> bytes:
        """JSON, with these members besides."""
        members: dict[str, Any] = {
            "type": f"/problems/{self.kind}",
            "title": KINDS[self.kind].title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            members["errors"] = self.errors
        return orjson.dumps({**members, **more})

    def response(self) -> Response:
        body = self.body(request_id=g.request_id)
        return Response(body, self.status, self.headers, content_type=PROBLEM)


# SQLSTATE (PostgreSQL manual, appendix A) of what a statement may run into -> kind and sentence.
SQLSTATES = {
    "23505": ("taken", "Another row already has this value, which must be unique."),
    "23502": ("invalid", "A required value is missing."),
    "23503": ("invalid", "A value refers to a row that does not exist, or other rows still refer to this row."),
    "23514": ("invalid", "A value violates a constraint of the table."),
    "22001": ("invalid", "A value is too long."),
    "22003": ("invalid", "A number is too large."),
    "22P02": ("invalid", "A value has the wrong format."),
    "22021": ("invalid", "A text contains a character that cannot be stored."),
    # Nothing was done: two writers waited for each other.
    "40001": ("unavailable", "A concurrent write conflicted with this request, which had no effect. Retry."),
    "40P01": ("unavailable", "A concurrent write conflicted with this request, which had no effect. Retry."),
    # The server is there and cannot serve us: a standby, tables not made yet, rights not given, no room for locks. A
    # missing column (42703) is not among them: a statement misspells it, and to ask again does not help.
    "25006": ("unavailable", "The database is read-only at the moment."),
    "42P01": ("unavailable", "The database is not set up yet: its tables are missing."),
    "42501": ("unavailable", "The database denies the service access to its tables."),
    "53200": ("unavailable", "The database has too little memory for this request at the moment."),
}

# The framework's own sentences speak of URLs that were entered manually.
SENTENCES = {
    404: "Nothing exists at this address. /docs lists the addresses that exist.",
    405: "This address does not support the method. The Allow header lists the methods that it supports.",
}

RETRY = {"Retry-After": "1"}


def install(app: Flask) -> None:
    """Every error that leaves the app, its own and the framework's, becomes a problem."""

    @app.errorhandler(Problem)
    def problem(error: Problem) -> Response:
        return error.response()

    @app.errorhandler(HTTPException)
    def framework(error: HTTPException) -> Response:
        status = error.code if error.code in BY_STATUS else 400 if (error.code or 500) < 500 else 500
        detail = SENTENCES.get(status) or error.description or KINDS[BY_STATUS[status]].title
        headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
        return Problem(BY_STATUS[status], detail, headers=headers).response()

    @app.errorhandler(DatabaseUnavailable)
    def away(error: DatabaseUnavailable) -> Response:
        log.warning("postgres.unavailable", cause=str(error))
        return Problem("unavailable", _why(error), headers=RETRY).response()

    @app.errorhandler(TooLate)
    def too_late(_: TooLate) -> Response:
        log.warning("write.too_late")
        detail = "The write missed the deadline of the edge. It was not carried out and can be retried."
        return Problem("unavailable", detail, headers=RETRY).response()

    @app.errorhandler(psycopg.Error)
    def database(error: psycopg.Error) -> Response:
        if error.sqlstate in SQLSTATES:
            kind, detail = SQLSTATES[error.sqlstate]
            if kind == "unavailable":
                log.warning("postgres.unavailable", cause=f"{type(error).__name__} {error.sqlstate}")
                return Problem(kind, detail, headers=RETRY).response()
            return Problem(kind, detail).response()
        # The message may quote a row, and so may the traceback. Not where the statement itself is wrong (class 42): the
        # message then names the table or the column.
        message = error.diag.message_primary if (error.sqlstate or "").startswith("42") else None
        log.error("postgres.error", error=type(error).__name__, sqlstate=error.sqlstate, message=message)
        detail = "The database refused a statement. The logs have the details under `request_id`."
        return Problem("internal-error", detail).response()

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        log.exception("unexpected", error=type(error).__name__)
        detail = "An unexpected error occurred. The logs have the details under `request_id`."
        return Problem("internal-error", detail).response()

    # ---- what each kind means, for people ----

    @app.get("/problems/", strict_slashes=False)
    def list_problems() -> Response:
        links = "".join(
            f'<li><a href="/problems/{name}">{kind.status} {escape(kind.title)}</a>: {escape(kind.advice)}</li>'
            for name, kind in KINDS.items()
        )
        return _page(
            "Problems", f"<p>The <code>type</code> of an error links to one of these pages.</p><ul>{links}</ul>"
        )

    @app.get("/problems/<name>")
    def show_problem(name: str) -> Response:
        if name not in KINDS:
            raise Problem("not-found", SENTENCES[404])
        kind = KINDS[name]
        return _page(
            f"{kind.status} {kind.title}",
            f"<p>{escape(kind.advice)}</p><p><code>/problems/{name}</code></p>"
            '<p><a href="/problems/">All problems</a>, <a href="/docs">the API</a></p>',
        )


def _why(error: DatabaseUnavailable) -> str:
    # Where there is an SQLSTATE the database has answered: it shuts down, is full, was told to cancel.
    sqlstate = getattr(error.__cause__, "sqlstate", None)
    if sqlstate in SQLSTATES:
        return SQLSTATES[sqlstate][1]
    cause = "The database cancelled the request." if sqlstate else "The database does not answer."
    return f"{cause} The outcome of a write is unknown: read before you retry."


def _page(title: str, body: str) -> Response:
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><h1>{escape(title)}</h1>{body}</html>'
    )
    policy = {"Content-Security-Policy": "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"}
    return Response(html, headers=policy, content_type="text/html; charset=utf-8")
