"""Many writes as one: all of them or none, in one transaction and behind one fence."""

from typing import Annotated, Any, Literal

import psycopg
from pydantic import Field, create_model

from velikiy.coherence import CachePath, Change
from velikiy.http import responses
from velikiy.http.problems import SQLSTATES, Problem
from velikiy.http.requests import Key
from velikiy.http.responses import Sent
from velikiy.postgres import Connection
from velikiy.resources.base import Resource, Strict
from velikiy.resources.idempotency import once
from velikiy.resources.repository import Refusal, Rows

OPERATIONS = 1000

AT_ONCE = 500
"""Operations for which a batch has as much time again as one request."""

Id = Annotated[int, Field(ge=1, le=2**63 - 1, json_schema_extra={"format": "int64"})]


def model(resource: Resource) -> type[Strict]:
    """`{"operations": [{"op": "create", ...}, {"op": "update", "id": 7, ...}, {"op": "delete", "id": 8}]}`"""
    number: Any = (Id, ...)
    create: Any = create_model(f"Create{resource.title}", __base__=resource.new, op=_op("create"))
    update: Any = create_model(f"Update{resource.title}", __base__=resource.changes, op=_op("update"), id=number)
    delete: Any = create_model(f"Delete{resource.title}", __base__=Strict, op=_op("delete"), id=number)
    operation: Any = Annotated[create | update | delete, Field(discriminator="op")]
    operations: Any = Annotated[list[operation], Field(min_length=1, max_length=OPERATIONS)]
    return create_model(f"{resource.title}Batch", __base__=Strict, operations=(operations, ...))


def _op(name: str) -> Any:
    return (Literal[name], ...)


def run(rows: Rows, asked: Strict, key: Key | None, until: float | None = None) -> Sent:
    """`until`: see `Gate.write`.

    Raises:
        Problem: some of the operations cannot be done; it names each of them.
    """
    operations = asked.operations  # type: ignore[attr-defined]
    times = 1 + len(operations) / AT_ONCE
    try:
        return rows.gate.write(once(key, lambda connection: _all(rows, connection, operations)), times, until=until)
    except (Refusal, psycopg.IntegrityError, psycopg.DataError):
        # Once more, to say which: with a savepoint after each, which costs as much as the operation itself.
        return rows.gate.write(once(key, lambda connection: _each(rows, connection, operations)), times, until=until)


def _all(rows: Rows, connection: Connection, operations: list[Any]) -> Change[Sent]:
    _lock(rows, connection, operations)
    return _done(rows, [_one(rows, connection, operation) for operation in operations])


def _each(rows: Rows, connection: Connection, operations: list[Any]) -> Change[Sent]:
    _lock(rows, connection, operations)
    results, errors = [], []
    connection.execute("SAVEPOINT here")
    for index, operation in enumerate(operations):
        try:
            results.append(_one(rows, connection, operation))
        except Refusal as refusal:
            problem = responses.refused(rows.resource, refusal)
            [named] = problem.errors or [{"field": "id", "detail": problem.detail}]
            errors.append(_error(index, named["field"], named["detail"], problem.status))
            connection.execute("ROLLBACK TO SAVEPOINT here")
        except (psycopg.IntegrityError, psycopg.DataError) as error:
            if error.sqlstate not in SQLSTATES:
                raise
            errors.append(_error(index, "", SQLSTATES[error.sqlstate][1], 422))
            connection.execute("ROLLBACK TO SAVEPOINT here")
        else:
            # At one stroke: each way to PostgreSQL is as long as an operation's. Two statements cannot be prepared.
            connection.execute("RELEASE SAVEPOINT here; SAVEPOINT here", prepare=False)
    if errors:
        some = "; ".join(f"{error['field']}: {error['detail']}" for error in errors[:10])
        raise Problem("batch-refused", f"The batch had no effect. {some}", errors)
    return _done(rows, results)


def _lock(rows: Rows, connection: Connection, operations: list[Any]) -> None:
    rows.lock(connection, [operation.id for operation in operations if operation.op != "create"])
    rows.lock_values(connection, [operation for operation in operations if operation.op != "delete"])


def _one(rows: Rows, connection: Connection, operation: Any) -> dict[str, Any]:
    if operation.op == "create":
        number, entry = rows.create(connection, operation).outcome
        return {"op": "create", "id": number, "status": 201, "etag": entry.etag}
    if operation.op == "update":
        entry = rows.update(connection, operation.id, operation, None).outcome
        return {"op": "update", "id": operation.id, "status": 200, "etag": entry.etag}
    rows.delete(connection, operation.id, None)
    return {"op": "delete", "id": operation.id, "status": 200}


def _error(index: int, field: str, detail: str, status: int) -> dict[str, Any]:
    place = f"operations.{index}.{field}".rstrip(".")
    return {"field": place, "detail": detail, "index": index, "status": status}


def _done(rows: Rows, results: list[dict[str, Any]]) -> Change[Sent]:
    invalidates: tuple[CachePath, ...] = rows.resource.invalidated_by(*{result["id"] for result in results})
    return Change(Sent(200, {"message": "Done", "results": results}), invalidates)
