"""The reads and writes of one resource, and the paths that each write invalidates.

PostgreSQL makes the JSON of a row, once. From there its bytes reach the client unparsed.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, LiteralString, TypeVar

import orjson
import psycopg
from psycopg import sql

from velikiy.coherence import NOT_TRIED, Answer, Change, Entry, FillLease, Gate, NotTried, found
from velikiy.coherence.locks import OTHERS, number_of
from velikiy.postgres import Connection, Row, Statement
from velikiy.resources import history, pagination
from velikiy.resources.base import Body, Resource
from velikiy.resources.ids import IdTaken
from velikiy.resources.pagination import BadCursor, Page
from velikiy.resources.problems import Problem

T = TypeVar("T")

ROW = sql.SQL("id, to_char(updated_at AT TIME ZONE 'UTC', 'Dy, DD Mon YYYY HH24:MI:SS \"GMT\"'), row_to_json(r)::text")
"""A row as `id, Last-Modified, JSON`, with the date as HTTP spells it (RFC 9110, 5.6.7)."""

ALL_ROWS = Page()

UNIQUE_VALUE_LOCKS = 64
"""Locks for the unique values of one field. Each lock takes room in a table that all sessions share."""

Precondition = Callable[[Entry], bool]
"""Returns whether the current row may be written."""


class Refusal(Problem):
    """A write that the data does not allow."""


class NotFound(Refusal):
    """No row has this id."""

    def __init__(self, resource: Resource, row_id: int) -> None:
        super().__init__("not-found", f"There is no {resource.singular} {row_id}.")


class Conflict(Refusal):
    """Another row has a value that must be unique."""

    def __init__(self, resource: Resource, field: str) -> None:
        detail = f"is taken by another {resource.singular}"
        super().__init__("taken", f"{field}: {detail}", [{"field": field, "detail": detail}])


class PreconditionFailed(Refusal):
    """The row is not the version that the writer expects."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(
            "precondition-failed",
            f"The {resource.singular} does not meet the condition in If-Match or If-None-Match."
            " Fetch it again and retry with its new ETag.",
        )


class Repository:
    def __init__(self, resource: Resource, gate: Gate) -> None:
        self.resource = resource
        self.gate = gate
        parts = {
            "table": sql.Identifier(resource.name),
            "columns": pagination.columns(resource),
            "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
            "values": sql.SQL(", ".join(f"${n}" for n in range(1, len(resource.fields) + 1))),
            "row": ROW,
            "name": sql.Literal(resource.name),
            "values_after_id": sql.SQL(", ".join(f"${n}" for n in range(2, len(resource.fields) + 2))),
        }

        def statement(text: LiteralString) -> str:
            """Compose once: composing costs as much as executing."""
            return sql.SQL(text).format(**parts).as_string()

        self._select = statement("SELECT {row} FROM (SELECT {columns} FROM {table} WHERE id = $1) r")
        self._lock = statement("SELECT FROM {table} WHERE id = ANY(%s) ORDER BY id FOR UPDATE")
        # The writes return the row as reads do: the writer fills Redis with it.
        self._insert = statement(
            "WITH r AS (INSERT INTO {table} ({fields}) VALUES ({values}) RETURNING {columns}) SELECT {row} FROM r"
        )
        self._update = statement(
            "WITH r AS (UPDATE {table} SET {{}} WHERE id = $1 RETURNING {columns}) SELECT {row} FROM r"
        )
        # A deleted row that is created again has the id and the time of its creation from its history, and a trigger
        # continues its versions.
        self._insert_again = statement(
            "WITH r AS (INSERT INTO {table} (id, {fields}, created_at) OVERRIDING SYSTEM VALUE VALUES ("
            "$1, {values_after_id}, coalesce((SELECT (before->>'created_at')::timestamptz FROM row_history"
            " WHERE resource = {name} AND row_id = $1 AND before IS NOT NULL ORDER BY version DESC LIMIT 1), now()))"
            " RETURNING {columns}) SELECT {row} FROM r"
        )
        self._is_known = statement("SELECT FROM row_history WHERE resource = {name} AND row_id = $1 LIMIT 1")
        self._histories = history.Histories(resource)
        self._quoted = {name: sql.Identifier(name).as_string() for name in resource.fields}
        self._delete = statement("DELETE FROM {table} WHERE id = $1 RETURNING id")

    # ---- reads ----

    def get(self, row_id: int, from_edge: FillLease | NotTried | None = NOT_TRIED) -> Answer:
        """Return the row as a JSON object, or an entry with status 404. `from_edge`: see `Gate.read`."""

        def load(connection: Connection) -> Entry:
            (rows,) = connection.query(Statement(self._select, (row_id,)))
            return _entry(rows[0]) if rows else self._missing(row_id)

        return self.gate.read(self.resource.row_path(row_id), "", load, from_edge)

    def page(self, page: Page, from_edge: FillLease | NotTried | None = NOT_TRIED) -> Answer:
        """Return the page as a JSON array.

        Raises:
            BadCursor
        """
        statement = pagination.select(self.resource, page)

        def load(connection: Connection) -> Entry:
            try:
                rows = self._rows(connection, page, statement)
            except psycopg.DataError:
                raise BadCursor from None  # the cursor is the only value from outside that may be malformed here
            body = f"[{','.join(row[2] for row in rows[: page.limit])}]".encode()
            return found(body, link=pagination.link(self.resource, page, rows))

        return self.gate.read(self.resource.list_path, page.variant, load, from_edge)

    def ids_behind(self, connection: Connection, page: Page) -> tuple[list[int], str]:
        """Return the ids of a page, in its order, and the cursor of the next page, empty on the last one. Nothing is
        cached."""
        rows = self._rows(connection, page, pagination.select(self.resource, page))
        return [row[0] for row in rows[: page.limit]], pagination.next_cursor(page, rows)

    def _rows(self, connection: Connection, page: Page, statement: tuple[sql.Composed, list[Any]]) -> list[Any]:
        """Return the rows of `pagination.select`. `statement`: its result for a search of all rows."""
        rows = self._scan(connection, page)
        return rows if len(rows) > page.limit else _execute(connection, *statement)

    def _scan(self, connection: Connection, page: Page) -> list[Any]:
        """Search the next stretch of the order, if there are too many matches to sort them all."""
        if not page.q or page.filters:
            return []
        ((plan,),) = _execute(connection, *pagination.estimate(self.resource, page))
        expected = plan[0]["Plan"]["Plan Rows"]
        if expected <= pagination.SORTABLE_ROWS:
            return []
        # The number of rows at the last ANALYZE; -1 before the first, which makes a small window.
        count = "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass"
        ((rows,),) = connection.execute(count, (self.resource.name,)).fetchall()
        window = pagination.scan_window(page, expected, max(rows, expected))
        return _execute(connection, *pagination.select(self.resource, page, scan_window=window)) if window else []

    def count(self, page: Page = ALL_ROWS, from_edge: FillLease | NotTried | None = NOT_TRIED) -> Answer:
        """Return `{"count": 3}`: the number of rows on all pages together. It costs a scan of an index."""
        condition, values = pagination.matching(self.resource, page)
        statement = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(sql.Identifier(self.resource.name), condition)

        def load(connection: Connection) -> Entry:
            (row,) = _execute(connection, statement, values)
            return found(b'{"count":%d}' % row[0])

        return self.gate.read(self.resource.count_path, page.variant, load, from_edge)

    def history(self, row_id: int, page: Page, from_edge: FillLease | NotTried | None = NOT_TRIED) -> Answer:
        """Return a page of the row's versions as a JSON array, or an entry with status 404 if no row ever had this id.

        Raises:
            BadCursor
        """
        beginning = self._histories.before(row_id, page)

        def load(connection: Connection) -> Entry:
            return self._histories.load(connection, row_id, page, beginning) or self._missing(row_id)

        return self.gate.read(self.resource.row_path(row_id), history.variant(page), load, from_edge)

    def stored(self, row_id: int) -> dict[str, Any] | None:
        """Return the members of the row in PostgreSQL, None if it does not exist.

        Raises:
            DatabaseUnavailable
        """
        with self.gate.database.autocommit() as connection:
            (rows,) = connection.query(Statement(self._select, (row_id,)))
        return dict(orjson.loads(rows[0][2])) if rows else None

    # ---- writes: each runs in a transaction that the gate has opened ----

    def create(self, connection: Connection, new: Body) -> Change[tuple[int, Entry]]:
        """Raises: Conflict, IdTaken"""
        values = new.model_dump()
        written = self._write(connection, self._insert, [values[field] for field in self.resource.fields])
        assert written is not None  # INSERT ... RETURNING returns a row or raises
        row_id, entry = written
        return self._change((row_id, entry), row_id, entry)

    def check_deleted(self, connection: Connection, row_id: int) -> None:
        """
        Raises:
            NotFound: The history knows no such row.
            PreconditionFailed: A row with this id exists.
        """
        # Twice: the first attempt waits for a transaction that deletes the row, or deletes it and creates it again.
        if self.lock(connection, [row_id]) or self.lock(connection, [row_id]):
            raise PreconditionFailed(self.resource)
        if connection.query(Statement(self._is_known, (row_id,))) == [[]]:
            raise NotFound(self.resource, row_id)

    def create_again(self, connection: Connection, row_id: int, new: Body) -> Change[tuple[int, Entry]]:
        """Create a row that was deleted, under the id that it had (`check_deleted`).

        Raises:
            Conflict, PreconditionFailed
        """
        values = new.model_dump()
        try:
            written = self._write(connection, self._insert_again, [row_id, *map(values.get, self.resource.fields)])
        except psycopg.errors.UniqueViolation:  # another writer has created the row at the same moment
            raise PreconditionFailed(self.resource) from None
        assert written is not None  # INSERT ... RETURNING returns a row or raises
        return self._change(written, row_id, written[1])

    def update(
        self, connection: Connection, row_id: int, changes: Body, precondition: Precondition | None
    ) -> Change[Entry]:
        """Raises: NotFound, Conflict, PreconditionFailed"""
        self._check(connection, row_id, precondition)
        given = changes.model_dump(exclude_unset=True)
        values = {field: given[field] for field in self.resource.fields if field in given}
        assignments = [f"{self._quoted[name]} = ${n}" for n, name in enumerate(values, start=2)] or ["id = id"]
        written = self._write(connection, self._update.format(", ".join(assignments)), [row_id, *values.values()])
        if written is None:
            raise NotFound(self.resource, row_id)
        _, entry = written
        return self._change(entry, row_id, entry)

    def delete(self, connection: Connection, row_id: int, precondition: Precondition | None) -> Change[None]:
        """Raises: NotFound, PreconditionFailed"""
        self._check(connection, row_id, precondition)
        if not connection.write(Statement(self._delete, (row_id,))):
            raise NotFound(self.resource, row_id)
        return self._change(None, row_id, self._missing(row_id))

    def lock(self, connection: Connection, row_ids: Sequence[int]) -> int:
        """Lock these rows and return how many there are. The order of ids prevents deadlocks between two writers."""
        return connection.execute(self._lock, (list(row_ids),)).rowcount

    def lock_unique_values(self, connection: Connection, bodies: Sequence[Body]) -> None:
        """Lock the unique values that these bodies set, in one order and after `lock`, so that two writers of many rows
        do not deadlock. Values that are freed meanwhile can still deadlock: PostgreSQL aborts one of the writers, and
        the gate tries again."""
        ids = {
            number_of(f"{self.resource.name}.{field} {zlib.crc32(value.encode()) % UNIQUE_VALUE_LOCKS}")
            for field in self.resource.unique.values()
            for value in _folded(connection, [getattr(b, field) for b in bodies if field in b.model_fields_set])
        }
        connection.execute("SELECT pg_advisory_xact_lock(%s, key) FROM unnest(%s::int[]) key", (OTHERS, sorted(ids)))

    def _check(self, connection: Connection, row_id: int, precondition: Precondition | None) -> None:
        if precondition is None:
            return
        # Twice: if another transaction deletes the row and inserts it again, the first attempt waits for the old row.
        if not (self.lock(connection, [row_id]) or self.lock(connection, [row_id])):
            raise NotFound(self.resource, row_id)
        (rows,) = connection.query(Statement(self._select, (row_id,)))
        if not rows:
            raise NotFound(self.resource, row_id)
        if not precondition(_entry(rows[0])):
            raise PreconditionFailed(self.resource)

    def _write(self, connection: Connection, statement: str, values: list[Any]) -> tuple[int, Entry] | None:
        try:
            rows = connection.write(Statement(statement, values))
        except psycopg.errors.UniqueViolation as error:
            field = self.resource.unique.get(error.diag.constraint_name or "")
            if field is None and statement == self._insert:
                raise IdTaken from None
            if field is None:
                raise
            raise Conflict(self.resource, field) from None
        return (int(rows[0][0]), _entry(rows[0])) if rows else None

    def _missing(self, row_id: int) -> Entry:
        return Entry(404, NotFound(self.resource, row_id).body())

    def _change(self, outcome: T, row_id: int, entry: Entry) -> Change[T]:
        return Change(outcome, self.resource.invalidated_by(row_id), (self.resource.row_path(row_id), entry))


def _execute(connection: Connection, statement: sql.Composed, values: list[Any]) -> list[Any]:
    """Execute without preparing: a prepared search soon gets a plan that ignores its words."""
    return connection.execute(statement, values, prepare=False).fetchall()


def _folded(connection: Connection, values: Sequence[Any]) -> list[str]:
    """Return the values as unique indexes compare them, or coarser: equal values become equal texts."""
    statement = "SELECT DISTINCT folded(value) FROM unnest(%s::text[]) value"
    return [value for (value,) in connection.execute(statement, ([*map(str, values)],)).fetchall()]


def _entry(row: Row) -> Entry:
    _, modified, body = row
    return found(body, modified=modified.decode())
