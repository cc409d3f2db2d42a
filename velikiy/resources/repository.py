"""What each operation reads and writes of a resource, and which paths each write touches.

A row becomes JSON once, in PostgreSQL; from there to the client its bytes are passed on unparsed.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import sql

from velikiy.coherence import NOT_TRIED, Answer, CachePath, Change, Entry, Gate, Lease, NotTried, found
from velikiy.coherence.locks import lock_id
from velikiy.http.problems import Problem
from velikiy.postgres import Connection, Row, Statement
from velikiy.resources import pagination
from velikiy.resources.base import Body, Resource
from velikiy.resources.pagination import BadCursor, Page

T = TypeVar("T")

ROW = sql.SQL("id, to_char(updated_at AT TIME ZONE 'UTC', 'Dy, DD Mon YYYY HH24:MI:SS \"GMT\"'), row_to_json(r)::text")
"""With the date as HTTP spells it (RFC 9110, 5.6.7)."""

Condition = Callable[[Entry], bool]
"""Of the row as it is: may it be written?"""


class Refusal(Exception):
    """A write that the data does not allow."""


class Missing(Refusal):
    """There is no row of this id."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Taken(Refusal):
    """Another row has this value."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class Changed(Refusal):
    """The row is not the one that the writer has read."""


class Rows:
    def __init__(self, resource: Resource, gate: Gate) -> None:
        self.resource = resource
        self.gate = gate
        names = {
            "table": sql.Identifier(resource.name),
            "columns": pagination.columns(resource),
            "fields": sql.SQL(", ").join(map(sql.Identifier, resource.fields)),
            "values": sql.SQL(", ".join(f"${place}" for place in range(1, len(resource.fields) + 1))),
            "row": ROW,
        }

        def statement(text: LiteralString) -> str:
            """Composed once: each time, it would cost as much as carrying it out."""
            return sql.SQL(text).format(**names).as_string()

        self._select = statement("SELECT {row} FROM (SELECT {columns} FROM {table} WHERE id = $1) r")
        self._lock = statement("SELECT FROM {table} WHERE id = ANY(%s) ORDER BY id FOR UPDATE")
        # The writes give the row as the reads do: the writer fills Redis with it.
        self._insert = statement(
            "WITH r AS (INSERT INTO {table} ({fields}) VALUES ({values}) RETURNING {columns}) SELECT {row} FROM r"
        )
        self._update = statement(
            "WITH r AS (UPDATE {table} SET {{}} WHERE id = $1 RETURNING {columns}) SELECT {row} FROM r"
        )
        self._names = {name: sql.Identifier(name).as_string() for name in resource.fields}
        self._delete = statement("DELETE FROM {table} WHERE id = $1 RETURNING id")

    # ---- reads ----

    def get(self, number: int, asked: Lease | NotTried | None = NOT_TRIED) -> Answer:
        """The row as a JSON object, or an entry with status 404. `asked`: see `Gate.read`."""

        def load(connection: Connection) -> Entry:
            (rows,) = connection.query(Statement(self._select, (number,)))
            return _entry(rows[0]) if rows else self._missing(number)

        return self.gate.read(self.resource.item(number), "", load, asked)

    def page(self, page: Page, asked: Lease | NotTried | None = NOT_TRIED) -> Answer:
        """The page as a JSON array.

        Raises:
            BadCursor
        """
        statement, values = pagination.select(self.resource, page)

        def load(connection: Connection) -> Entry:
            try:
                rows = self._near(connection, page)
                if len(rows) <= page.limit:
                    rows = _fresh(connection, statement, values)
            except psycopg.DataError:
                raise BadCursor from None  # nothing else comes from outside here and may be malformed
            body = f"[{','.join(row[2] for row in rows[: page.limit])}]".encode()
            return found(body, link=pagination.link(self.resource, page, rows))

        return self.gate.read(self.resource.all, page.variant, load, asked)

    def _near(self, connection: Connection, page: Page) -> list[Any]:
        """What a search finds in the next stretch of the order, where it finds too much to sort it all."""
        if not page.q:
            return []
        ((plan,),) = _fresh(connection, *pagination.estimate(self.resource, page))
        expected = plan[0]["Plan"]["Plan Rows"]
        if expected <= pagination.FEW:
            return []
        # As PostgreSQL counted them last; -1 where it never did, which makes a short look.
        table = "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass"
        ((rows,),) = connection.execute(table, (self.resource.name,)).fetchall()
        near = pagination.near(page, expected, max(rows, expected))
        return _fresh(connection, *pagination.select(self.resource, page, near=near)) if near else []

    def count(self, q: str = "", asked: Lease | NotTried | None = NOT_TRIED) -> Answer:
        """`{"count": 3}`: of all, or of those that `q` finds. It costs a scan of an index."""
        condition, values = pagination.matching(self.resource, q)
        statement = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(sql.Identifier(self.resource.name), condition)

        def load(connection: Connection) -> Entry:
            (row,) = _fresh(connection, statement, values)
            return found(b'{"count":%d}' % row[0])

        return self.gate.read(self.resource.count, Page(q=q).variant, load, asked)

    # ---- writes: each within a transaction that the fence has opened ----

    def create(self, connection: Connection, new: Body) -> Change[tuple[int, Entry]]:
        """Raises: Taken"""
        values = new.model_dump()
        written = self._written(connection, self._insert, [values[field] for field in self.resource.fields])
        assert written is not None  # INSERT ... RETURNING gives a row or raises
        number, entry = written
        return self._change((number, entry), number, entry)

    def update(self, connection: Connection, number: int, changes: Body, may: Condition | None) -> Change[Entry]:
        """Raises: Missing, Taken, Changed"""
        self._check(connection, number, may)
        given = changes.model_dump(exclude_unset=True)
        values = {field: given[field] for field in self.resource.fields if field in given}
        assignments = [f"{self._names[name]} = ${place}" for place, name in enumerate(values, start=2)]
        written = self._written(connection, self._update.format(", ".join(assignments)), [number, *values.values()])
        if written is None:
            raise Missing(number)
        _, entry = written
        return self._change(entry, number, entry)

    def delete(self, connection: Connection, number: int, may: Condition | None) -> Change[None]:
        """Raises: Missing, Changed"""
        self._check(connection, number, may)
        if connection.query(Statement(self._delete, (number,))) == [[]]:
            raise Missing(number)
        return self._change(None, number, self._missing(number))

    def lock(self, connection: Connection, numbers: Sequence[int]) -> int:
        """How many there are. In one order: two writers of the same rows would otherwise wait for each other."""
        return connection.execute(self._lock, (list(numbers),)).rowcount

    def lock_values(self, connection: Connection, given: Sequence[Body]) -> None:
        """Those that only one row can have, for writers of many: in one order, as `lock`, and after it. What is left to
        wait for each other, by values that are freed meanwhile, PostgreSQL ends, and the fence tries again."""
        taken = {
            lock_id(CachePath(f"{self.resource.name}.{field} {_bucket(getattr(body, field))}", ""))
            for field in self.resource.unique.values()
            for body in given
            if field in body.model_fields_set
        }
        connection.execute("SELECT pg_advisory_xact_lock(key) FROM unnest(%s::bigint[]) key", (sorted(taken),))

    def _check(self, connection: Connection, number: int, may: Condition | None) -> None:
        if may is None:
            return
        # Twice: of a row that somebody deletes and inserts anew the first finds only what is gone, and waits for it.
        if not (self.lock(connection, [number]) or self.lock(connection, [number])):
            raise Missing(number)
        (rows,) = connection.query(Statement(self._select, (number,)))
        if not rows:
            raise Missing(number)
        if not may(_entry(rows[0])):
            raise Changed

    def _written(self, connection: Connection, statement: str, values: list[Any]) -> tuple[int, Entry] | None:
        try:
            (rows,) = connection.query(Statement(statement, values))
        except psycopg.errors.UniqueViolation as error:
            field = self.resource.unique.get(error.diag.constraint_name or "")
            if field is None:
                raise
            raise Taken(field) from None
        return (int(rows[0][0]), _entry(rows[0])) if rows else None

    def _missing(self, number: int) -> Entry:
        return Entry(404, missing(self.resource, number).body())

    def _change(self, outcome: T, number: int, entry: Entry) -> Change[T]:
        return Change(outcome, self.resource.invalidated_by(number), (self.resource.item(number), entry))


def missing(resource: Resource, number: int) -> Problem:
    return Problem("not-found", f"There is no {resource.one} {number}.")


def _fresh(connection: Connection, statement: sql.Composed, values: list[Any]) -> list[Any]:
    """Not prepared: after some runs PostgreSQL would plan for words that it does not know."""
    return connection.execute(statement, values, prepare=False).fetchall()


def _bucket(value: object) -> int:
    """Of 64: each lock takes a place in a table that all sessions share."""
    return zlib.crc32(str(value).lower().encode()) % 64


def _entry(row: Row) -> Entry:
    _, modified, body = row
    return found(body, modified=modified.decode())
