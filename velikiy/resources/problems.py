"""The kinds of errors that the API reports, as RFC 9457 problems.

This module needs no HTTP framework, because imports and idempotency keys report problems as well.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

MEDIA_TYPE = "application/problem+json"


class Kind(NamedTuple):
    status: int
    title: str
    advice: str
    """The meaning, and what a client can do about it."""


KINDS = {
    "bad-request": Kind(
        400, "Bad Request", "The request is malformed. `detail` names the part at fault and the reason."
    ),
    "not-json": Kind(400, "Not JSON", "The body is not valid JSON (RFC 8259), or it repeats a key."),
    "unauthorized": Kind(
        401,
        "Unauthorized",
        "The operator has switched on API keys (`AUTH`). Send a valid key as `Authorization: Bearer <key>`. A key that"
        " was mistyped, was revoked or has expired gets the same response: ask the operator for a new key.",
    ),
    "forbidden": Kind(
        403,
        "Forbidden",
        "A web page may write only to the origin that served it (`Sec-Fetch-Site`, `Origin`), unless the operator has"
        " allowed its origin (`CORS_ORIGINS`). Write from such a page, or from a program, which sends neither header."
        " An API key with the scope `read` may not write at all: use a key with the scope `write`.",
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
    "misdirected-request": Kind(
        421,
        "Misdirected Request",
        "The service does not answer under the name in `Host`, so that a web page cannot point a name of its own here"
        " (DNS rebinding). Use localhost or the address that the service listens on, or let the operator add the name"
        " to `ALLOWED_HOSTS`.",
    ),
    "invalid": Kind(422, "Invalid", "`errors` lists each invalid field and the reason."),
    "key-reused": Kind(
        422, "Key Reused", "This Idempotency-Key was already used for a different request. Use a new key."
    ),
    "too-many-requests": Kind(
        429,
        "Too Many Requests",
        "This client has sent more requests than it may (`RateLimit-Policy`), or has too many in progress at the same"
        " time, or has used up its quota of Idempotency-Keys. The request was not carried out. Retry after"
        " `Retry-After` seconds.",
    ),
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
        "The database does not answer in time or cannot serve the request at the moment, another session has locked"
        " what the request needs, or too many searches and batches are in progress. Retry after `Retry-After` seconds."
        " `detail` shows whether the request was carried out: if the outcome of a write is unknown, read before you"
        " retry, or send writes with an Idempotency-Key.",
    ),
    "gateway-timeout": Kind(
        504,
        "Gateway Timeout",
        "No app instance answered in time. The outcome of a write is unknown: read before you retry.",
    ),
    "http-version-not-supported": Kind(505, "HTTP Version Not Supported", "Use HTTP/1.1."),
}

KIND_BY_STATUS = {kind.status: name for name, kind in reversed(KINDS.items())}
"""The first kind in KINDS of each status, for errors that the framework raises."""

SQLSTATES = {
    "23505": ("taken", "Another row already has this value, which must be unique."),
    "23502": ("invalid", "A required value is missing."),
    "23503": ("invalid", "A value refers to a row that does not exist, or other rows still refer to this row."),
    "23514": ("invalid", "A value violates a constraint of the table."),
    "22001": ("invalid", "A value is too long."),
    "22003": ("invalid", "A number is too large."),
    "22P02": ("invalid", "A value has the wrong format."),
    "22021": ("invalid", "A text contains a character that cannot be stored."),
    # A deadlock: PostgreSQL has ended one of the writers.
    "40001": ("unavailable", "A concurrent write conflicted with this request."),
    "40P01": ("unavailable", "A concurrent write conflicted with this request."),
    # The server answers and cannot serve the request: it is a standby, its tables are missing, it has no room. A
    # missing column (42703) is no member: a statement misspells it, and a retry does not help. Nor does it where rights
    # are missing.
    "25006": ("unavailable", "The database is read-only at the moment."),
    "42P01": ("unavailable", "The database is not set up yet: its tables are missing."),
    "42501": ("internal-error", "The database denies the service access to its tables."),
    "53100": ("unavailable", "The disk of the database is full."),
    "53200": ("unavailable", "The database has too little memory for this request at the moment."),
    "53300": ("unavailable", "The database has no free connection at the moment."),
    "55P03": ("unavailable", "Another session has locked what this request needs."),
    "57014": (
        "unavailable",
        "The database cancelled the request: it took too long, for example because another session has locked what it"
        " needs, or an operator cancelled it.",
    ),
    "57P01": ("unavailable", "The database is shutting down."),
    "57P02": ("unavailable", "The database is restarting."),
    "57P03": ("unavailable", "The database is starting."),
}
"""The kind of problem and its detail by the SQLSTATE of a failed statement (PostgreSQL manual, appendix A)."""

RETRY_LATER = {"Retry-After": "1"}


class Problem(Exception):
    """A response that is not a success."""

    def __init__(
        self,
        kind: str,
        detail: str,
        errors: list[dict[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            kind: A key of KINDS.
            detail: A sentence for people.
            errors: One member for each invalid field: `{"field": "email", "detail": "..."}`.
            headers: Header fields of the response, besides those of every problem.
        """
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = errors
        self.headers = dict(headers or {})

    @property
    def status(self) -> int:
        return KINDS[self.kind].status

    def body(self, prefix: str = "", **more: str) -> bytes:
        """Return the problem as JSON.

        Args:
            prefix: The path before the service's own addresses. A problem that is stored has none.
            more: Further members.
        """
        members: dict[str, Any] = {
            "type": f"{prefix}/problems/{self.kind}",
            "title": KINDS[self.kind].title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            members["errors"] = self.errors
        return orjson.dumps({**members, **more})
