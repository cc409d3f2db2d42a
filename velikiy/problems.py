"""Errors as RFC 9457 `application/problem+json`, translated once, here at the border."""

from http import HTTPStatus
from typing import Any

import orjson
import psycopg
import structlog
from flask import Flask, Response
from werkzeug.exceptions import HTTPException

from velikiy.postgres import DatabaseUnavailable

log = structlog.get_logger()


class Problem(Exception):
    """An answer that is not a success.

    `detail` is a sentence for the person who reads it; `errors` one entry for each bad field:
    `{"field": "email", "detail": "..."}`.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}

    def body(self) -> bytes:
        members: dict[str, Any] = {
            "type": "about:blank",  # RFC 9457, 4.2.1: the title is then the status' own phrase
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            members["errors"] = self.errors
        return orjson.dumps(members)

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, content_type="application/problem+json")


# SQLSTATE (PostgreSQL manual, appendix A) of what a statement may run into -> status and sentence.
SQLSTATES = {
    "23505": (409, "Another row has this value already."),
    "23502": (422, "A value is missing."),
    "23514": (422, "A value is outside of what is allowed."),
    "22001": (422, "A value is too long."),
    "22003": (422, "A number is too large."),
    "22P02": (422, "A value has the wrong form."),
    "22021": (422, "A text holds a character that cannot be stored."),
    # The server is there and cannot serve us: a standby, tables not made yet, rights not given.
    "25006": (503, "The database takes no writes at the moment."),
    "42P01": (503, "The database is not set up yet."),
    "42501": (503, "The database does not let the service in."),
}

# The framework's own sentences speak of URLs that were entered manually.
SENTENCES = {
    404: "There is nothing at this address.",
    405: "This method is not available here; the Allow header names those that are.",
    413: "The body is larger than 64 kB.",
}


def install(app: Flask) -> None:
    """Every error that leaves the app, its own and the framework's, becomes a problem."""

    @app.errorhandler(Problem)
    def problem(error: Problem) -> Response:
        return error.response()

    @app.errorhandler(HTTPException)
    def framework(error: HTTPException) -> Response:
        status = error.code or 500
        detail = SENTENCES.get(status) or error.description or HTTPStatus(status).phrase
        headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
        return Problem(status, detail, headers=headers).response()

    @app.errorhandler(DatabaseUnavailable)
    def away(error: DatabaseUnavailable) -> Response:
        log.warning("postgres.unavailable", cause=str(error))
        detail = "The database does not answer. Of a write the outcome is unknown: read before you try again."
        return Problem(503, detail, headers={"Retry-After": "1"}).response()

    @app.errorhandler(psycopg.Error)
    def database(error: psycopg.Error) -> Response:
        if error.sqlstate in SQLSTATES:
            status, detail = SQLSTATES[error.sqlstate]
            if status == 503:
                log.warning("postgres.unavailable", cause=f"{type(error).__name__} {error.sqlstate}")
                return Problem(status, detail, headers={"Retry-After": "1"}).response()
            return Problem(status, detail).response()
        # Neither the message nor the traceback: both may quote a row.
        log.error("postgres.error", error=type(error).__name__, sqlstate=error.sqlstate)
        return Problem(500, "The database refused a statement; the log has more under this request's id.").response()

    @app.errorhandler(Exception)
    def bug(error: Exception) -> Response:
        log.exception("unexpected", error=type(error).__name__)
        return Problem(500, "Something went wrong; the log has more under this request's id.").response()
