"""The ids of new rows, which a sequence counts.

SQL can insert rows with explicit ids, which the sequence does not know. Then the next id of the sequence may be taken.
"""

from collections.abc import Callable
from typing import TypeVar

from psycopg import sql

from velikiy.coherence import Gate
from velikiy.postgres import Connection
from velikiy.resources.base import MAX_ID, Resource
from velikiy.resources.problems import SQLSTATES, Problem

T = TypeVar("T")

MAX_SKIP = MAX_ID // 2
"""The sequence does not jump beyond a larger id, or few ids would be left."""

SEQUENCE = "pg_get_serial_sequence({name}, 'id')::regclass"

SKIP_NEXT = f"""
SELECT setval({SEQUENCE}, min(id)) FROM {{table}} taken
WHERE id >= pg_sequence_last_value({SEQUENCE})
    AND NOT EXISTS (SELECT FROM {{table}} WHERE id = least(taken.id, {MAX_ID - 1}) + 1)
"""  # noqa: S608
"""Set the sequence to the end of the ids without a gap that begin at its last value."""

SKIP_ALL = f"""
SELECT setval({SEQUENCE}, largest) FROM (SELECT max(id) AS largest FROM {{table}}) ids
WHERE largest > coalesce(pg_sequence_last_value({SEQUENCE}), 0) AND largest < {MAX_SKIP}
"""  # noqa: S608
"""Set the sequence to the largest id, if it is behind."""


class IdTaken(Exception):
    """The next id of the sequence belongs to another row. The transaction is aborted."""


def create(resource: Resource, gate: Gate, write: Callable[[], T]) -> T:
    """Run a write that creates rows. If an id is taken, skip the taken ids and run the write again.

    Raises:
        Problem: Another unique index, which the resource does not name, refuses the row.
    """
    for skip in (SKIP_NEXT, SKIP_ALL):
        try:
            return write()
        except IdTaken:
            with gate.database.transaction() as connection:
                _execute(connection, skip, resource)
    try:
        return write()
    except IdTaken:
        raise Problem(*SQLSTATES["23505"]) from None


def skip_all(connection: Connection, resource: Resource) -> None:
    """Let the sequence continue behind the largest id."""
    _execute(connection, SKIP_ALL, resource)


def _execute(connection: Connection, statement: str, resource: Resource) -> None:
    names = {"name": sql.Literal(resource.name), "table": sql.Identifier(resource.name)}
    connection.execute(sql.SQL(statement).format(**names))
