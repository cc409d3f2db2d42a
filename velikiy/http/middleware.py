"""Steps that every request passes before its route, and every response behind it."""

import re
import secrets
import time
from collections.abc import Callable
from functools import cache

import structlog
from flask import Flask, Response, g, request
from prometheus_client import Counter, Histogram

from velikiy import logs, metrics, traces
from velikiy.http import forwarded, requests
from velikiy.http.auth import Auth
from velikiy.http.browsers import READ_METHODS, Browsers
from velikiy.http.requests import MERGE_PATCH
from velikiy.postgres.pipeline import POSTGRES_PID
from velikiy.resources.problems import RETRY_LATER, Problem

REQUEST_ID = re.compile("[!-~]{1,64}")

QUIET = ("/livez", "/readyz", "/.lease/", "/.keys/", "/.live")
"""Addresses that edges and health checks request every second. Their log lines have the level debug."""

REFUSALS = {
    "busy": "Too many searches and batches are in progress.",
    "locked": "Other writes already wait for rows that another session has locked.",
}


def begin() -> None:
    header = request.environ.get("HTTP_X_REQUEST_ID", "")
    g.began, g.request_id = time.monotonic(), header if REQUEST_ID.fullmatch(header) else secrets.token_hex(16)
    g.path_prefix = forwarded.path_prefix()
    structlog.contextvars.clear_contextvars()  # the previous request on this thread left its own
    structlog.contextvars.bind_contextvars(request_id=g.request_id)
    g.trace = traces.begin_request(request.environ.get("HTTP_TRACEPARENT"))


def refuse_beyond_the_share() -> None:
    """Refuse a search or a batch while its share of the threads is busy, and a write while others wait for its row
    (velikiy/server/shares.py)."""
    reason = getattr(request.environ.get("gunicorn.socket"), "refused_as", "")
    if reason:
        detail = f"{REFUSALS[reason]} The request was not carried out and can be retried."
        raise Problem("unavailable", detail, headers=RETRY_LATER)


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
    session = structlog.contextvars.get_contextvars().get(POSTGRES_PID)
    logs.request(
        "debug" if request.path.startswith(QUIET) else "error" if response.status_code >= 500 else "info",
        method=request.method,
        route=_route_of_request(),
        status=response.status_code,
        milliseconds=round((time.monotonic() - g.began) * 1000, 1),
        request_id=g.request_id,
        **({POSTGRES_PID: session} if session else {}),
        **forwarded.client_ids(),
    )
    return response


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def count(response: Response) -> Response:
    """Count the request by its route, and end its trace. The number of paths has no limit, and neither has the number
    of methods."""
    route = _route_of_request()
    method = request.method if request.method in METHODS else "(other)"
    cache_status = response.headers.get("Cache-Status")
    if cache_status:
        tier = "redis" if cache_status.startswith("redis; hit") else "postgres"
    else:
        tier = "none" if method in READ_METHODS else "postgres"
    counter, duration = _series(method, route, response.status_code, tier)
    counter.inc()
    duration.observe(time.monotonic() - g.began)
    if g.trace:
        g.trace.end(method, route, response.status_code, tier=tier, request_id=g.request_id)
    return response


@cache
def _series(method: str, route: str, status: int, tier: str) -> tuple[Counter, Histogram]:
    """Return the series of such requests. There are few, and the library takes as long to find one as to count."""
    return metrics.APP_REQUESTS.labels(method, route, str(status)), metrics.APP_DURATION.labels(route, tier)


def _route_of_request() -> str:
    rule = request.url_rule
    return _route(rule.rule) if rule else "(other)"


@cache
def _route(rule: str) -> str:
    """Return the route as the API's document names it: /users/{id}."""
    return re.sub("<id:[a-z_]+>", "{id}", re.sub("<(?:path:)?([a-z_]+)>", r"{\1}", rule))


def audit(response: Response) -> Response:
    """Log which API key wrote what. The line has ids only: no value of a row, and no address."""
    key = g.get("api_key")
    if key and request.method not in READ_METHODS:
        row_id = (request.view_args or {}).get("row_id") or response.headers.get("Location", "").rpartition("/")[2]
        logs.audit(
            key_id=key.id,
            key=key.name,
            method=request.method,
            route=_route_of_request(),
            row_id=int(row_id) if row_id else None,
            status=response.status_code,
            request_id=g.request_id,
        )
    return response


def install(app: Flask, browsers: Browsers, keys: Auth) -> None:
    """Add the steps, in their order. A step before the route returns nothing, returns a response or raises Problem. A
    check that must also hold for hits at the edge belongs into edge/lua/entrance.lua, too. Counters belong behind the
    route.

    Flask gets one function for each list.

    Gains: before each call Flask examines whether the function is a coroutine, which takes longer than most steps.
    Relies on: Flask's before_request and after_request.
    Remove when: Flask examines a function once.
    """
    steps: tuple[Callable[[], Response | None], ...] = (
        begin,
        refuse_beyond_the_share,
        browsers.refuse_other_hosts,
        browsers.answer_preflight,
        keys.check,
        browsers.refuse_other_origins,
        refuse_encoded_paths,
    )
    finishes = (browsers.share, complete, log, count, audit)

    @app.before_request
    def before() -> Response | None:
        for step in steps:
            if (response := step()) is not None:
                return response
        return None

    @app.after_request
    def after(response: Response) -> Response:
        for finish in finishes:
            response = finish(response)
        return response
