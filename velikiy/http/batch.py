"""Many writes in one request: all of them or none, in one transaction that passes the gate once."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import orjson
import psycopg
from pydantic import Field, create_model

from velikiy.coherence import Change
from velikiy.coherence.deadline import Deadline
from velikiy.http.responses import applied
from velikiy.postgres import Connection
from velikiy.resources.base import MAX_ID, Resource, Strict
from velikiy.resources.idempotency import StoredResponse, Write
from velikiy.resources.problems import SQLSTATES, Problem
from velikiy.resources.repository import Refusal, Repository

MAX_OPERATIONS = 1000

OPERATIONS_PER_TIMEOUT = 500
"""A batch has the time of one request, and as much again for each of so many operations."""

Id = Annotated[int, Field(ge=1, le=MAX_ID, json_schema_extra={"format": "int64"})]


def model(resource: Resource) -> type[Strict]:
    """Return the model of a body: `{"operations": [{"op": "update", "id": 7, ...}, {"op": "delete", "id": 8}]}`."""
    row_id: Any = (Id, ...)
    create: Any = create_model(f"Create{resource.title}", __base__=resource.create_model, op=_op("create"))
    update: Any = create_model(f"Update{resource.title}", __base__=resource.update_model, op=_op("update"), id=row_id)
    delete: Any = create_model(f"Delete{resource.title}", __base__=Strict, op=_op("delete"), id=row_id)
    operation: Any = Annotated[create | update | delete, Field(discriminator="op")]
    operations: Any = Annotated[list[operation], Field(min_length=1, max_length=MAX_OPERATIONS)]
    return create_model(f"{resource.title}Batch", __base__=Strict, operations=(operations, ...))


def _op(name: str) -> Any:
    return (Literal[name], ...)


class _Refused(Exception):
    """The batch cannot be carried out. Unlike a Problem, `once` does not store it as the response."""


def run(
    repository: Repository,
    body: Strict,
    once: Callable[[Write], Write],
    deadline: Deadline | None = None,
    author: str = "",
    preference: str = "",
) -> StoredResponse:
    """Carry out the batch.

    Args:
        repository: The rows.
        body: The operations.
        once: Makes a write that an Idempotency-Key lets happen once (velikiy/resources/idempotency.py).
        deadline: See `Gate.write`.
        author: See `Gate.write`.
        preference: See `requests.preference`. With "representation" each result has the row.

    Raises:
        Problem: Some operations cannot be carried out. The problem names each of them, and the batch has no effect.
    """
    operations = body.operations  # type: ignore[attr-defined]
    timeout_factor = 1 + len(operations) / OPERATIONS_PER_TIMEOUT

    def carry_out(connection: Connection, operation: Any) -> dict[str, Any]:
        return _carry_out(repository, connection, operation, with_row=preference == "representation")

    def write_all(connection: Connection) -> Change[StoredResponse]:
        _lock(repository, connection, operations)
        try:
            results = [carry_out(connection, operation) for operation in operations]
        except Refusal:
            raise _Refused from None
        return _change(repository, results, preference)

    def find_errors(connection: Connection) -> Change[StoredResponse]:
        _lock(repository, connection, operations)
        return _change(repository, _carry_out_each(connection, operations, carry_out), preference)

    try:
        return repository.gate.write(once(write_all), timeout_factor, deadline=deadline, author=author)
    except (_Refused, psycopg.IntegrityError, psycopg.DataError):
        # Again, with a savepoint after each operation, to name the ones at fault. A savepoint costs as much as an
        # operation.
        return repository.gate.write(once(find_errors), timeout_factor, deadline=deadline, author=author)


def _lock(repository: Repository, connection: Connection, operations: list[Any]) -> None:
    repository.lock(connection, [operation.id for operation in operations if operation.op != "create"])
    repository.lock_unique_values(connection, [operation for operation in operations if operation.op != "delete"])


def _carry_out_each(
    connection: Connection, operations: list[Any], carry_out: Callable[[Connection, Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Raises: Problem"""
    results, errors = [], []
    connection.execute("SAVEPOINT operation")
    for index, operation in enumerate(operations):
        try:
            results.append(carry_out(connection, operation))
        except Refusal as refusal:
            [error] = refusal.errors or [{"field": "id", "detail": refusal.detail}]
            errors.append(_error(index, error["field"], error["detail"], refusal.status))
            connection.execute("ROLLBACK TO SAVEPOINT operation")
        except (psycopg.IntegrityError, psycopg.DataError) as error:
            if error.sqlstate not in SQLSTATES:
                raise
            errors.append(_error(index, "", SQLSTATES[error.sqlstate][1], 422))
            connection.execute("ROLLBACK TO SAVEPOINT operation")
        else:
            # Both in one exchange, which takes as long as an operation. Two statements in one cannot be prepared.
            connection.execute("RELEASE SAVEPOINT operation; SAVEPOINT operation", prepare=False)
    if errors:
        first = "; ".join(f"{error['field']}: {error['detail']}" for error in errors[:10])
        raise Problem("batch-refused", f"The batch had no effect. {first}", errors)
    return results


def _carry_out(repository: Repository, connection: Connection, operation: Any, *, with_row: bool) -> dict[str, Any]:
    """Raises: Refusal"""
    if operation.op == "delete":
        repository.delete(connection, operation.id, None)
        return {"op": "delete", "id": operation.id, "status": 200}
    if operation.op == "create":
        row_id, entry = repository.create(connection, operation).outcome
        result = {"op": "create", "id": row_id, "status": 201, "etag": entry.etag}
    else:
        entry = repository.update(connection, operation.id, operation, None).outcome
        result = {"op": "update", "id": operation.id, "status": 200, "etag": entry.etag}
    return {**result, "row": orjson.loads(entry.body)} if with_row else result


def _error(index: int, field: str, detail: str, status: int) -> dict[str, Any]:
    name = f"operations.{index}.{field}".rstrip(".")
    return {"field": name, "detail": detail, "index": index, "status": status}


def _change(repository: Repository, results: list[dict[str, Any]], preference: str) -> Change[StoredResponse]:
    paths = repository.resource.invalidated_by(*{result["id"] for result in results})
    return Change(StoredResponse(200, {"message": "Done", "results": results}, applied(preference)), paths)
