"""The responses in the OpenAPI document. Problems with the same status share one response."""

from itertools import groupby
from typing import Any

from velikiy.openapi.headers import HEADERS, response_headers
from velikiy.openapi.schemas import schema_ref
from velikiy.resources.problems import KINDS


def json_response(description: str, schema: Any, headers: dict[str, Any], example: Any) -> dict[str, Any]:
    """Return a response with a JSON body."""
    content = {"application/json": {"schema": schema, "example": example}}
    return {"description": description, "headers": headers, "content": content}


NOT_MODIFIED = {
    "description": "The client already has this version.",
    "headers": response_headers("ETag", optional=["Last-Modified", "Link"]),
}


COMMON_PROBLEMS = (
    "bad-request",
    "uri-too-long",
    "misdirected-request",
    "too-many-requests",
    "header-fields-too-large",
    "internal-error",
    "bad-gateway",
    "gateway-timeout",
)
RESOURCE_PROBLEMS = (*COMMON_PROBLEMS, "unauthorized", "not-acceptable", "unavailable")
WRITE_PROBLEMS = (*RESOURCE_PROBLEMS, "forbidden")
BODY_PROBLEMS = ("not-json", "request-timeout", "content-too-large", "unsupported-media-type", "invalid")

PROBLEM_HEADERS = {
    "forbidden": ["WWW-Authenticate"],
    "in-flight": ["Retry-After"],
    "too-many-requests": ["Retry-After"],
    "unauthorized": ["WWW-Authenticate"],
    "unavailable": ["Retry-After"],
    "unsupported-media-type": ["Accept", "Accept-Patch"],
    "taken": ["Idempotency-Replayed"],
    "batch-refused": ["Idempotency-Replayed"],
}
"""The headers of a problem besides COMMON_HEADERS."""


def problem_responses(*names: str) -> dict[str, Any]:
    """Return references to the responses for these problems. Problems with the same status share a response."""
    ordered = sorted(names, key=lambda name: (KINDS[name].status, [*KINDS].index(name)))
    return {
        str(status): {"$ref": f"#/components/responses/{'-or-'.join(group)}"}
        for status, group in groupby(ordered, lambda name: KINDS[name].status)
    }


def problem_response(names: list[str]) -> dict[str, Any]:
    """Return the response for these problems, which have the same status."""
    headers = sorted({header for name in names for header in PROBLEM_HEADERS.get(name, [])})
    return {
        "description": "\n\n".join(f"[{KINDS[name].title}](/problems/{name}): {KINDS[name].advice}" for name in names),
        "headers": response_headers(optional=["Cache-Control", *headers]),
        "content": {
            "application/problem+json": {
                # The types are in the examples. An enumeration here would give each response a class of its own in
                # generated clients, and clients would fail at a type of a later version.
                "schema": schema_ref("Problem"),
                "examples": {name: {"value": _problem_example(name)} for name in names},
            }
        },
    }


def _problem_example(name: str) -> dict[str, Any]:
    kind = KINDS[name]
    return {
        "type": f"/problems/{name}",
        "title": kind.title,
        "status": kind.status,
        "detail": kind.advice,
        "request_id": HEADERS["X-Request-Id"]["example"],
    }
