"""Make generated values usable where a schema can describe only their form. schemathesis calls the hooks."""

import re
import uuid
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
import schemathesis

from velikiy.http.requests import IDEMPOTENCY_KEY


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Give each request its own idempotency key, and a cursor that the service returned for the same order.

    Malformed keys and cursors stay unchanged.
    """
    for name in ("If-Match", "If-None-Match"):
        # The coverage phase fills conditions with these values where the document has no example of one.
        if case.headers.get(name) == "" or (case.headers.get(name) == "0" and not _is_negative(case)):
            del case.headers[name]
    key = case.headers.get("Idempotency-Key")
    if isinstance(key, str) and re.fullmatch(IDEMPOTENCY_KEY, key):
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
    cursor = case.query.get("cursor")
    if isinstance(cursor, str) and re.fullmatch("[A-Za-z0-9_-]+", cursor):
        del case.query["cursor"]
        case.query.update(_cursor(case))


@schemathesis.check
def problem_has_a_documented_type(ctx: Any, response: Any, case: Any) -> None:
    """Compare the type of a problem with the types in the name of the documented response (velikiy/openapi/responses.py):
    the schema allows any type, so that clients survive a new one."""
    documented = case.operation.definition.raw["responses"].get(str(response.status_code), {}).get("$ref", "")
    if documented:
        kind = response.json()["type"].rpartition("/")[2]
        assert kind in documented.rpartition("/")[2].split("-or-"), f"{kind} is not documented for this operation"


def _is_negative(case: Any) -> bool:
    return bool(case.meta is not None and case.meta.generation.mode.name == "NEGATIVE")


def _cursor(case: Any) -> dict[str, str]:
    address = case.operation.schema.get_base_url().rstrip("/") + case.path
    first = requests.get(address, {"limit": "1", "sort": str(case.query.get("sort", "id"))}, timeout=10)
    following = parse_qs(urlsplit(first.links.get("next", {}).get("url", "")).query)
    return {"cursor": following["cursor"][0]} if following else {}
