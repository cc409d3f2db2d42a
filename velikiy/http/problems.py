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
    "bad-request": Kind(400, "Bad Request", "The request could not be understood. `detail` names what and why."),
    "not-json": Kind(400, "Not JSON", "The body is not the JSON (RFC 8259) that it should be, or gives a key twice."),
    "forbidden": Kind(
        403,
        "Forbidden",
        "A web page may write only to the origin that it came from (`Sec-Fetch-Site`, `Origin`). Programs send neither"
        " header.",
    ),
    "not-found": Kind(
        404, "Not Found", "There is nothing at this address, or not any more. Paths are spelled without %-encoding."
    ),
    "method-not-allowed": Kind(405, "Method Not Allowed", "The header `Allow` names the methods of this address."),
    "not-acceptable": Kind(406, "Not Acceptable", "Answers are JSON: allow `application/json` in `Accept`."),
    "request-timeout": Kind(408, "Request Timeout", "The request did not arrive in time. Send it again."),
    "taken": Kind(409, "Taken", "Another one has this value already, and only one can. Choose another value."),
    "batch-refused": Kind(
        409, "Batch Refused", "`errors` has each operation that cannot be done. Nothing of the batch was done."
    ),
    "in-flight": Kind(
        409, "In Flight", "A request with this Idempotency-Key has not ended yet. Ask again after `Retry-After`."
    ),
    "length-required": Kind(411, "Length Required", "Send `Content-Length`."),
    "precondition-failed": Kind(
        412,
        "Precondition Failed",
        "What is there is not what the request's condition names: somebody has changed it since. Read it, decide"
        " again, and send the new ETag.",
    ),
    "content-too-large": Kind(413, "Content Too Large", "A body may have 64 kB, that of a batch 2 MB. Send several."),
    "uri-too-long": Kind(414, "URI Too Long", "The address is longer than 4 kB."),
    "unsupported-media-type": Kind(
        415, "Unsupported Media Type", "Send JSON in UTF-8, and say so: `Content-Type: application/json`."
    ),
    "range-not-satisfiable": Kind(416, "Range Not Satisfiable", "The answer has no such range."),
    "expectation-failed": Kind(417, "Expectation Failed", "What the header `Expect` asks for is not known here."),
    "invalid": Kind(422, "Invalid", "`errors` has each field that cannot be taken as it is, and why."),
    "key-reused": Kind(
        422, "Key Reused", "This Idempotency-Key came with another request before. Each request has a key of its own."
    ),
    "too-many-requests": Kind(429, "Too Many Requests", "Ask again after `Retry-After`."),
    "header-fields-too-large": Kind(431, "Request Header Fields Too Large", "Send fewer or shorter header fields."),
    "internal-error": Kind(
        500,
        "Internal Server Error",
        "Something failed inside. The logs have it under `request_id`: report it to whoever runs the service.",
    ),
    "not-implemented": Kind(501, "Not Implemented", "This method is not known here."),
    "bad-gateway": Kind(
        502, "Bad Gateway", "No app answered. Of a write the outcome is unknown: read before you try again."
    ),
    "unavailable": Kind(
        503,
        "Service Unavailable",
        "The database does not answer, or not in time, or cannot serve the request at the moment. Ask again after"
        " `Retry-After`; of a write the outcome is unknown: read before you try again, or send it with an"
        " Idempotency-Key.",
    ),
    "gateway-timeout": Kind(
        504, "Gateway Timeout", "No app answered in time. Of a write the outcome is unknown: read before you try again."
    ),
    "http-version-not-supported": Kind(505, "HTTP Version Not Supported", "Speak HTTP/1.1."),
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
    "23505": ("taken", "Another row has this value already."),
    "23502": ("invalid", "A value is missing."),
    "23503": ("invalid", "A value names something that does not exist, or that others still name."),
    "23514": ("invalid", "A value is outside of what is allowed."),
    "22001": ("invalid", "A value is too long."),
    "22003": ("invalid", "A number is too large."),
    "22P02": ("invalid", "A value has the wrong form."),
    "22021": ("invalid", "A text holds a character that cannot be stored."),
    # Nothing was done: two writers waited for each other.
    "40001": ("unavailable", "Another write came between. Try again."),
    "40P01": ("unavailable", "Another write came between. Try again."),
    # The server is there and cannot serve us: a standby, tables not made yet, rights not given, no room for locks. A
    # missing column (42703) is not among them: a statement misspells it, and to ask again does not help.
    "25006": ("unavailable", "The database takes no writes at the moment."),
    "42P01": ("unavailable", "The database is not set up yet."),
    "42501": ("unavailable", "The database does not let the service in."),
    "53200": ("unavailable", "The database has too much to do at the moment."),
}

# The framework's own sentences speak of URLs that were entered manually.
SENTENCES = {
    404: "There is nothing at this address; /docs shows those that there are.",
    405: "This method is not available here; the Allow header names those that are.",
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
        detail = "The write waited for longer than the edge does. It was not carried out and can be retried."
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
        detail = "The database refused a statement; the log has more under this request's id."
        return Problem("internal-error", detail).response()

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        log.exception("unexpected", error=type(error).__name__)
        detail = "Something went wrong; the log has more under this request's id."
        return Problem("internal-error", detail).response()

    # ---- what each kind means, for people ----

    @app.get("/problems/", strict_slashes=False)
    def list_problems() -> Response:
        links = "".join(
            f'<li><a href="/problems/{name}">{kind.status} {escape(kind.title)}</a>: {escape(kind.advice)}</li>'
            for name, kind in KINDS.items()
        )
        return _page("Problems", f"<p>What errors of this service mean (their <code>type</code>).</p><ul>{links}</ul>")

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
    said = "The database has broken the request off." if sqlstate else "The database does not answer."
    return f"{said} Of a write the outcome is unknown: read before you try again."


def _page(title: str, body: str) -> Response:
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><h1>{escape(title)}</h1>{body}</html>'
    )
    policy = {"Content-Security-Policy": "default-src 'none'; base-uri 'none'; frame-ancestors 'none'"}
    return Response(html, headers=policy, content_type="text/html; charset=utf-8")
