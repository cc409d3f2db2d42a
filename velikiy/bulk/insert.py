"""Many rows into a table: at once where PostgreSQL takes them all, else those that it takes."""

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
from velikiy.resources.problems import SQLSTATES
from velikiy.resources.repository import Conflict

T = TypeVar("T")


FEW = 1000
"""Rows of a chunk up to which only their own addresses are dropped."""


PATIENCE = 120.0
"""Seconds that PostgreSQL may take for a chunk. A request gets less, but is one row."""


BIG = 100_000
"""Rows after which the table is vacuumed at once: until somebody does, a count reads all of it."""


def write(resource: Resource, gate: Gate, rows: list[Row], keep: Callable[[Connection, list[Row]], T]) -> T:
    """Insert these rows in one transaction; `keep` gets those that are refused, with their errors, and may do in the
    same transaction what belongs to it.

    Raises:
        DatabaseUnavailable: the outcome is unknown.
    """

    def change(connection: Connection) -> Change[T]:
        connection.deadline = time.monotonic() + PATIENCE
        # Between two statements the transaction is idle while `keep` writes to a disk, which may be slow.
        connection.execute(
            "SELECT set_config('statement_timeout', %(time)s, true),"
            " set_config('idle_in_transaction_session_timeout', %(time)s, true)",
            {"time": f"{PATIENCE:.0f}s"},
        )
        made, refused = _insert(connection, resource, rows) if rows else ([], [])
        outcome = keep(connection, refused)
        if len(refused) == len(rows):
            return Change(outcome)
        # Lists, counts, and 404s that are stored of the new ids: of so many, edges drop everything anyway.
        return Change(outcome, resource.invalidated_by(*made) if len(rows) <= FEW else None)

    return gate.write(change)


def _insert(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    """The ids of those that were made, where they are FEW, and the others."""
    if len(rows) > FEW:
        # Nothing is faster, and mostly there is nothing to refuse. Where there is, it ends at the first one.
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
    # PostgreSQL does not say which one it is.
    half = len(rows) // 2
    made, refused = _insert(connection, resource, rows[:half])
    more_made, more_refused = _insert(connection, resource, rows[half:])
    return made + more_made, refused + more_refused


def _insert_at_once(connection: Connection, resource: Resource, rows: list[Row]) -> tuple[list[int], list[Row]]:
    names = {
        "table": sql.Identifier(resource.name),
        "new": sql.Identifier(f"new_{resource.name}"),
        "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
    }
    connection.execute(
        sql.SQL(
            "CREATE TEMPORARY TABLE IF NOT EXISTS {new} ON COMMIT DELETE ROWS AS"
            " SELECT 0 AS place, {fields} FROM {table} WITH NO DATA"
        ).format(**names)
    )
    connection.execute(sql.SQL("DELETE FROM {new}").format(**names))
    _copy(
        connection,
        f"new_{resource.name}",
        ("place", *resource.fields),
        ([n, *row.values] for n, row in enumerate(rows)),
    )
    # The ids are taken first: by them it shows which row is which, and a unique index may be of an expression.
    done = connection.execute(
        sql.SQL(
            """
            WITH numbered AS MATERIALIZED (
                SELECT nextval((SELECT pg_get_serial_sequence(%(name)s, 'id')::regclass)) AS id, sorted.*
                FROM (SELECT * FROM {new} ORDER BY place) sorted
            ), made AS (
                INSERT INTO {table} (id, {fields}) OVERRIDING SYSTEM VALUE SELECT id, {fields} FROM numbered
                ON CONFLICT DO NOTHING RETURNING id
            )
            SELECT place, id, id IN (SELECT id FROM made) AS made FROM numbered
            WHERE %(all)s OR id NOT IN (SELECT id FROM made) ORDER BY place
            """
        ).format(**names),
        {"name": resource.name, "all": len(rows) <= FEW},
    ).fetchall()
    taken = [rows[place] for place, _, made in done if not made]
    return [id_ for _, id_, made in done if made], [_taken(resource, row) for row in taken]


def _copy(connection: Connection, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with connection.cursor().copy(statement) as copy:
        for row in rows:
            copy.write_row(row)


def _taken(resource: Resource, row: Row) -> Row:
    """ON CONFLICT does not say which index it was."""
    problem = Conflict(resource, " or ".join(resource.unique.values()))
    return row._replace(errors=problem.errors or [])


def vacuum(resource: Resource, gate: Gate) -> None:
    """Not waiting for its turn: PostgreSQL's own comes some minutes later."""
    with suppress(DatabaseUnavailable, psycopg.Error, KeyboardInterrupt), gate.database.autocommit() as connection:
        connection.deadline = math.inf
        connection.execute("SET statement_timeout = 0")
        connection.execute(sql.SQL("VACUUM (ANALYZE, SKIP_LOCKED) {}").format(sql.Identifier(resource.name)))
