"""The schemas of bodies in the OpenAPI document."""

from typing import Any

from pydantic.json_schema import models_json_schema

from velikiy.coherence.redis_tier import NO_ANSWER
from velikiy.http import batch
from velikiy.http.health import NOT_USED, OK, UNREADABLE
from velikiy.openapi.headers import STRONG_ETAG_PATTERN
from velikiy.resources.base import Resource
from velikiy.resources.problems import KINDS

ID_SCHEMA = {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1}
TIME_SCHEMA = {"type": "string", "format": "date-time"}
ROW_VERSION_SCHEMA = {
    "type": "integer",
    "format": "int64",
    "minimum": 1,
    "description": "The number of times that the row was written.",
}


def schema_ref(name: str) -> dict[str, Any]:
    """Return a reference to a schema. Each object is a schema with a name, which generated clients use as well."""
    return {"$ref": f"#/components/schemas/{name}"}


FIELD_ERROR_SCHEMA = {
    "type": "object",
    "description": "A field, parameter or header at fault.",
    "required": ["field", "detail"],
    "properties": {
        "field": {
            "type": "string",
            "description": "The name; in a batch, the path of the field: `operations.3.name`.",
        },
        "detail": {"type": "string"},
        "index": {"type": "integer", "minimum": 0, "description": "The index of the operation in the batch."},
        "status": {
            "type": "integer",
            "description": "The status that the operation would have as a request of its own.",
        },
    },
}

PROBLEM_SCHEMA = {
    "type": "object",
    "description": "RFC 9457.",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {
            "type": "string",
            "format": "uri-reference",
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
            "items": schema_ref("FieldError"),
        },
        "request_id": {"type": "string", "description": "The same id as in `X-Request-Id`."},
    },
}

VERSION_PROPERTIES: dict[str, Any] = {
    "version": ROW_VERSION_SCHEMA,
    "change": {
        "type": ["string", "null"],
        "enum": ["create", "update", "delete", "erase", None],
        "description": "The change that made this version. `erase`: the operator has removed all earlier versions."
        " null: the version is older than the history.",
    },
    "changed_at": TIME_SCHEMA,
    "changed_by": {
        "type": ["string", "null"],
        "description": "The name of the API key, of the command, or of the role in PostgreSQL; null if unknown.",
    },
    "through": {
        "type": ["string", "null"],
        "enum": ["api", "command", "sql", None],
        "description": "The origin: a request (`api`), a command of the operator, or SQL; null if unknown.",
    },
}

COUNT_SCHEMA = {"type": "object", "required": ["count"], "properties": {"count": {"type": "integer", "minimum": 0}}}

BATCH_RESULT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "The result of one operation, in the order of the request.",
    "required": ["op", "id", "status"],
    "properties": {
        "op": {"type": "string", "enum": ["create", "update", "delete"]},
        "id": ID_SCHEMA,
        "status": {
            "type": "integer",
            "enum": [200, 201],
            "description": "The status that the operation would have as a request of its own.",
        },
        "etag": {
            "type": "string",
            "pattern": STRONG_ETAG_PATTERN,
            "description": "The ETag of the row; absent after a delete.",
        },
        "row": {"type": "object", "description": "With `Prefer: return=representation`: the row as GET returns it."},
    },
}


def _write_result(text: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of the response to a write."""
    properties = {**properties, "message": {"type": "string", "const": text}}
    return {"type": "object", "required": [*properties], "properties": properties}


def _health_result(*statuses: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of the response to a health check."""
    properties = {"status": {"type": "string", "enum": [*statuses]}, **properties}
    return {"type": "object", "required": [*properties], "properties": properties}


CHECKS_SCHEMA = {
    "type": "object",
    "required": ["postgres", "redis"],
    "properties": {
        "postgres": {"type": "string", "enum": [OK, NO_ANSWER, UNREADABLE]},
        "redis": {"type": "string", "enum": [OK, NO_ANSWER, NOT_USED]},
    },
}
FINDING_SCHEMA = {
    "type": "object",
    "required": ["name", "what", "advice", "wrong"],
    "properties": {
        "name": {"type": "string", "description": "The part and its state, such as redis.fenced."},
        "what": {"type": "string"},
        "advice": {"type": "string", "description": "The next step of the operator."},
        "wrong": {"type": "boolean", "description": "False for a warning."},
        "since": {"type": "number", "description": "Seconds of Unix time."},
        "where": {"type": "string"},
    },
}
READINESS_SCHEMA = _health_result("ready", "degraded", "not ready", checks=schema_ref("Checks"))
READINESS_SCHEMA["properties"]["warnings"] = {"type": "array", "items": {"type": "string"}}
READINESS_SCHEMA["properties"]["findings"] = {"type": "array", "items": schema_ref("Finding")}

SCHEMAS: dict[str, Any] = {
    "Problem": PROBLEM_SCHEMA,
    "FieldError": FIELD_ERROR_SCHEMA,
    "Count": COUNT_SCHEMA,
    "Created": _write_result("Created", id=ID_SCHEMA),
    "Updated": _write_result("Updated"),
    "Deleted": _write_result("Deleted"),
    "BatchDone": _write_result("Done", results={"type": "array", "items": schema_ref("BatchResult")}),
    "BatchResult": BATCH_RESULT_SCHEMA,
    "Health": _health_result("healthy", "unhealthy"),
    "Liveness": _health_result("alive"),
    "Readiness": READINESS_SCHEMA,
    "Checks": CHECKS_SCHEMA,
    "Document": {"type": "object", "description": "https://spec.openapis.org/oas/v3.1.1.html describes it."},
    "Finding": FINDING_SCHEMA,
}


def resource_schemas(resource: Resource) -> dict[str, Any]:
    """Return the schemas of the resource's rows and of the bodies that clients send."""
    models: list[Any] = [resource.create_model, resource.update_model, batch.model(resource)]
    _, generated = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas: dict[str, Any] = generated["$defs"]
    fields = schemas[resource.create_model.__name__]["properties"]
    generated_columns = {
        "id": ID_SCHEMA,
        "created_at": TIME_SCHEMA,
        "updated_at": TIME_SCHEMA,
        "version": ROW_VERSION_SCHEMA,
    }
    row = {name: generated_columns.get(name) or fields[name] for name in resource.columns}
    versions = {
        **VERSION_PROPERTIES,
        "row": {
            "description": "The row after the change, as a read returned it; null if the row was deleted.",
            "anyOf": [schema_ref(resource.title), {"type": "null"}],
        },
    }
    return {
        **schemas,
        resource.title: {"type": "object", "required": [*row], "properties": row},
        f"{resource.title}Version": {"type": "object", "required": [*versions], "properties": versions},
    }
