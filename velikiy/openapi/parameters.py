"""The parameters of operations in the OpenAPI document.

None but the id has an example, because the page at /docs fills it in and sends it.
"""

from collections.abc import Mapping
from typing import Any

from velikiy.http import preconditions, requests
from velikiy.openapi.schemas import ID_SCHEMA
from velikiy.resources import pagination
from velikiy.resources.base import Resource


def _parameter(location: str, name: str, description: str, schema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": location, "description": description, "schema": schema, **more}


ID_PARAMETER = _parameter(
    "path", "id", "The id of the row, without leading zeros.", ID_SCHEMA, required=True, example=1
)

IF_NONE_MATCH = _parameter(
    "header",
    "If-None-Match",
    "ETags that the client has. If the current ETag is among them, the response is 304 without a body.",
    {"type": "string"},
)

IDEMPOTENCY_KEY = _parameter(
    "header",
    "Idempotency-Key",
    "A unique key for this request, such as a UUID. A repeated request with the same key and body is not carried out"
    " again within 24 hours: the service returns the first response.",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": f"^{requests.IDEMPOTENCY_KEY}$"},
)


PREFER = _parameter(
    "header",
    "Prefer",
    "`return=representation` (RFC 7240): the response has the row as GET returns it. `return=minimal`: the response is"
    " the same as without this header. Other preferences have no effect.",
    {"type": "string"},
)


def _precondition(name: str, description: str) -> dict[str, Any]:
    # One pattern, and no `anyOf`: openapi-python-client leaves out an operation with such a header.
    return _parameter("header", name, description, {"type": "string", "pattern": rf"^(\*|{preconditions.TAGS})$"})


PRECONDITIONS = [
    _precondition(
        "If-Match",
        "Write only if the current ETag is one of these; `*`: if the row exists. A weak ETag counts as the"
        " strong one: compression on the way has made it weak, and it names the same version.",
    ),
    _precondition(
        "If-None-Match",
        "Write only if the current ETag is not in this list. `*` with PUT creates a deleted row again.",
    ),
]

SORT_DIRECTIONS = {"": "", "-": "_descending"}

_SPACE = r"[ \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_LETTER = r"[^\s\x00-\x1f\x7f-\x9f]"
SEARCH_PARAMETER = _parameter(
    "query",
    "q",
    f"Up to {requests.MAX_SEARCH_WORDS} words or beginnings of words. Finds rows that contain all of them, ignoring"
    " case and accents. In scripts without spaces, such as Chinese and Thai, it finds any part of a text.",
    {
        "type": "string",
        "minLength": 1,
        "maxLength": requests.MAX_SEARCH_CHARACTERS,
        "pattern": f"^{_SPACE}*{_LETTER}+({_SPACE}+{_LETTER}+){{0,{requests.MAX_SEARCH_WORDS - 1}}}{_SPACE}*$",
    },
)


def search_parameters(resource: Resource) -> list[dict[str, Any]]:
    """Return the query parameters that choose rows, for a list and for a count."""
    filters = [
        _parameter("query", name, each.description, {"type": "string", "pattern": f"^{each.pattern}$"})
        for name, each in resource.filters.items()
    ]
    return [*filters, *([SEARCH_PARAMETER] if resource.search_column else [])]


PAGE_PARAMETERS = [
    _parameter(
        "query",
        "cursor",
        "The start of the page, from the `Link` of the previous page.",
        {"type": "string", "minLength": 1, "pattern": r"^[A-Za-z0-9_\-]+$"},
    ),
    _parameter(
        "query",
        "limit",
        "The largest number of items on a page.",
        {"type": "integer", "minimum": 1, "maximum": pagination.MAX_PAGE_ROWS, "default": pagination.MAX_PAGE_ROWS},
    ),
]


def list_parameters(resource: Resource) -> list[dict[str, Any]]:
    """Return the query parameters of the list of rows."""
    orders = {sign + name: name + way for name in ("id", *resource.sort_keys) for sign, way in SORT_DIRECTIONS.items()}
    return [
        *PAGE_PARAMETERS,
        *search_parameters(resource),
        _parameter(
            "query",
            "sort",
            "The order of the rows; a `-` before the name reverses it.",
            {
                "type": "string",
                "enum": [*orders],
                "default": "id",
                # The names of the values in generated clients, which would number them instead.
                "x-enum-varnames": [name.upper() for name in orders.values()],
            },
        ),
    ]
