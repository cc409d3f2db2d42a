"""The headers of responses in the OpenAPI document."""

from collections.abc import Iterable
from typing import Any

from velikiy.http.requests import JSON, MERGE_PATCH

EXAMPLE_ETAG = '"5d3c8a71f0e2b94c6a1d7f38"'
ETAG_PATTERN = '^(W/)?"[0-9a-f]+"$'
STRONG_ETAG_PATTERN = '^"[0-9a-f]+"$'

HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The id of this request, which the logs contain too.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,64}$"},
        "example": "0f8fad5bd9cb469f-170-3",
    },
    "X-Cache-Status": {
        "description": "How the edge served the request: from its cache (HIT), not from its cache (MISS), after the"
        " entry had expired (EXPIRED), or without use of its cache (BYPASS). STALE: no app could answer, so the edge"
        " served an old entry.",
        "schema": {"type": "string", "enum": ["HIT", "MISS", "EXPIRED", "BYPASS", "STALE"]},
        "example": "HIT",
    },
    "Cache-Status": {
        "description": "RFC 9211: each cache that handled the response, starting nearest to the database.",
        "schema": {"type": "string"},
        "example": "redis; hit, nginx; fwd=uri-miss; stored",
    },
    "Cache-Control": {
        "description": "Caches outside this service cannot be invalidated, so they must revalidate each time.",
        "schema": {"type": "string"},
        "example": "private, no-cache",
    },
    "ETag": {
        "description": "Identifies this version of the response; after a write, the version that GET returns now. It is"
        " weak (`W/`) if the response is compressed; both forms name the same version.",
        "schema": {"type": "string", "pattern": ETAG_PATTERN},
        "example": EXAMPLE_ETAG,
    },
    "Last-Modified": {
        "description": "The time of the last write, in whole seconds, for people. Use ETags for conditions.",
        "schema": {"type": "string"},
        "example": "Sat, 31 Jan 2026 12:00:00 GMT",
    },
    "Link": {
        "description": 'RFC 8288: the next page (`rel="next"`), if any, and the first. Follow links unchanged.',
        "schema": {"type": "string"},
    },
    "Location": {"description": "The address of the new row.", "schema": {"type": "string", "format": "uri-reference"}},
    "Age": {"description": "The age of a stale response, in seconds.", "schema": {"type": "integer", "minimum": 0}},
    "Retry-After": {
        "description": "Seconds to wait before a retry.",
        "schema": {"type": "integer", "minimum": 0},
        "example": 1,
    },
    "RateLimit": {
        "description": "The rest of the limit of this client: `r` requests in the next `t` seconds. Absent if there is"
        " no limit (draft-ietf-httpapi-ratelimit-headers).",
        "schema": {"type": "string"},
        "example": '"client";r=499;t=1',
    },
    "RateLimit-Policy": {
        "description": "The limit of each client: `q` requests in `w` seconds. Absent if there is no limit.",
        "schema": {"type": "string"},
        "example": '"client";q=500;w=1',
    },
    "WWW-Authenticate": {
        "description": "RFC 6750: an API key is needed, or the key may not write (`insufficient_scope`).",
        "schema": {"type": "string", "pattern": "^Bearer"},
        "example": "Bearer",
    },
    "Idempotency-Replayed": {
        "description": "A request with this Idempotency-Key was completed before; this is its response.",
        "schema": {"type": "string", "const": "true"},
    },
    "Preference-Applied": {
        "description": "RFC 7240: the service has followed this preference of the request.",
        "schema": {"type": "string", "enum": ["return=representation", "return=minimal"]},
    },
    "Accept": {"description": "Media types of a body.", "schema": {"type": "string"}, "example": ", ".join(JSON)},
    "Vary": {
        "description": "The request headers on which the response depends: `Accept-Encoding` if it may be compressed,"
        " `Origin` if the operator has allowed origins.",
        "schema": {"type": "string"},
    },
    "Access-Control-Allow-Origin": {
        "description": "The origin of the page that may read the response, if the operator has allowed that origin.",
        "schema": {"type": "string"},
    },
    "Accept-Patch": {
        "description": "Media types of the body of PATCH.",
        "schema": {"type": "string"},
        "example": ", ".join(MERGE_PATCH),
    },
}

COMMON_HEADERS = ("X-Request-Id", "X-Cache-Status", "Cache-Status")
"""Headers of every response."""

SETTINGS_HEADERS = ("Vary", "Access-Control-Allow-Origin", "RateLimit", "RateLimit-Policy")
"""Headers that any response may have, depending on the settings of the service."""


def response_headers(*names: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return the headers of a response: `names` and COMMON_HEADERS are always present, `optional` and SETTINGS_HEADERS
    may be absent."""
    required = {name: {"required": True, **HEADERS[name]} for name in (*names, *COMMON_HEADERS)}
    return required | {name: HEADERS[name] for name in (*optional, *SETTINGS_HEADERS)}
