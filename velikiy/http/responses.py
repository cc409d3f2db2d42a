"""The responses to reads and to writes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson
from flask import Response, g, request

from velikiy.coherence import Answer, Entry
from velikiy.http import forwarded, pages, problems
from velikiy.resources.idempotency import StoredResponse
from velikiy.resources.problems import MEDIA_TYPE, Problem


def json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, content_type="application/json")


def uncached(content: Any) -> Response:
    """Return JSON that may differ in the next response, even if nothing was written."""
    return json(content, headers={"Cache-Control": "no-store"})


def of_read(answer: Answer) -> Response:
    """Return the entry, or 304 if the client has it (RFC 9110, 13.1.2).

    If-Modified-Since is ignored: a date has whole seconds, and would hide the second of two writes in one second.
    """
    entry = answer.entry
    if entry.status == 404:
        if pages.is_navigation():
            return problems.respond(Problem("not-found", orjson.loads(entry.body)["detail"]))
        body = b'%s,"request_id":"%s"}' % (forwarded.prefixed_problem(entry.body)[:-1], g.request_id.encode())
        response = Response(body, 404, content_type=MEDIA_TYPE)
    else:
        response = Response(entry.body, entry.status, content_type="application/json")
    link = forwarded.prefixed_links(entry.link)
    for name, value in (("ETag", entry.etag), ("Last-Modified", entry.modified), ("Link", link)):
        if value:
            response.headers.add(name, value)
    if entry.etag and "HTTP_IF_NONE_MATCH" in request.environ:
        tags = request.if_none_match
        if tags.star_tag or tags.contains_weak(entry.etag.strip('"')):
            response.status_code = 304
            response.set_data(b"")
    # For the edge: Cache-Status marks a response that passed the gate, X-Accel-Expires one that must not be stored.
    response.headers.add("Cache-Status", answer.cache_status)
    if not answer.storable:
        response.headers.add("X-Accel-Expires", "0")
    return response


def preferred(response: StoredResponse, entry: Entry, preference: str) -> StoredResponse:
    """Return the response to a write as its client prefers it (RFC 7240). Without a preference it is minimal, too.

    Args:
        response: The minimal response.
        entry: The row as a read returns it.
        preference: See `requests.preference`.
    """
    if not preference:
        return response
    members = orjson.loads(entry.body) if preference == "representation" else response.members
    return replace(response, members=members, headers={**response.headers, **applied(preference)})


def applied(preference: str) -> dict[str, str]:
    """Return the header that says that the service has followed the preference."""
    return {"Preference-Applied": f"return={preference}"} if preference else {}


def of_write(stored: StoredResponse) -> Response:
    if stored.problem:
        return problems.respond(Problem(stored.problem, **stored.members, headers=stored.headers))
    headers = dict(stored.headers)
    if "Location" in headers:  # an idempotency key keeps it without a prefix
        headers["Location"] = g.path_prefix + headers["Location"]
    return json(stored.members, stored.status, headers)
