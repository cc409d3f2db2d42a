"""The OpenAPI 3.1 document of the API, served at /openapi.json.

It is generated from the resources, so it describes what the service does. pydantic describes the rules of bodies that
it checks; the parts that are the same for every resource are in this package, once.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson
from flask import Flask, Response, g, request

from velikiy.http import requests
from velikiy.openapi.operations import (
    DOCUMENT_PATH,
    SERVICE_TAG,
    plural_words,
    resource_paths,
    service_paths,
)
from velikiy.openapi.responses import problem_response
from velikiy.openapi.schemas import SCHEMAS, resource_schemas
from velikiy.resources.base import Resource

API_VERSION = "1.0.0"
"""The version of the API as clients see it. The software's own version changes more often."""

LICENSE = {"name": "MIT", "identifier": "MIT"}

API_KEY = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key of the operator. Its scope is `read` or `write`. Depending on the setting `AUTH`, no"
    " request needs a key, only writes do, or every request does.",
}

DESCRIPTION = """\
Every response carries a request id (`X-Request-Id`) and names the cache that served it (`X-Cache-Status`,
`Cache-Status`). A read that starts after a write was acknowledged returns the written value or a newer one, whichever
cache serves it.

Errors are problems (RFC 9457): `type` is the address of a page that explains what to do, `detail` is a sentence for
people, and `errors` lists each invalid field.

Responses have an `ETag`. Send it in `If-None-Match` to receive a body only if the resource has changed, and in
`If-Match` to write only over the version that you read. Send an `Idempotency-Key` with a `POST`, so that a retry does
not repeat it.

Web pages may read and write if they come from the service itself or from an origin that the operator has allowed
(`CORS_ORIGINS`). Lists and documents of 2 kB and more are compressed for clients that send `Accept-Encoding: gzip`.

Parameters and fields of resources that are not described here are refused; parameters may come in any order.

Every address also supports `HEAD`, if it supports `GET`, and `OPTIONS`: `HEAD` returns the response of `GET` without
the body, and `OPTIONS` lists the supported methods in `Allow`. Any other method is 405
([Method Not Allowed](/problems/method-not-allowed)), again with `Allow`."""


def document(resources: Mapping[str, Resource]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document as a JSON object."""
    paths = service_paths()
    schemas = dict(SCHEMAS)
    for resource in resources.values():
        paths |= resource_paths(resource)
        schemas |= resource_schemas(resource)
    used = set(re.findall("#/components/responses/([a-z-]+)", orjson.dumps(paths).decode()))
    responses = {name: problem_response(name.split("-or-")) for name in sorted(used)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Velikiy Flask", "version": API_VERSION, "description": DESCRIPTION, "license": LICENSE},
        "servers": [{"url": "/"}],
        "tags": [
            *(
                {"name": name, "description": f"Read and write {plural_words(each)}."}
                for name, each in resources.items()
            ),
            {"name": SERVICE_TAG, "description": "Health checks and this document."},
        ],
        # Which operations need the key depends on the operator (AUTH), so it is optional in the document.
        "security": [{}, {"apiKey": []}],
        "paths": paths,
        "components": {"schemas": schemas, "responses": responses, "securitySchemes": {"apiKey": API_KEY}},
    }


def _with_prefix(content: bytes, prefix: str) -> bytes:
    """Return the document as clients of a proxy see it, which has removed this prefix from the address. Paths are
    relative to the server; the types of problems are addresses."""
    if not prefix:
        return content
    content = content.replace(b'"servers":[{"url":"/"}]', b'"servers":[{"url":"%b"}]' % prefix.encode(), 1)
    return re.sub(rb"(?<=[\"`(])/problems/", prefix.encode() + rb"/problems/", content)


def install(app: Flask, resources: Mapping[str, Resource]) -> None:
    """Add `GET /openapi.json`."""
    content = orjson.dumps(document(resources))

    @lru_cache(maxsize=16)  # prefixes are few, and each document has more than 100 kB
    def prefixed(prefix: str) -> tuple[bytes, str]:
        text = _with_prefix(content, prefix)
        return text, hashlib.blake2b(text, digest_size=12).hexdigest()

    prefixed("")

    @app.get(DOCUMENT_PATH)
    def openapi() -> Response:
        requests.parameters()
        text, etag = prefixed(g.path_prefix)
        response = Response(text, content_type="application/json")
        response.set_etag(etag)
        if request.if_none_match.contains_weak(etag):
            response.status_code = 304
            response.set_data(b"")
        return response
