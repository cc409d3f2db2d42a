"""Steps that every request passes before its route, and every response behind it."""

import re
import secrets
import time
from collections.abc import Callable

import structlog
from flask import Flask, Response, g, request

from velikiy import logs
from velikiy.http import forwarded, requests
from velikiy.http.requests import MERGE_PATCH
from velikiy.resources.problems import Problem

REQUEST_ID = re.compile("[!-~]{1,64}")

READ_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}

QUIET = ("/livez", "/readyz", "/.lease/")
"""Addresses that edges and health checks request every second. Their log lines have the level debug."""


def begin() -> None:
    header = request.environ.get("HTTP_X_REQUEST_ID", "")
    g.began, g.request_id = time.monotonic(), header if REQUEST_ID.fullmatch(header) else secrets.token_hex(16)
    g.path_prefix = forwarded.path_prefix()
    structlog.contextvars.clear_contextvars()  # the previous request on this thread left its own
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def refuse_other_origins() -> None:
    """Refuse a write by a web page of another origin."""
    if request.method not in READ_METHODS and _is_cross_origin():
        detail = (
            "A web page of another origin may not write here. Write from a page of this origin, or from a program,"
            " which sends neither Origin nor Sec-Fetch-Site."
        )
        raise Problem("forbidden", detail)


def _is_cross_origin() -> bool:
    """Return whether a web page of another origin sent this request, by the rules of Go's CrossOriginProtection
    (net/http). A browser sends some requests of a page to any address without asking the service."""
    environ = request.environ
    if site := environ.get("HTTP_SEC_FETCH_SITE"):
        # Only the browser sets this header, and it knows the address that it shows. So this header decides if both are
        # present: with "same-origin" no browser sends a foreign Origin, but a proxy may have changed Host.
        return site not in ("same-origin", "none")
    # A browser that is old, or does not trust plain HTTP, sends only Origin. A program sends neither header.
    if not (origin := environ.get("HTTP_ORIGIN", "").lower()):
        return False
    scheme = origin.partition("://")[0]
    port = DEFAULT_PORTS.get(scheme, "")
    host = environ.get("HTTP_HOST", "").lower().removesuffix(port)
    # Only a trusted proxy knows the scheme: the edge itself speaks plain HTTP.
    known_scheme = environ.get("HTTP_X_FORWARDED_PROTO", scheme).lower()
    return bool(origin.removesuffix(port) != f"{scheme}://{host}" or scheme != known_scheme)


def refuse_encoded_paths() -> None:
    """Refuse percent-encoding in a path. No route needs it, so an encoded path is a second spelling of an address."""
    path = request.path
    raw = request.environ.get("RAW_URI") or request.environ.get("REQUEST_URI") or path
    if raw.partition("?")[0] != path:
        raise Problem("not-found", "Nothing exists at this address. Write paths without percent-encoding.")


def refuse_other_media_types() -> None:
    """Refuse a client that does not accept JSON. The routes of resources use it; pages for people do not."""
    accept = request.environ.get("HTTP_ACCEPT")
    if accept and not requests.takes_json(accept):
        raise Problem("not-acceptable", "Responses are JSON: allow application/json in the Accept header.")


def complete(response: Response) -> Response:
    headers, method = response.headers, request.method
    # Caches in front of the edge (browsers, CDNs) cannot be invalidated, so they must revalidate each time.
    headers.setdefault("Cache-Control", "private, no-cache")
    headers.add("X-Content-Type-Options", "nosniff")  # add() is faster than setting, which searches all headers
    headers.add("X-Request-Id", g.request_id)
    if method == "OPTIONS" and response.status_code == 200:
        response.status_code = 204
        del headers["Content-Type"]
        if "PATCH" in headers.get("Allow", ""):
            headers["Accept-Patch"] = ", ".join(MERGE_PATCH)
    return response


def log(response: Response) -> Response:
    """Log the request with its route instead of its path: a mistyped path may contain an e-mail address."""
    logs.request(
        "debug" if request.path.startswith(QUIET) else "info",
        method=request.method,
        route=request.url_rule.rule if request.url_rule else None,
        status=response.status_code,
        milliseconds=round((time.monotonic() - g.began) * 1000, 1),
        request_id=g.request_id,
        **forwarded.client_ids(),
    )
    return response


BEFORE: tuple[Callable[[], None], ...] = (begin, refuse_other_origins, refuse_encoded_paths)
"""The steps before the route, in this order. A step returns or raises Problem. A check that must also hold for hits at
the edge belongs into edge/lua/entrance.lua."""

AFTER: tuple[Callable[[Response], Response], ...] = (complete, log)
"""The steps behind the route, in this order. Counters belong here."""


def install(app: Flask) -> None:
    for step in BEFORE:
        app.before_request(step)
    for finish in reversed(AFTER):  # Flask calls the last one first
        app.after_request(finish)
