"""The API as OpenAPI 3.1, at /openapi.json, made from the resources, so that it says what is so. What pydantic checks
of bodies it describes itself; what is true of every resource stands here, once."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import orjson
from flask import Flask, Response, request
from pydantic.json_schema import models_json_schema

from velikiy.http import batch, preconditions, requests
from velikiy.http.health import NO_ANSWER, OK, UNREADABLE
from velikiy.http.requests import JSON, MERGE_PATCH
from velikiy.resources import pagination
from velikiy.resources.base import Resource
from velikiy.resources.problems import KINDS

VERSION = "1.0.0"
"""Of what clients see; that of the software changes more often."""

LICENSE = {"name": "MIT", "identifier": "MIT"}

ADDRESS = "/openapi.json"

ABOUT = """\
Every response carries a request id (`X-Request-Id`) and names the cache that served it (`X-Cache-Status`,
`Cache-Status`). A read that starts after a write was acknowledged returns the written value or a newer one, whichever
cache serves it.

Errors are problems (RFC 9457): `type` is the address of a page that explains what to do, `detail` is a sentence for
people, and `errors` lists each invalid field.

Responses have an `ETag`. Send it in `If-None-Match` to receive a body only if the resource has changed, and in
`If-Match` to write only over the version that you read. Send an `Idempotency-Key` with a `POST`, so that a retry does
not repeat it.

Parameters and fields of resources that are not described here are refused. HEAD returns the response of GET without the
body."""

NUMBER = {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1}
TIME = {"type": "string", "format": "date-time"}
VERSION_OF_A_ROW = {
    "type": "integer",
    "format": "int64",
    "minimum": 1,
    "description": "The number of times that the row was written.",
}
MOMENT = "2026-01-31T12:00:00.123456+00:00"

ETAG = '"5d3c8a71f0e2b94c6a1d7f38"'
STRONG = '^"[0-9a-f]+"$'


# ---- headers ----

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
        "description": "Identifies this version of the response; after a write, the version that GET returns now.",
        "schema": {"type": "string", "pattern": STRONG},
        "example": ETAG,
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
    "Idempotency-Replayed": {
        "description": "A request with this Idempotency-Key was completed before; this is its response.",
        "schema": {"type": "string", "const": "true"},
    },
    "Allow": {
        "description": "The methods that this address supports.",
        "schema": {"type": "string"},
        "example": "GET, HEAD, OPTIONS",
    },
    "Accept": {"description": "Media types of a body.", "schema": {"type": "string"}, "example": ", ".join(JSON)},
    "Accept-Patch": {
        "description": "Media types of the body of PATCH.",
        "schema": {"type": "string"},
        "example": ", ".join(MERGE_PATCH),
    },
}

EACH = ("X-Request-Id", "X-Cache-Status", "Cache-Status")
"""Headers of every answer."""


def _headers(*names: str, maybe: Iterable[str] = ()) -> dict[str, Any]:
    required = {name: {"required": True, **HEADERS[name]} for name in (*names, *EACH)}
    return required | {name: HEADERS[name] for name in maybe}


# ---- parameters: mostly without examples, since the page at /docs would send those ----


def _parameter(place: str, name: str, description: str, schema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema, **more}


ID = _parameter("path", "id", "The id of the row, without leading zeros.", NUMBER, required=True, example=1)

UNLESS = _parameter(
    "header",
    "If-None-Match",
    "ETags that the client has. If the current ETag is among them, the response is 304 without a body.",
    {"type": "string"},
    example=ETAG,
)

KEY = _parameter(
    "header",
    "Idempotency-Key",
    "A unique key for this request, such as a UUID. A repeated request with the same key and body is not carried out"
    " again within 24 hours: the service returns the first response.",
    {"type": "string", "minLength": 1, "maxLength": 255, "pattern": f"^{requests.IDEMPOTENCY_KEY}$"},
)


def _condition(name: str, description: str) -> dict[str, Any]:
    schema = {"type": "string", "anyOf": [{"const": "*"}, {"pattern": f"^{preconditions.TAGS}$"}]}
    return _parameter("header", name, description, schema)


CONDITIONS = [
    _condition("If-Match", "Write only if the current ETag is one of these; `*`: if the row exists."),
    _condition("If-None-Match", "Write only if the current ETag is not in this list."),
]

SPACE = r"[ \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LETTER = r"[^\s\x00-\x1f\x7f-\x9f]"
SEARCH = _parameter(
    "query",
    "q",
    f"Up to {requests.MAX_SEARCH_WORDS} words or beginnings of words. Finds rows that contain all of them, ignoring"
    " case. Accents matter.",
    {
        "type": "string",
        "minLength": 1,
        "maxLength": requests.MAX_SEARCH_CHARACTERS,
        "pattern": f"^{SPACE}*{LETTER}+({SPACE}+{LETTER}+){{0,{requests.MAX_SEARCH_WORDS - 1}}}{SPACE}*$",
    },
)


def _of_a_list(resource: Resource) -> list[dict[str, Any]]:
    orders = [way + name for name in ("id", *resource.sort_keys) for way in ("", "-")]
    cursor = {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9_-]+$"}
    limit = {"type": "integer", "minimum": 1, "maximum": pagination.MAX_PAGE_ROWS, "default": pagination.MAX_PAGE_ROWS}
    return [
        _parameter("query", "cursor", "The start of the page, from the `Link` of the previous page.", cursor),
        _parameter("query", "limit", "The largest number of rows on a page.", limit),
        *([SEARCH] if resource.search_column else []),
        _parameter(
            "query",
            "sort",
            "The order of the rows; a `-` before the name reverses it.",
            {"type": "string", "enum": orders, "default": "id"},
        ),
    ]


# ---- what every answer is made of ----

PROBLEM = {
    "type": "object",
    "description": "RFC 9457.",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {
            "type": "string",
            "format": "uri-reference",
            "enum": [f"/problems/{name}" for name in KINDS],
            "description": "The kind of problem, for programs. A page at this address explains what to do:\n\n"
            + "\n".join(
                f"- [`/problems/{name}`](/problems/{name}) {kind.status} {kind.title}" for name, kind in KINDS.items()
            ),
        },
        "title": {"type": "string", "description": "The title of this type of problem."},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string", "description": "The cause of this occurrence: a sentence for people."},
        "errors": {
            "type": "array",
            "description": "Each field, parameter or header at fault.",
            "items": {
                "type": "object",
                "required": ["field", "detail"],
                "properties": {
                    "field": {
                        "type": "string",
                        "description": "The name; in a batch, the path of the field: `operations.3.name`.",
                    },
                    "detail": {"type": "string"},
                    "index": {
                        "type": "integer",
                        "minimum": 0,
                        "description": "The index of the operation in the batch.",
                    },
                    "status": {
                        "type": "integer",
                        "description": "The status that the operation would have as a request of its own.",
                    },
                },
            },
        },
        "request_id": {"type": "string", "description": "The same id as in `X-Request-Id`."},
    },
}

COUNT = {"type": "object", "required": ["count"], "properties": {"count": {"type": "integer", "minimum": 0}}}

RESULT = {
    "type": "object",
    "required": ["op", "id", "status"],
    "properties": {
        "op": {"type": "string", "enum": ["create", "update", "delete"]},
        "id": NUMBER,
        "status": {
            "type": "integer",
            "enum": [200, 201],
            "description": "The status that the operation would have as a request of its own.",
        },
        "etag": {"type": "string", "pattern": STRONG, "description": "The ETag of the row; absent after a delete."},
    },
}


def _message(text: str, **properties: Any) -> dict[str, Any]:
    """What a write answers with."""
    properties = {**properties, "message": {"type": "string", "const": text}}
    return {"type": "object", "required": [*properties], "properties": properties}


def _status(*words: str, **properties: Any) -> dict[str, Any]:
    """What a health check answers with."""
    properties = {"status": {"type": "string", "enum": [*words]}, **properties}
    return {"type": "object", "required": [*properties], "properties": properties}


REACHED = {"type": "string", "enum": [OK, NO_ANSWER]}
CHECKS = {
    "type": "object",
    "required": ["postgres", "redis"],
    "properties": {"postgres": {"type": "string", "enum": [OK, NO_ANSWER, UNREADABLE]}, "redis": REACHED},
}
READY = _status("ready", "not ready", checks=CHECKS)
READY["properties"]["warnings"] = {"type": "array", "items": {"type": "string"}}

SCHEMAS: dict[str, Any] = {
    "Problem": PROBLEM,
    "Count": COUNT,
    "Created": _message("Created", id=NUMBER),
    "Updated": _message("Updated"),
    "Deleted": _message("Deleted"),
    "BatchDone": _message("Done", results={"type": "array", "items": RESULT}),
    "Health": _status("healthy", "unhealthy"),
    "Liveness": _status("alive"),
    "Readiness": READY,
}


def _schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: Any, headers: dict[str, Any], example: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"description": description, "headers": headers, "content": content}


NOT_MODIFIED = {
    "description": "The client already has this version.",
    "headers": _headers("ETag", maybe=["Last-Modified", "Link"]),
}


# ---- problems ----

ANYWHERE = (
    "bad-request",
    "uri-too-long",
    "header-fields-too-large",
    "internal-error",
    "bad-gateway",
    "gateway-timeout",
)
OF_RESOURCES = (*ANYWHERE, "not-acceptable", "unavailable")
OF_WRITES = (*OF_RESOURCES, "forbidden")
OF_BODIES = ("not-json", "request-timeout", "content-too-large", "unsupported-media-type", "invalid")

OF_PROBLEMS = {
    "in-flight": ["Retry-After"],
    "method-not-allowed": ["Allow"],
    "too-many-requests": ["Retry-After"],
    "unavailable": ["Retry-After"],
    "unsupported-media-type": ["Accept", "Accept-Patch"],
    "taken": ["Idempotency-Replayed"],
    "batch-refused": ["Idempotency-Replayed"],
}
"""Headers that they have besides those of every answer."""


def _problems(*names: str) -> dict[str, Any]:
    """The answers that these problems are; those of one status are one answer."""
    ordered = sorted(names, key=lambda name: (KINDS[name].status, [*KINDS].index(name)))
    return {
        str(status): {"$ref": f"#/components/responses/{'-or-'.join(of_one)}"}
        for status, of_one in groupby(ordered, lambda name: KINDS[name].status)
    }


def _problem(names: list[str]) -> dict[str, Any]:
    types = [f"/problems/{name}" for name in names]
    headers = sorted({header for name in names for header in OF_PROBLEMS.get(name, [])})
    return {
        "description": "\n\n".join(f"[{KINDS[name].title}](/problems/{name}): {KINDS[name].advice}" for name in names),
        "headers": _headers(maybe=["Cache-Control", *headers]),
        "content": {
            "application/problem+json": {
                "schema": {"allOf": [_schema("Problem"), {"properties": {"type": {"enum": types}}}]},
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


# ---- the addresses of a resource ----


def _operation(
    name: str,
    tag: str,
    summary: str,
    responses: Mapping[str, Any],
    parameters: Iterable[Any] = (),
    body: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    operation = {"operationId": name, "tags": [tag], "summary": summary, "parameters": [*parameters]}
    return {**operation, **({"requestBody": body} if body else {}), "responses": responses}


def _body(schema: str, examples: Mapping[str, Any], types: Iterable[str] = JSON) -> dict[str, Any]:
    content = {"schema": _schema(schema), "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"required": True, "content": dict.fromkeys(types, content)}


def _paths_of(resource: Resource) -> dict[str, Any]:
    return {
        resource.list_path.path: {"get": _list(resource), "post": _create(resource)},
        resource.count_path.path: {"get": _count(resource)},
        f"{resource.list_path.path}/batch": {"post": _batch(resource)},
        f"{resource.list_path.path}/{{id}}": {
            "get": _get(resource),
            "put": _change(resource, "put", "absent fields keep their values", JSON),
            "patch": _change(
                resource, "patch", "JSON Merge Patch (RFC 7396), with the same effect as PUT", MERGE_PATCH
            ),
            "delete": _delete(resource),
        },
    }


def _list(resource: Resource) -> dict[str, Any]:
    rows = {"type": "array", "maxItems": pagination.MAX_PAGE_ROWS, "items": _schema(resource.title)}
    headers = _headers("ETag", "Cache-Control", maybe=["Link", "Age"])
    page = _answer("A page of rows. `Link` leads to the next page.", rows, headers, [_row(resource)])
    responses = {"200": page, "304": NOT_MODIFIED, **_problems(*OF_RESOURCES)}
    summary = f"List {_many(resource)}, a page at a time"
    return _operation(f"list{_plural(resource)}", resource.name, summary, responses, [*_of_a_list(resource), UNLESS])


def _count(resource: Resource) -> dict[str, Any]:
    headers = _headers("ETag", "Cache-Control", maybe=["Age"])
    count = _answer("The number of rows.", _schema("Count"), headers, {"count": 3})
    responses = {"200": count, "304": NOT_MODIFIED, **_problems(*OF_RESOURCES)}
    parameters = [SEARCH, UNLESS] if resource.search_column else [UNLESS]
    summary = f"Count {_many(resource)}" + (", or the rows that a search finds" if resource.search_column else "")
    return _operation(f"count{_plural(resource)}", resource.name, summary, responses, parameters)


def _get(resource: Resource) -> dict[str, Any]:
    headers = _headers("ETag", "Last-Modified", "Cache-Control", maybe=["Age"])
    row = _answer(f"The {resource.singular}.", _schema(resource.title), headers, _row(resource))
    responses = {"200": row, "304": NOT_MODIFIED, **_problems(*OF_RESOURCES, "not-found")}
    return _operation(f"get{resource.title}", resource.name, f"Get one {resource.singular}", responses, [ID, UNLESS])


def _create(resource: Resource) -> dict[str, Any]:
    headers = _headers("Location", "ETag", "Cache-Control", maybe=["Idempotency-Replayed"])
    created = _answer(
        f"The {resource.singular} was created.", _schema("Created"), headers, {"id": 4, "message": "Created"}
    )
    operations = [f"{verb}{resource.title}" for verb in ("get", "put", "patch", "delete")]
    created["links"] = {
        operation: {"operationId": operation, "parameters": {"id": "$response.body#/id"}} for operation in operations
    }
    refusals = (*OF_WRITES, *OF_BODIES, *_taken(resource), "in-flight", "key-reused")
    body = _body(f"New{resource.title}", {resource.singular: resource.example})
    responses = {"201": created, **_problems(*refusals)}
    return _operation(f"create{resource.title}", resource.name, f"Create a {resource.singular}", responses, [KEY], body)


def _change(resource: Resource, method: str, meaning: str, types: Iterable[str]) -> dict[str, Any]:
    headers = _headers("ETag", "Cache-Control")
    changed = _answer(f"The {resource.singular} was changed.", _schema("Updated"), headers, {"message": "Updated"})
    refusals = (*OF_WRITES, *OF_BODIES, *_taken(resource), "not-found", "precondition-failed")
    body = _body(f"{resource.title}Changes", {"one field": _one_field(resource), "all fields": resource.example}, types)
    responses = {"200": changed, **_problems(*refusals)}
    summary = f"Change a {resource.singular}: {meaning}"
    return _operation(f"{method}{resource.title}", resource.name, summary, responses, [ID, *CONDITIONS], body)


def _delete(resource: Resource) -> dict[str, Any]:
    deleted = _answer(
        f"The {resource.singular} was deleted.", _schema("Deleted"), _headers("Cache-Control"), {"message": "Deleted"}
    )
    responses = {"200": deleted, **_problems(*OF_WRITES, "not-found", "precondition-failed")}
    summary = f"Delete a {resource.singular}"
    return _operation(f"delete{resource.title}", resource.name, summary, responses, [ID, *CONDITIONS])


def _batch(resource: Resource) -> dict[str, Any]:
    results = [
        {"op": "create", "id": 4, "status": 201, "etag": ETAG},
        {"op": "update", "id": 2, "status": 200, "etag": ETAG},
        {"op": "delete", "id": 3, "status": 200},
    ]
    headers = _headers("Cache-Control", maybe=["Idempotency-Replayed"])
    done = _answer(
        "All operations were carried out.", _schema("BatchDone"), headers, {"message": "Done", "results": results}
    )
    refusals = (*OF_WRITES, *OF_BODIES, "batch-refused", "in-flight", "key-reused")
    operations = [
        {"op": "create", **resource.example},
        {"op": "update", "id": 2, **_one_field(resource)},
        {"op": "delete", "id": 3},
    ]
    body = _body(f"{resource.title}Batch", {"one of each": {"operations": operations}})
    responses = {"200": done, **_problems(*refusals)}
    summary = f"Carry out up to {batch.MAX_OPERATIONS} writes: all of them or none"
    return _operation(f"batch{_plural(resource)}", resource.name, summary, responses, [KEY], body)


def _taken(resource: Resource) -> list[str]:
    return ["taken"] if resource.unique else []


def _many(resource: Resource) -> str:
    return resource.name.replace("_", " ")


def _plural(resource: Resource) -> str:
    return "".join(part.capitalize() for part in resource.name.split("_"))


def _one_field(resource: Resource) -> dict[str, Any]:
    return dict([next(iter(resource.example.items()))])


def _row(resource: Resource) -> dict[str, Any]:
    """As reads give it."""
    return {"id": 1, **resource.example, "created_at": MOMENT, "updated_at": MOMENT, "version": 1}


def _schemas_of(resource: Resource) -> dict[str, Any]:
    sent: list[Any] = [resource.create_model, resource.update_model, batch.model(resource)]
    _, made = models_json_schema([(model, "validation") for model in sent], ref_template="#/components/schemas/{model}")
    schemas: dict[str, Any] = made["$defs"]
    fields = schemas[resource.create_model.__name__]["properties"]
    given = {"id": NUMBER, "created_at": TIME, "updated_at": TIME, "version": VERSION_OF_A_ROW}
    row = {name: given.get(name) or fields[name] for name in resource.columns}
    return {**schemas, resource.title: {"type": "object", "required": [*row], "properties": row}}


# ---- the service's own ----


def _own() -> dict[str, Any]:
    """Paths that are there without any resource."""
    headers = _headers("Cache-Control")
    alive = _answer("The process is alive.", _schema("Liveness"), headers, {"status": "alive"})
    healthy = _answer("The service is healthy.", _schema("Health"), headers, {"status": "healthy"})
    useless = "The database does not answer, or its tables are missing or not readable."
    unhealthy = _answer(useless, _schema("Health"), headers, {"status": "unhealthy"})
    checks = {"postgres": "ok", "redis": "ok"}
    ready = _answer(
        "The service is ready for requests.", _schema("Readiness"), headers, {"status": "ready", "checks": checks}
    )
    checks = {"postgres": "does not answer", "redis": "ok"}
    not_ready = _answer(useless, _schema("Readiness"), headers, {"status": "not ready", "checks": checks})
    document = _answer(
        "An OpenAPI 3.1 document.",
        {"type": "object"},
        _headers("ETag", "Cache-Control"),
        {"openapi": "3.1.0", "paths": {}},
    )
    failures = _problems(*ANYWHERE)
    return {
        "/health": {
            "get": _operation(
                "health", OWN, "Check the health of the service", {"200": healthy, "503": unhealthy, **failures}
            )
        },
        "/livez": {"get": _operation("livez", OWN, "Check that the process is alive", {"200": alive, **failures})},
        "/readyz": {
            "get": _operation(
                "readyz",
                OWN,
                "Check that the service is ready for requests",
                {"200": ready, "503": not_ready, **failures},
            )
        },
        ADDRESS: {
            "get": _operation(
                "openapi", OWN, "Get this document", {"200": document, "304": NOT_MODIFIED, **failures}, [UNLESS]
            )
        },
    }


OWN = "service"
OF_HTTP = "HEAD and OPTIONS"


def _head(path: str, get: Mapping[str, Any]) -> dict[str, Any]:
    responses = {
        status: {key: value for key, value in answer.items() if key != "content"}
        for status, answer in get["responses"].items()
    }
    return _operation(f"head{_name(path)}", OF_HTTP, "Get the response headers of GET", responses, get["parameters"])


def _options(path: str, others: Mapping[str, Any]) -> dict[str, Any]:
    headers = _headers("Allow", "Cache-Control", *(["Accept-Patch"] if "patch" in others else []))
    allowed = {"description": "`Allow` lists the supported methods.", "headers": headers}
    of_all = ("404", "406")  # of which the other methods of an address have the same
    same = {status: answer for status, answer in next(iter(others.values()))["responses"].items() if status in of_all}
    responses = {"204": allowed, **_problems(*ANYWHERE), **same}
    parameters = [ID] if "{id}" in path else []
    return _operation(f"options{_name(path)}", OF_HTTP, "List the supported methods", responses, parameters)


def _name(path: str) -> str:
    return "".join(part.capitalize() for part in re.findall("[a-z0-9]+", path))


# ---- the document ----


def document(resources: Mapping[str, Resource]) -> dict[str, Any]:
    """OpenAPI 3.1, as the JSON object that it is."""
    paths = _own()
    schemas = dict(SCHEMAS)
    for resource in resources.values():
        paths |= _paths_of(resource)
        schemas |= _schemas_of(resource)
    for path, operations in paths.items():
        if "get" in operations:
            operations["head"] = _head(path, operations["get"])
        operations["options"] = _options(path, operations)
    used = re.findall("#/components/responses/([a-z-]+)", orjson.dumps(paths).decode())
    # What answers a method that is not there, and that is no operation.
    responses = {name: _problem(name.split("-or-")) for name in sorted({*used, "method-not-allowed"})}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Velikiy Flask", "version": VERSION, "description": ABOUT, "license": LICENSE},
        "servers": [{"url": "/"}],
        "tags": [
            *({"name": name, "description": f"Read and write {_many(each)}."} for name, each in resources.items()),
            {"name": OWN, "description": "Health checks and this document."},
            {"name": OF_HTTP, "description": "The methods that every address supports."},
        ],
        "paths": paths,
        "components": {"schemas": schemas, "responses": responses},
    }


def install(app: Flask, resources: Mapping[str, Resource]) -> None:
    """Adds `GET /openapi.json`."""
    content = orjson.dumps(document(resources))
    etag = hashlib.blake2b(content, digest_size=12).hexdigest()

    @app.get(ADDRESS)
    def openapi() -> Response:
        requests.parameters()
        response = Response(content, content_type="application/json")
        response.set_etag(etag)
        if request.if_none_match.contains_weak(etag):
            response.status_code = 304
            response.set_data(b"")
        return response
