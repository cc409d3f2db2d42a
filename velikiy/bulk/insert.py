"""Insert a chunk of rows into a table: with one COPY if PostgreSQL accepts every row, else without the refused rows."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from psycopg import sql

from velikiy.bulk.readers import Row
from velikiy.coherence import Change, Gate
from velikiy.postgres import Connection, DatabaseUnavailable
from velikiy.resources.base import Resource
from velikiy.resources.ids import skip_all
from velikiy.resources.problems import SQLSTATES
from velikiy.resources.repository import Conflict

T = TypeVar("T")


MAX_INVALIDATED_ROWS = 1000
"""Rows of a chunk up to which only their own paths are dropped. A larger chunk drops every path."""

CHUNK_TIMEOUT_S = 120.0
"""Seconds that PostgreSQL may take for a chunk. A request gets less, but writes one row."""

VACUUM_AFTER_ROWS = 100_000
"""New rows after which the table is vacuumed at once. Until then, a count reads the whole table."""


def write(resource: Resource, gate: Gate, rows: list[Row], record: Callable[[Connection, list[Row]], T]) -> T:
    """Insert these rows in one transaction.

    Args:
        record: Called in the same transaction with the rows that were refused and have errors now. Its result is
            returned.

    Raises:
        DatabaseUnavailable: The outcome is unknown.
    """

    def change(connection: Connection) -> Change[T]:
        connection.deadline = time.monotonic() + CHUNK_TIMEOUT_S
        # Between two statements the transaction is idle while `record` writes to a disk, which may be slow.
        connection.execute(
            "SELECT set_config('statement_timeout', %(time)s, true),"
            " set_config('idle_in_transaction_session_timeout', %(time)s, true)",
            {"time": f"{CHUNK_TIMEOUT_S:.0f}s"},
        )
        if rows:
            skip_all(connection, resource)
        created, refused = _insert(connection, resource, rows) if rows else ([], [])
        outcome = record(connection, refused)
        if len(refused) == len(rows):
            return Change(outcome)
        # The lists, the counts, and cached 404s of the new ids. For a longer list, edges drop everything anyway.
        return Change(outcome, resource.invalidated_by(*created) if len(rows) <= MAX_INVALIDATED_ROWS else None)

    return gate.write(change)


def _insert(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    """Return the new ids and the refused rows. More than MAX_INVALIDATED_ROWS ids are not returned."""
    if len(rows) > MAX_INVALIDATED_ROWS:
        # The fastest statement, and it suffices for most chunks. It fails at the first row that PostgreSQL refuses.
        with suppress(psycopg.IntegrityError, psycopg.DataError), connection.transaction():
            _copy(connection, resource.name, resource.fields, (row.values for row in rows))
            return [], []
    try:
        with connection.transaction():
            return _insert_at_once(connection, resource, rows)
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        if len(rows) == 1:
            _, detail = SQLSTATES.get(error.sqlstate or "22021", ("", "PostgreSQL refuses the row."))
            return [], [rows[0].refused("", detail)]
    # PostgreSQL does not report which row it refused.
    half = len(rows) // 2
    created, refused = _insert(connection, resource, rows[:half])
    more_created, more_refused = _insert(connection, resource, rows[half:])
    return created + more_created, refused + more_refused


def _insert_at_once(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    names = {
        "table": sql.Identifier(resource.name),
        "new": sql.Identifier(f"new_{resource.name}"),
        "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
    }
    # No field of a resource can begin with an underscore, so `_position` is free.
    connection.execute(
        sql.SQL(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {new} ON COMMIT DELETE ROWS AS"
            " SELECT 0 AS _position, {fields} FROM {table} WITH NO DATA"
        ).format(**names)
    )
    connection.execute(sql.SQL("DELETE FROM {new}").format(**names))
    _copy(
        connection,
        f"new_{resource.name}",
        ("_position", *resource.fields),
        ([n, *row.values] for n, row in enumerate(rows)),
    )
    # Ids are assigned before the INSERT. They identify the inserted rows: the values cannot, because a unique index
    # may be on an expression.
    outcomes = connection.execute(
        sql.SQL(
            """
            WITH numbered AS MATERIALIZED (
                SELECT nextval((SELECT pg_get_serial_sequence(%(name)s, 'id')::regclass)) AS id, sorted.*
                FROM (SELECT * FROM {new} ORDER BY _position) sorted
            ), inserted AS (
                INSERT INTO {table} (id, {fields}) OVERRIDING SYSTEM VALUE SELECT id, {fields} FROM numbered
                ON CONFLICT DO NOTHING RETURNING id
            )
            SELECT _position, id, id IN (SELECT id FROM inserted) AS is_inserted FROM numbered
            WHERE %(all)s OR id NOT IN (SELECT id FROM inserted) ORDER BY _position
            """
        ).format(**names),
        {"name": resource.name, "all": len(rows) <= MAX_INVALIDATED_ROWS},
    ).fetchall()
    conflicting = [rows[position] for position, _, is_inserted in outcomes if not is_inserted]
    created = [id_ for _, id_, is_inserted in outcomes if is_inserted]
    return created, [_as_conflict(resource, row) for row in conflicting]


def _copy(connection: Connection, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _as_conflict(resource: Resource, row: Row) -> Row:
    """Return the row with an error that names every unique field: ON CONFLICT does not report the index."""
    problem = Conflict(resource, " or ".join(resource.unique.values()))
    return row._replace(errors=problem.errors or [])


def vacuum(resource: Resource, gate: Gate) -> None:
    """Vacuum the table now. Autovacuum would start some minutes later."""
    with suppress(DatabaseUnavailable, psycopg.Error, KeyboardInterrupt), gate.database.autocommit() as connection:
        connection.deadline = math.inf
        connection.execute("SET statement_timeout = 0")
        connection.execute(sql.SQL("VACUUM (ANALYZE, SKIP_LOCKED) {}").format(sql.Identifier(resource.name)))
