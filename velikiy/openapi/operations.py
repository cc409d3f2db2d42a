"""The paths and operations of the OpenAPI document, for each resource and for the service itself."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from velikiy.http import batch
from velikiy.http.requests import JSON, MERGE_PATCH
from velikiy.openapi.headers import EXAMPLE_ETAG, response_headers
from velikiy.openapi.parameters import (
    ID_PARAMETER,
    IDEMPOTENCY_KEY,
    IF_NONE_MATCH,
    PAGE_PARAMETERS,
    PRECONDITIONS,
    PREFER,
    list_parameters,
    search_parameters,
)
from velikiy.openapi.responses import (
    BODY_PROBLEMS,
    COMMON_PROBLEMS,
    NOT_MODIFIED,
    RESOURCE_PROBLEMS,
    WRITE_PROBLEMS,
    json_response,
    problem_responses,
)
from velikiy.openapi.schemas import schema_ref
from velikiy.resources import pagination
from velikiy.resources.base import HISTORY, Resource

SERVICE_TAG = "service"
"""The tag of the service's own operations."""

# Numbers of the examples of a resource's fields (Resource.example). The examples of requests work on a new database,
# which has the rows 1 to 3, in the order of the page at /docs: no unique value occurs twice, and no row is used after
# its deletion.
STORED, CREATED, CREATED_IN_BATCH, CHANGED = range(4)
DELETED_ID, DELETED_IN_BATCH_ID = 2, 3

DOCUMENT_PATH = "/openapi.json"

EXAMPLE_TIME = "2026-01-31T12:00:00.123456+00:00"


def _operation(
    name: str,
    tag: str,
    summary: str,
    responses: Mapping[str, Any],
    parameters: Iterable[Any] = (),
    body: Mapping[str, Any] | None = None,
    *,
    description: str,
) -> dict[str, Any]:
    texts = {"summary": summary, "description": description}
    operation = {"operationId": name, "tags": [tag], **texts, "parameters": [*parameters]}
    return {**operation, **({"requestBody": body} if body else {}), "responses": responses}


def _request_body(schema: str, examples: Mapping[str, Any], types: Iterable[str] = JSON) -> dict[str, Any]:
    content = {"schema": schema_ref(schema), "examples": {name: {"value": value} for name, value in examples.items()}}
    return {"required": True, "content": dict.fromkeys(types, content)}


def resource_paths(resource: Resource) -> dict[str, Any]:
    """Return the paths of a resource."""
    return {
        resource.list_path.path: {"get": _list(resource), "post": _create(resource)},
        resource.count_path.path: {"get": _count(resource)},
        f"{resource.list_path.path}/batch": {"post": _batch(resource)},
        f"{resource.list_path.path}/{{id}}": {
            "get": _get(resource),
            "put": _update(resource, "put", "absent fields keep their values", JSON),
            "patch": _update(
                resource, "update", "JSON Merge Patch (RFC 7396), with the same effect as PUT", MERGE_PATCH
            ),
            "delete": _delete(resource),
        },
        f"{resource.list_path.path}/{{id}}{HISTORY}": {"get": _history(resource)},
    }


def _list(resource: Resource) -> dict[str, Any]:
    rows = {"type": "array", "maxItems": pagination.MAX_PAGE_ROWS, "items": schema_ref(resource.title)}
    headers = response_headers("ETag", "Cache-Control", optional=["Link", "Age"])
    page = json_response("A page of rows. `Link` leads to the next page.", rows, headers, [_example_row(resource)])
    responses = {"200": page, "304": NOT_MODIFIED, **problem_responses(*RESOURCE_PROBLEMS)}
    summary = f"List {plural_words(resource)}, a page at a time"
    return _operation(
        f"list{_pascal_case(resource.name)}",
        resource.name,
        summary,
        responses,
        [*list_parameters(resource), IF_NONE_MATCH],
        description="`Link` has the address of the next page. A client that follows it to the end receives every row"
        " once, although other rows are created and deleted meanwhile.",
    )


def _count(resource: Resource) -> dict[str, Any]:
    headers = response_headers("ETag", "Cache-Control", optional=["Age"])
    count = json_response("The number of rows.", schema_ref("Count"), headers, {"count": 3})
    responses = {"200": count, "304": NOT_MODIFIED, **problem_responses(*RESOURCE_PROBLEMS)}
    search = search_parameters(resource)
    summary = f"Count {plural_words(resource)}" + (", or the rows that a search finds" if search else "")
    return _operation(
        f"count{_pascal_case(resource.name)}",
        resource.name,
        summary,
        responses,
        [*search, IF_NONE_MATCH],
        description="The number is that of the list with the same parameters.",
    )


def _get(resource: Resource) -> dict[str, Any]:
    headers = response_headers("ETag", "Last-Modified", "Cache-Control", optional=["Age"])
    row = json_response(f"The {resource.singular}.", schema_ref(resource.title), headers, _example_row(resource))
    responses = {"200": row, "304": NOT_MODIFIED, **problem_responses(*RESOURCE_PROBLEMS, "not-found")}
    summary, parameters = f"Get one {resource.singular}", [ID_PARAMETER, IF_NONE_MATCH]
    description = "The `ETag` of the response is the condition for a later write (`If-Match`)."
    return _operation(f"get{resource.title}", resource.name, summary, responses, parameters, description=description)


def _history(resource: Resource) -> dict[str, Any]:
    versions = {
        "type": "array",
        "maxItems": pagination.MAX_PAGE_ROWS,
        "items": schema_ref(f"{resource.title}Version"),
    }
    headers = response_headers("ETag", "Cache-Control", optional=["Link", "Age"])
    example = {
        "version": 1,
        "change": "create",
        "changed_at": EXAMPLE_TIME,
        "changed_by": "shop",
        "through": "api",
        "row": _example_row(resource),
    }
    page = json_response("Versions, newest first. `Link` leads to the next page.", versions, headers, [example])
    responses = {"200": page, "304": NOT_MODIFIED, **problem_responses(*RESOURCE_PROBLEMS, "not-found")}
    return _operation(
        f"get{resource.title}History",
        resource.name,
        f"Get the versions of a {resource.singular}, also of a deleted one",
        responses,
        [ID_PARAMETER, *PAGE_PARAMETERS, IF_NONE_MATCH],
        description="A deleted row keeps its versions, for as long as the service is set to keep them.",
    )


def _create(resource: Resource) -> dict[str, Any]:
    headers = response_headers(
        "Location", "ETag", "Cache-Control", optional=["Idempotency-Replayed", "Preference-Applied"]
    )
    created = _created(resource, headers, 4)
    operations = [f"{verb}{resource.title}" for verb in ("get", "put", "update", "delete")]
    created["links"] = {
        operation: {"operationId": operation, "parameters": {"id": "$response.body#/id"}} for operation in operations
    }
    refusals = (*WRITE_PROBLEMS, *BODY_PROBLEMS, *_uniqueness_problems(resource), "in-flight", "key-reused")
    body = _request_body(f"New{resource.title}", {resource.singular: resource.example(CREATED)})
    responses = {"201": created, **problem_responses(*refusals)}
    return _operation(
        f"create{resource.title}",
        resource.name,
        f"Create a {resource.singular}",
        responses,
        [IDEMPOTENCY_KEY, PREFER],
        body,
        description="`Location` has the address of the new row, and `ETag` its version.",
    )


def _created(resource: Resource, headers: dict[str, Any], row_id: int) -> dict[str, Any]:
    example = {"id": row_id, "message": "Created"}
    return json_response(f"The {resource.singular} was created.", _or_row(resource, "Created"), headers, example)


def _or_row(resource: Resource, minimal: str) -> dict[str, Any]:
    """Return the schema of a response that has the row with `Prefer: return=representation`."""
    return {"anyOf": [schema_ref(minimal), schema_ref(resource.title)]}


def _update(resource: Resource, verb: str, meaning: str, types: Iterable[str]) -> dict[str, Any]:
    headers = response_headers("ETag", "Cache-Control", optional=["Preference-Applied"])
    changed = json_response(
        f"The {resource.singular} was changed.", _or_row(resource, "Updated"), headers, {"message": "Updated"}
    )
    refusals = (*WRITE_PROBLEMS, *BODY_PROBLEMS, *_uniqueness_problems(resource), "not-found", "precondition-failed")
    examples = {"one field": _example_field(resource), "all fields": resource.example(CHANGED)}
    body = _request_body(f"{resource.title}Changes", examples, types)
    responses = {"200": changed, **problem_responses(*refusals)}
    if verb == "put":
        again = _created(resource, headers | response_headers("Location"), 1)
        again["description"] = f"The deleted {resource.singular} was created again (`If-None-Match: *`)."
        responses = {"200": changed, "201": again, **problem_responses(*refusals)}
    summary = f"Change a {resource.singular}: {meaning}"
    return _operation(
        f"{verb}{resource.title}",
        resource.name,
        summary,
        responses,
        [ID_PARAMETER, *PRECONDITIONS, PREFER],
        body,
        description="With `If-Match`, the write happens only if the row is still the version that you read.",
    )


def _delete(resource: Resource) -> dict[str, Any]:
    deleted = json_response(
        f"The {resource.singular} was deleted.",
        schema_ref("Deleted"),
        response_headers("Cache-Control"),
        {"message": "Deleted"},
    )
    responses = {"200": deleted, **problem_responses(*WRITE_PROBLEMS, "not-found", "precondition-failed")}
    summary = f"Delete a {resource.singular}"
    parameters = [{**ID_PARAMETER, "example": DELETED_ID}, *PRECONDITIONS]
    description = "With `If-Match`, the row is deleted only if it is still the version that you read."
    return _operation(f"delete{resource.title}", resource.name, summary, responses, parameters, description=description)


def _batch(resource: Resource) -> dict[str, Any]:
    results = [
        {"op": "create", "id": 5, "status": 201, "etag": EXAMPLE_ETAG},
        {"op": "update", "id": 1, "status": 200, "etag": EXAMPLE_ETAG},
        {"op": "delete", "id": DELETED_IN_BATCH_ID, "status": 200},
    ]
    headers = response_headers("Cache-Control", optional=["Idempotency-Replayed", "Preference-Applied"])
    done = json_response(
        "All operations were carried out.", schema_ref("BatchDone"), headers, {"message": "Done", "results": results}
    )
    refusals = (*WRITE_PROBLEMS, *BODY_PROBLEMS, "batch-refused", "in-flight", "key-reused")
    operations = [
        {"op": "create", **resource.example(CREATED_IN_BATCH)},
        {"op": "update", "id": 1, **_example_field(resource)},
        {"op": "delete", "id": DELETED_IN_BATCH_ID},
    ]
    body = _request_body(f"{resource.title}Batch", {"one of each": {"operations": operations}})
    responses = {"200": done, **problem_responses(*refusals)}
    summary = f"Carry out up to {batch.MAX_OPERATIONS} writes: all of them or none"
    return _operation(
        f"batch{_pascal_case(resource.name)}",
        resource.name,
        summary,
        responses,
        [IDEMPOTENCY_KEY, PREFER],
        body,
        description="The operations are carried out in their order, in one transaction. If any of them is refused, the"
        " batch has no effect, and `errors` names each operation at fault.",
    )


def _uniqueness_problems(resource: Resource) -> list[str]:
    return ["taken"] if resource.unique else []


def plural_words(resource: Resource) -> str:
    """Return the name of the resource as words of a sentence: "order items"."""
    return resource.name.replace("_", " ")


def _example_field(resource: Resource) -> dict[str, Any]:
    return dict([next(iter(resource.example(CHANGED).items()))])


def _example_row(resource: Resource) -> dict[str, Any]:
    """Return a row as a read returns it."""
    return {"id": 1, **resource.example(STORED), "created_at": EXAMPLE_TIME, "updated_at": EXAMPLE_TIME, "version": 1}


def service_paths() -> dict[str, Any]:
    """Return the paths that exist without any resource."""
    headers = response_headers("Cache-Control")
    alive = json_response("The process is alive.", schema_ref("Liveness"), headers, {"status": "alive"})
    healthy = json_response("The service is healthy.", schema_ref("Health"), headers, {"status": "healthy"})
    unusable = "The database does not answer, or its tables are missing or not readable."
    unhealthy = json_response(unusable, schema_ref("Health"), headers, {"status": "unhealthy"})
    checks = {"postgres": "ok", "redis": "ok"}
    ready = json_response(
        "The service is ready for requests.", schema_ref("Readiness"), headers, {"status": "ready", "checks": checks}
    )
    checks = {"postgres": "does not answer", "redis": "ok"}
    not_ready = json_response(unusable, schema_ref("Readiness"), headers, {"status": "not ready", "checks": checks})
    document = json_response(
        "An OpenAPI 3.1 document.",
        schema_ref("Document"),
        response_headers("ETag", "Cache-Control"),
        {"openapi": "3.1.0", "paths": {}},
    )
    failures = problem_responses(*COMMON_PROBLEMS)
    return {
        "/health": {
            "get": _operation(
                "checkHealth",
                SERVICE_TAG,
                "Check the health of the service",
                {"200": healthy, "503": unhealthy, **failures},
                description="One word about the database, for simple monitors. `/readyz` says more.",
            )
        },
        "/livez": {
            "get": _operation(
                "checkLiveness",
                SERVICE_TAG,
                "Check that the process is alive",
                {"200": alive, **failures},
                description="Nothing but the process is examined. Restart it if it does not answer.",
            )
        },
        "/readyz": {
            "get": _operation(
                "checkReadiness",
                SERVICE_TAG,
                "Check that the service is ready for requests",
                {"200": ready, "503": not_ready, **failures},
                description="A service without its caches is slower, and ready. `findings` has a sentence about"
                " everything that is wrong.",
            )
        },
        DOCUMENT_PATH: {
            "get": _operation(
                "getOpenapi",
                SERVICE_TAG,
                "Get this document",
                {"200": document, "304": NOT_MODIFIED, **failures},
                [IF_NONE_MATCH],
                description="Generators make clients from it.",
            )
        },
    }


def _pascal_case(text: str) -> str:
    return "".join(part.capitalize() for part in re.findall("[a-z0-9]+", text))
