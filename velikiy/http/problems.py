"""Translate every error that leaves the app into a problem (RFC 9457). The edge answers its own errors with the same
kinds (edge/conf/problems.conf). A person who has opened an address in a browser gets the problem as a page."""

import psycopg
import structlog
from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException

from velikiy.coherence import TooLate
from velikiy.http import pages
from velikiy.postgres import DatabaseUnavailable
from velikiy.resources.problems import KIND_BY_STATUS, KINDS, MEDIA_TYPE, RETRY_LATER, SQLSTATES, Problem
from velikiy.tracebacks import sender

log = structlog.get_logger()

DETAILS = {
    401: "A valid API key is needed here. Send it as Authorization: Bearer <key>.",
    404: "Nothing exists at this address. The service's page /docs lists the addresses that exist.",
    405: "This address does not support the method. The Allow header lists the methods that it supports.",
    421: "The service does not answer under this name. Use localhost or the address that it listens on, or add the name"
    " to ALLOWED_HOSTS.",
}
"""Details of errors that the framework or the edge raises as well. The framework's own sentences speak of URLs that
were entered manually."""

OUTCOME_UNKNOWN = "The outcome of a write is unknown: read before you retry."
NO_ANSWER = "The database does not answer, or has no free connection."
POSTGRES_SILENT = {"Postgres": "silent"}
"""Tells the edge that another app may answer a read, if PostgreSQL answers that one (edge/lua/read.lua)."""

NOT_CARRIED_OUT = "The request was not carried out and can be retried."


def respond(problem: Problem) -> Response:
    if pages.is_navigation():
        return pages.problem_page(problem)
    body = problem.body(g.path_prefix, request_id=g.request_id)
    return Response(body, problem.status, problem.headers, content_type=MEDIA_TYPE)


def install(app: Flask) -> None:
    app.register_error_handler(Problem, respond)
    app.register_error_handler(HTTPException, _framework_error)
    app.register_error_handler(DatabaseUnavailable, _database_unavailable)
    app.register_error_handler(TooLate, _write_too_late)
    app.register_error_handler(psycopg.Error, _statement_error)
    app.register_error_handler(Exception, _bug)


def _framework_error(error: HTTPException) -> Response:
    status = error.code if error.code in KIND_BY_STATUS else 400 if (error.code or 500) < 500 else 500
    kind = KIND_BY_STATUS[status]
    detail = DETAILS.get(status) or error.description or KINDS[kind].title
    headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
    return respond(Problem(kind, detail, headers=headers))


def _database_unavailable(error: DatabaseUnavailable) -> Response:
    log.warning("postgres.unavailable", cause=str(error))
    # With an SQLSTATE the database has answered: it shuts down, is full, or has cancelled the statement.
    sqlstate = getattr(error.__cause__, "sqlstate", None)
    if sqlstate in SQLSTATES:
        cause = SQLSTATES[sqlstate][1]
    else:
        cause = "The database refused the request." if sqlstate else NO_ANSWER
    # Without a COMMIT nothing is carried out, now or later.
    detail = f"{cause} {OUTCOME_UNKNOWN if error.may_be_committed else NOT_CARRIED_OUT}"
    headers = {**RETRY_LATER, **POSTGRES_SILENT} if error.is_silent else RETRY_LATER
    return respond(Problem("unavailable", detail, headers=headers))


def _write_too_late(_: TooLate) -> Response:
    log.warning("write.too_late")
    detail = f"The write missed its deadline, or its client had gone. {NOT_CARRIED_OUT}"
    return respond(Problem("unavailable", detail, headers=RETRY_LATER))


def _statement_error(error: psycopg.Error) -> Response:
    detail = "The database refused a statement."
    if error.sqlstate in SQLSTATES:
        kind, detail = SQLSTATES[error.sqlstate]
        if kind == "unavailable":
            log.warning("postgres.unavailable", cause=f"{type(error).__name__} {error.sqlstate}")
            return respond(Problem(kind, f"{detail} {NOT_CARRIED_OUT}", headers=RETRY_LATER))
        if KINDS[kind].status < 500:
            return respond(Problem(kind, detail))
    # The message and the traceback may quote a row, so neither is logged. The message of a wrong statement (class 42)
    # names only the table or the column.
    message = error.diag.message_primary if (error.sqlstate or "").startswith("42") else None
    log.error(
        "postgres.error",
        error=type(error).__name__,
        sqlstate=error.sqlstate,
        message=message,
        statement=sender(error),
    )
    return respond(Problem("internal-error", f"{detail} The logs have the details under `request_id`."))


def _bug(error: Exception) -> Response:
    log.exception("unexpected", error=type(error).__name__)
    detail = "An unexpected error occurred. The logs have the details under `request_id`."
    return respond(Problem("internal-error", detail))
