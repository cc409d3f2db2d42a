"""Write a chunk of rows into a table: with one COPY if PostgreSQL accepts every row, else without the refused rows.

A row *conflicts* if another row of the table has a value that must be unique.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, TypeVar

import psycopg
from psycopg import sql

from velikiy.bulk.readers import Row
from velikiy.coherence import Change, Gate
from velikiy.coherence.locks import OTHERS, number_of
from velikiy.postgres import Connection, DatabaseUnavailable
from velikiy.resources.base import Resource
from velikiy.resources.ids import skip_all
from velikiy.resources.problems import SQLSTATES
from velikiy.resources.repository import Conflict

T = TypeVar("T")

OnConflict = Literal["reject", "skip", "update"]
"""The treatment of a row that conflicts."""

MAX_INVALIDATED_ROWS = 1000
"""Changed rows of a chunk up to which only their own paths are dropped. A larger chunk drops every path."""

CHUNK_TIMEOUT_S = 120.0
"""Seconds that PostgreSQL may take for a chunk. A request gets less, but writes one row."""

TURN_TIMEOUT_S = 4 * CHUNK_TIMEOUT_S
"""Seconds that a chunk may wait for chunks of other imports. PostgreSQL ends a chunk whose process is stopped after
CHUNK_TIMEOUT_S."""

VACUUM_AFTER_ROWS = 100_000
"""New rows after which the table is vacuumed at once. Until then, a count reads the whole table."""

MAX_UPDATE_ROUNDS = 3
"""Attempts at a row whose conflicting row is deleted at the same moment. Then the row is rejected."""

REHEARSAL_FIRST_ID = 2**62
"""The first new id of a rehearsal. The ids of existing rows are smaller."""


class Outcome(NamedTuple):
    """The numbers of rows that were created, updated and so on, and the rows that PostgreSQL refused."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0
    refused: Sequence[Row] = ()
    """These rows have errors now."""

    ids: Sequence[int] | None = ()
    """The rows that were created or changed; None if their ids are not known."""

    def then(self, later: "Outcome") -> "Outcome":
        return Outcome(
            self.created + later.created,
            self.updated + later.updated,
            self.unchanged + later.unchanged,
            self.skipped + later.skipped,
            [*self.refused, *later.refused],
            None if self.ids is None or later.ids is None else [*self.ids, *later.ids],
        )


def write(
    resource: Resource,
    gate: Gate,
    rows: list[Row],
    on_conflict: OnConflict,
    record: Callable[[Connection, Outcome], T],
    command: str,
) -> T:
    """Write these rows in one transaction.

    Args:
        command: The name of the command, for the history of the rows.
        record: Called in the same transaction with the outcome. Its result is returned.

    Raises:
        DatabaseUnavailable: The outcome is unknown.
    """
    author = f"command:velikiy {resource.name} {command}"
    return gate.write(chunk(resource, rows, on_conflict, record), author=author)


def chunk(
    resource: Resource,
    rows: list[Row],
    on_conflict: OnConflict,
    record: Callable[[Connection, Outcome], T],
    timeout_s: float = CHUNK_TIMEOUT_S,
    turn_timeout_s: float = TURN_TIMEOUT_S,
) -> Callable[[Connection], Change[T]]:
    """Return the change that writes these rows, for `Gate.write`.

    Args:
        record: See `write`.
        timeout_s: Seconds that PostgreSQL may take for it.
        turn_timeout_s: Seconds that it may wait for chunks of other imports.
    """

    def change(connection: Connection) -> Change[T]:
        if rows:
            _await_turn(connection, resource, turn_timeout_s)
        _set_timeouts(connection, timeout_s)
        if rows:
            skip_all(connection, resource)
        outcome = _insert(connection, resource, rows, on_conflict)
        result = record(connection, outcome)
        if outcome.ids is None or len(outcome.ids) > MAX_INVALIDATED_ROWS:
            return Change(result, None)  # for a longer list, edges drop everything anyway
        # The lists, the counts, the changed rows, and cached 404s of the new ids.
        return Change(result, resource.invalidated_by(*outcome.ids) if outcome.ids else ())

    return change


def _await_turn(connection: Connection, resource: Resource, timeout_s: float) -> None:
    """Let the imports of a resource write one chunk after the other. Two chunks that have the same unique values in
    different orders would wait for each other, and PostgreSQL would abort one of them."""
    _set_timeouts(connection, timeout_s)
    connection.execute("SELECT pg_advisory_xact_lock(%s, %s)", (OTHERS, number_of(f"chunk of {resource.name}")))


def _set_timeouts(connection: Connection, seconds: float) -> None:
    connection.deadline = time.monotonic() + seconds
    # Between two statements the transaction is idle while `record` writes to a disk, which may be slow.
    connection.execute(
        "SELECT set_config('statement_timeout', %(time)s, true), set_config('lock_timeout', %(time)s, true),"
        " set_config('idle_in_transaction_session_timeout', %(time)s, true)",
        {"time": f"{seconds:.0f}s"},
    )


@contextmanager
def rehearsal(resource: Resource, gate: Gate) -> Iterator[Callable[[list[Row], OnConflict], Outcome]]:
    """Yield a function that returns the outcome of writing rows, and that changes no row.

    It writes into a temporary table, which has the name and the constraints of the resource and hides the resource from
    this session. Rows of the resource are copied there if rows of the file conflict with them. So the rows of the file
    conflict with each other as they would in an import, and no client waits for a lock.
    """
    names = {"table": sql.Identifier(resource.name), "new": sql.Identifier(f"new_{resource.name}")}
    columns = sql.SQL(", ").join(map(sql.Identifier, resource.columns))
    with gate.database.transaction() as connection:
        _set_timeouts(connection, CHUNK_TIMEOUT_S)
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")  # the file may be a slow pipe
        [(schema,)] = connection.execute(
            "SELECT nspname FROM pg_class JOIN pg_namespace ON relnamespace = pg_namespace.oid"
            " WHERE pg_class.oid = %s::regclass",
            (resource.name,),
        ).fetchall()
        for statement in (
            "CREATE TEMPORARY TABLE {table} (LIKE {table} INCLUDING ALL) ON COMMIT DROP",
            f"ALTER TABLE {{table}} ALTER id RESTART WITH {REHEARSAL_FIRST_ID}",
        ):
            connection.execute(sql.SQL(statement).format(**names))
        copy_conflicting = sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {hidden}"
            " WHERE id = ANY(ARRAY(SELECT id FROM ({matches}) m)) ON CONFLICT DO NOTHING"
        ).format(
            **names,
            columns=columns,
            hidden=sql.Identifier(schema, resource.name),
            matches=_matches(connection, resource, sql.Identifier(schema, resource.name)),
        )

        def rehearse(rows: list[Row], on_conflict: OnConflict) -> Outcome:
            connection.deadline = time.monotonic() + CHUNK_TIMEOUT_S
            _stage(connection, resource, rows)
            connection.execute(copy_conflicting)
            return _insert(connection, resource, rows, on_conflict)

        yield rehearse
        connection.deadline = time.monotonic() + CHUNK_TIMEOUT_S


def _insert(connection: Connection, resource: Resource, rows: list[Row], on_conflict: OnConflict) -> Outcome:
    if not rows:
        return Outcome()
    if len(rows) > MAX_INVALIDATED_ROWS and on_conflict != "update":
        # The fastest statement, and it suffices for most chunks. It fails at the first row that PostgreSQL refuses.
        with suppress(psycopg.IntegrityError, psycopg.DataError), connection.transaction():
            _copy(connection, resource.name, resource.fields, (row.values for row in rows))
            return Outcome(created=len(rows), ids=None)
    try:
        with connection.transaction():
            return _insert_at_once(connection, resource, rows, on_conflict)
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        if len(rows) == 1:
            _, detail = SQLSTATES.get(error.sqlstate or "22021", ("", "PostgreSQL refuses the row."))
            return Outcome(refused=[rows[0].refused("", detail)])
    # PostgreSQL does not report which row it refused.
    half = len(rows) // 2
    first = _insert(connection, resource, rows[:half], on_conflict)
    return first.then(_insert(connection, resource, rows[half:], on_conflict))


def _insert_at_once(connection: Connection, resource: Resource, rows: list[Row], on_conflict: OnConflict) -> Outcome:
    _stage(connection, resource, rows)
    outcome = Outcome()
    for _ in range(MAX_UPDATE_ROUNDS):
        created, conflicting = _create(connection, resource)
        outcome = outcome.then(Outcome(created=len(created), ids=created))
        if not conflicting or on_conflict != "update":
            break
        _keep_staged(connection, resource, conflicting)
        updated, conflicting = _update(connection, resource, conflicting)
        outcome = outcome.then(updated)
        if not conflicting:
            break
        _keep_staged(connection, resource, conflicting)
    if on_conflict == "skip":
        return outcome.then(Outcome(skipped=len(conflicting)))
    return outcome.then(Outcome(refused=[_as_conflict(resource, rows[position]) for position in conflicting]))


def _stage(connection: Connection, resource: Resource, rows: list[Row]) -> None:
    """Put the rows into a temporary table, each with its position in the chunk."""
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
    connection.execute(sql.SQL("TRUNCATE {new}").format(**names))
    _copy(
        connection,
        f"new_{resource.name}",
        ("_position", *resource.fields),
        ([n, *row.values] for n, row in enumerate(rows)),
    )


def _keep_staged(connection: Connection, resource: Resource, positions: list[int]) -> None:
    """Remove all other rows from the temporary table."""
    new = sql.Identifier(f"new_{resource.name}")
    connection.execute(
        sql.SQL(
            "DELETE FROM {} WHERE NOT EXISTS (SELECT FROM unnest(%s::int[]) position WHERE position = _position)"
        ).format(new),
        (positions,),
    )


def _create(connection: Connection, resource: Resource) -> tuple[list[int], list[int]]:
    """Create the staged rows. Return their ids, and the positions of rows that conflict."""
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
            SELECT _position, id, id IN (SELECT id FROM inserted) FROM numbered ORDER BY _position
            """
        ).format(
            table=sql.Identifier(resource.name),
            new=sql.Identifier(f"new_{resource.name}"),
            fields=sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
        ),
        {"name": resource.name},
    ).fetchall()
    created = [id_ for _, id_, is_inserted in outcomes if is_inserted]
    return created, [position for position, _, is_inserted in outcomes if not is_inserted]


def _update(connection: Connection, resource: Resource, conflicting: list[int]) -> tuple[Outcome, list[int]]:
    """Give the staged rows' values to the rows with which they conflict.

    Several staged rows may conflict with one row. The counts are those of one update after the other, and only the last
    update is carried out. A row that has the values already is left as it is: it keeps its version.

    Returns:
        The outcome, and the positions of rows that conflict with no row any longer, or with several.
    """
    names = {
        "table": sql.Identifier(resource.name),
        "new": sql.Identifier(f"new_{resource.name}"),
        "matches": _matches(connection, resource, sql.Identifier(resource.name)),
        "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
        "stored": sql.SQL(", ").join(sql.Identifier("t", field) for field in resource.fields),
        "staged": sql.SQL(", ").join(sql.Identifier("n", field) for field in resource.fields),
        "before": sql.SQL(", ").join(
            sql.SQL("lag({}, 1, {}) OVER in_order").format(sql.Identifier("n", field), sql.Identifier("t", field))
            for field in resource.fields
        ),
    }
    # The order of ids prevents deadlocks with other writers of many rows. The next statement has a snapshot of its own,
    # so it sees what the writers before this lock have committed.
    connection.execute(
        sql.SQL(
            "SELECT FROM {table} WHERE id = ANY(ARRAY(SELECT id FROM ({matches}) m)) ORDER BY id FOR UPDATE"
        ).format(**names)
    )
    outcomes = connection.execute(
        sql.SQL(
            """
            WITH matched AS MATERIALIZED (
                SELECT _position, min(id) AS id FROM ({matches}) m GROUP BY _position HAVING count(DISTINCT id) = 1
            ), steps AS MATERIALIZED (
                SELECT _position, id, ROW({staged}) IS DISTINCT FROM ROW({before}) AS is_change,
                    _position = max(_position) OVER (PARTITION BY id) AS is_last
                FROM matched JOIN {new} n USING (_position) JOIN {table} t USING (id)
                WINDOW in_order AS (PARTITION BY id ORDER BY _position)
            ), updated AS (
                UPDATE {table} t SET ({fields}) = ROW({staged})
                FROM steps JOIN {new} n USING (_position)
                WHERE is_last AND t.id = steps.id AND ROW({stored}) IS DISTINCT FROM ROW({staged}) RETURNING t.id
            )
            SELECT _position, id, is_change, is_last AND id IN (SELECT id FROM updated) FROM steps
            """
        ).format(**names)
    ).fetchall()
    matched = {position for position, *_ in outcomes}
    updated = sum(is_change for _, _, is_change, _ in outcomes)
    ids = [id_ for _, id_, _, is_updated in outcomes if is_updated]
    remaining = [position for position in conflicting if position not in matched]
    return Outcome(updated=updated, unchanged=len(outcomes) - updated, ids=ids), remaining


def _matches(connection: Connection, resource: Resource, table: sql.Identifier) -> sql.Composable:
    """Return a query for the position of each staged row and the id of each row of the table that has one of its unique
    values, as the unique indexes compare them.

    LIMIT 1 loses nothing, and makes PostgreSQL look up each row in the index. A join would read the table for each
    chunk.
    """
    indexes = connection.execute(
        "SELECT (SELECT array_agg(pg_get_indexdef(indexrelid, key, true) ORDER BY key)"
        " FROM generate_series(1, indnkeyatts) key) FROM unnest(%s::text[]) name"
        " JOIN pg_index ON indexrelid = to_regclass(name)",
        (list(resource.unique),),
    ).fetchall()
    queries = []
    for (expressions,) in indexes:
        keys = sql.SQL(", ").join(
            sql.SQL("{} AS {}").format(sql.SQL(expression), sql.Identifier(f"_key{n}"))
            for n, expression in enumerate(expressions)
        )
        same = sql.SQL(" AND ").join(
            sql.SQL("t.{key} = n.{key}").format(key=sql.Identifier(f"_key{n}")) for n in range(len(expressions))
        )
        queries.append(
            sql.SQL(
                "SELECT _position, id FROM (SELECT _position, {keys} FROM {new}) n CROSS JOIN LATERAL"
                " (SELECT id FROM (SELECT id, {keys} FROM {table}) t WHERE {same} LIMIT 1) matching"
            ).format(keys=keys, same=same, table=table, new=sql.Identifier(f"new_{resource.name}"))
        )
    return sql.SQL(" UNION ").join(queries) if queries else sql.SQL("SELECT 0 AS _position, 0 AS id WHERE false")


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


OWNED = "SELECT pg_has_role(relowner, 'MEMBER') FROM pg_class WHERE oid = %s::regclass"


def vacuum(resource: Resource, gate: Gate) -> None:
    """Vacuum the table now. Autovacuum would start some minutes later. A role that does not own the table can only
    collect its statistics, which plans depend on."""
    with suppress(DatabaseUnavailable, psycopg.Error, KeyboardInterrupt), gate.database.autocommit() as connection:
        connection.deadline = math.inf
        connection.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        [(owned,)] = connection.execute(OWNED, (resource.name,)).fetchall()
        statement = "VACUUM (ANALYZE, SKIP_LOCKED) {}" if owned else "CALL analyze_rows({}::regclass)"
        table = sql.Identifier(resource.name) if owned else sql.Literal(resource.name)
        connection.execute(sql.SQL(statement).format(table))
