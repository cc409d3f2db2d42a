"""HTTP only: the routes of every resource. Read the request, call its rows, say what came of it."""

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import structlog
from flask import Blueprint, Flask, Response, g, request
from werkzeug.exceptions import NotFound
from werkzeug.routing import BaseConverter

from velikiy import logs
from velikiy.coherence import Change, Gate
from velikiy.http import batch, requests, responses
from velikiy.http.problems import Problem
from velikiy.http.requests import JSON, MERGE_PATCH
from velikiy.http.responses import Sent
from velikiy.postgres import Connection
from velikiy.resources.base import Resource
from velikiy.resources.idempotency import once
from velikiy.resources.pagination import BadCursor
from velikiy.resources.repository import Refusal, Rows

Write = Callable[[Connection], Change[Sent]]

REQUEST_ID = re.compile("[!-~]{1,64}")

READS = ("GET", "HEAD", "OPTIONS", "TRACE")
PORTS = {"http": ":80", "https": ":443"}
"""What an address of this scheme need not name."""


class IdConverter(BaseConverter):
    """An id in its one spelling: Flask's own `int` takes 007 and ٧ for 7, each a cache entry of its own."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        number = int(value)
        if number >= 2**63:
            raise NotFound  # werkzeug's own "no match" ends in 405 where another route has this method
        return number


def install(app: Flask, resources: dict[str, Resource], gate: Gate) -> None:
    app.url_map.converters["id"] = IdConverter
    app.url_map.merge_slashes = False
    app.before_request(_begin)
    app.after_request(_finish)
    for resource in resources.values():
        app.register_blueprint(_routes(resource, Rows(resource, gate), gate))


def _routes(resource: Resource, rows: Rows, gate: Gate) -> Blueprint:
    routes = Blueprint(resource.name, __name__, url_prefix=f"/{resource.name}")
    routes.before_request(_acceptable)
    batch_model = batch.model(resource)

    @routes.get("")
    def list_rows() -> Response:
        page = requests.page(resource)
        try:
            return responses.answer(rows.page(page, requests.asked()))
        except BadCursor:
            raise requests.bad_cursor() from None

    @routes.get("/count")
    def count_rows() -> Response:
        given = requests.parameters("q") if resource.words else requests.parameters()
        return responses.answer(rows.count(requests.words(given), requests.asked()))

    @routes.get("/<id:number>")
    def get_row(number: int) -> Response:
        requests.parameters()
        return responses.answer(rows.get(number, requests.asked()))

    @routes.post("")
    def create_row() -> Response:
        until = requests.until()
        requests.parameters()
        new = requests.body(resource.new)

        def change(connection: Connection) -> Change[Sent]:
            done = rows.create(connection, new)
            number, entry = done.outcome
            headers = {"Location": resource.item(number).path, "ETag": entry.etag}
            return done.with_outcome(Sent(201, {"id": number, "message": "Created"}, headers))

        return gate.write(once(requests.key(new), _told(resource, change)), until=until).response()

    def update(types: tuple[str, ...], number: int) -> Response:
        until = requests.until()
        requests.parameters()
        changes = requests.body(resource.changes, types)
        may = requests.condition()

        def change(connection: Connection) -> Change[Sent]:
            done = rows.update(connection, number, changes, may)
            return done.with_outcome(Sent(200, {"message": "Updated"}, {"ETag": done.outcome.etag}))

        return gate.write(_told(resource, change), lock_first=resource.invalidated_by(number), until=until).response()

    @routes.put("/<id:number>")
    def put_row(number: int) -> Response:
        return update(JSON, number)

    @routes.patch("/<id:number>")
    def patch_row(number: int) -> Response:
        return update(MERGE_PATCH, number)

    @routes.delete("/<id:number>")
    def delete_row(number: int) -> Response:
        until = requests.until()
        requests.parameters()
        may = requests.condition()

        def change(connection: Connection) -> Change[Sent]:
            return rows.delete(connection, number, may).with_outcome(Sent(200, {"message": "Deleted"}))

        return gate.write(_told(resource, change), lock_first=resource.invalidated_by(number), until=until).response()

    @routes.post("/batch")
    def run_batch() -> Response:
        until = requests.until()
        requests.parameters()
        asked = requests.body(batch_model, limit=requests.MAX_BATCH)
        return batch.run(rows, asked, requests.key(asked), until).response()

    return routes


def _told(resource: Resource, write: Write) -> Write:
    """The write, whose refusals are answers."""

    def told(connection: Connection) -> Change[Sent]:
        try:
            return write(connection)
        except Refusal as refusal:
            raise responses.refused(resource, refusal) from None

    return told


# ---- every request ----


def _begin() -> None:
    environ = request.environ
    given = environ.get("HTTP_X_REQUEST_ID", "")
    request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    g.began, g.request_id = time.monotonic(), request_id
    structlog.contextvars.clear_contextvars()  # of the request before, on this thread
    structlog.contextvars.bind_contextvars(request_id=request_id)
    if request.method not in READS and _is_of_a_foreign_page(environ):
        detail = (
            "A web page of another origin may not write here. Write from a page of this origin, or from a program,"
            " which sends neither Origin nor Sec-Fetch-Site."
        )
        raise Problem("forbidden", detail)
    # No route needs percent-encoding, so an encoded path is another spelling of one that has its own.
    path = request.path
    raw = environ.get("RAW_URI") or environ.get("REQUEST_URI") or path
    if raw.partition("?")[0] != path:
        raise Problem("not-found", "Nothing exists at this address. Write paths without percent-encoding.")


def _is_of_a_foreign_page(environ: dict[str, Any]) -> bool:
    """Tell whether a web page of another origin makes this write, as Go's net/http does (CrossOriginProtection). A page
    may send some requests to any address that its reader's browser reaches, without a word from the service."""
    if site := environ.get("HTTP_SEC_FETCH_SITE"):
        # The browser alone sets this header, and it knows the address that it shows. So this one decides where both are
        # present: beside "same-origin" no browser sends a foreign Origin, but a proxy may have changed Host.
        return site not in ("same-origin", "none")
    # Browsers that are old, or do not trust plain HTTP, send Origin alone. What sends neither is no browser.
    if not (origin := environ.get("HTTP_ORIGIN", "").lower()):
        return False
    scheme = origin.partition("://")[0]
    port = PORTS.get(scheme, "")
    host = environ.get("HTTP_HOST", "").lower().removesuffix(port)
    return bool(origin.removesuffix(port) != f"{scheme}://{host}")


def _acceptable() -> None:
    accept = request.environ.get("HTTP_ACCEPT")
    if accept and not requests.takes_json(accept):
        raise Problem("not-acceptable", "Responses are JSON: allow application/json in the Accept header.")


def _finish(response: Response) -> Response:
    # Caches behind ours (browsers, CDNs) cannot be told of a write: they must ask each time.
    headers, method = response.headers, request.method
    headers.setdefault("Cache-Control", "private, no-cache")
    headers.add("X-Content-Type-Options", "nosniff")  # to set one is to look through all of them
    headers.add("X-Request-Id", g.request_id)
    if method == "OPTIONS" and response.status_code == 200:
        response.status_code = 204
        del headers["Content-Type"]
        if "PATCH" in headers.get("Allow", ""):
            headers["Accept-Patch"] = ", ".join(MERGE_PATCH)
    # The route and not the path: a mistyped address may hold somebody's e-mail.
    # Edges and containers' health checks ask every second; nobody wants to read that.
    logs.request(
        "debug" if request.path.startswith(("/livez", "/readyz", "/.lease/")) else "info",
        method=method,
        route=request.url_rule.rule if request.url_rule else None,
        status=response.status_code,
        milliseconds=round((time.monotonic() - g.began) * 1000, 1),
        request_id=g.request_id,
    )
    return response
