"""The tables of the service that a restore replaces, and rows of a backup in temporary tables beside them."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import psycopg
from psycopg import sql

from velikiy.postgres.rights import SERVICE_TABLES
from velikiy.resources.base import registry

LEFT_OUT = "caches"
"""The table that describes running processes. Its state of earlier would let caches serve what they held then."""

DESCRIBE = """
SELECT relname, pg_get_serial_sequence(quote_ident(nspname) || '.' || quote_ident(relname), serial),
    columns, coalesce(keys, ARRAY['id']), parents
FROM unnest(%s::text[]) WITH ORDINALITY wanted (name, position)
JOIN pg_class ON pg_class.oid = to_regclass(quote_ident(name))
JOIN pg_namespace ON pg_namespace.oid = relnamespace
CROSS JOIN LATERAL (
    SELECT array_agg(attname::text ORDER BY attnum) AS columns, bool_or(attname = 'id') AS has_id,
        CASE WHEN bool_or(attname = 'id') THEN 'id' END AS serial
    FROM pg_attribute WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
) its_columns
LEFT JOIN LATERAL (
    SELECT array_agg(attname::text) AS keys FROM pg_index
    JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)
    WHERE indrelid = pg_class.oid AND indisprimary
) its_key ON true
CROSS JOIN LATERAL (
    SELECT coalesce(array_agg(DISTINCT confrelid::regclass::text), '{}') AS parents FROM pg_constraint
    WHERE conrelid = pg_class.oid AND contype = 'f' AND confrelid <> conrelid
) its_parents
ORDER BY position
"""

LINKED = """
SELECT format('%%s (%%s)', conrelid::regclass, conname) FROM pg_constraint
WHERE contype = 'f' AND confrelid = ANY (%(tables)s::regclass[]) AND NOT conrelid = ANY (%(tables)s::regclass[])
UNION ALL
SELECT format('%%s (INHERITS)', inhrelid::regclass) FROM pg_inherits WHERE inhparent = ANY (%(tables)s::regclass[])
"""
"""The tables of other programs whose rows belong to rows of the service."""


class Table(NamedTuple):
    name: str
    columns: tuple[str, ...]
    """Without generated columns: PostgreSQL computes them."""

    key: tuple[str, ...]
    """The columns that identify a row."""

    sequence: str | None
    """The sequence of the ids, with its schema."""

    parents: tuple[str, ...]
    """The tables that foreign keys of this table refer to."""

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.name)

    @property
    def staged(self) -> sql.Identifier:
        """The temporary table with the rows of the backup."""
        return sql.Identifier("pg_temp", f"restored_{self.name}")

    @property
    def sequence_name(self) -> str | None:
        return self.sequence.rpartition(".")[2].strip('"') if self.sequence else None


def service_tables(connection: psycopg.Connection) -> list[Table]:
    """Return the tables of the resources and of the service, each after the tables that it refers to."""
    names = [*registry(), *(name for name in SERVICE_TABLES if name != LEFT_OUT)]
    rows = connection.execute(DESCRIBE, (names,)).fetchall()
    found = {
        name: Table(name, tuple(columns), tuple(key), sequence, tuple(parents))
        for name, sequence, columns, key, parents in rows
    }
    ordered: dict[str, Table] = {}

    def place(table: Table) -> None:
        if table.name not in ordered:
            for parent in table.parents:
                if parent in found and parent != table.name:
                    place(found[parent])
            ordered.setdefault(table.name, table)

    for table in found.values():
        place(table)
    return list(ordered.values())


def linked_tables(connection: psycopg.Connection, tables: Sequence[Table]) -> list[str]:
    """Return the tables of other programs that refer to these tables, or inherit from them."""
    names = [table.identifier.as_string(connection) for table in tables]
    return [name for (name,) in connection.execute(LINKED, {"tables": names}).fetchall()]


def stage(
    connection: psycopg.Connection,
    table: Table,
    columns: Sequence[str],
    blocks: Iterable[bytes],
    report: Callable[[int], None] = lambda rows: None,
) -> int:
    """Put rows into a temporary table beside this table. Return their number.

    Args:
        columns: The columns of the rows, all of which the table has.
        blocks: Rows in the text format of COPY.
        report: Called with the number of rows so far.
    """
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    connection.execute(
        sql.SQL("CREATE TEMPORARY TABLE {} ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
            sql.Identifier(f"restored_{table.name}"), names, table.identifier
        )
    )
    rows = copy_in(connection, table.staged, columns, blocks, report)
    key = sql.SQL(", ").join(map(sql.Identifier, table.key))
    connection.execute(sql.SQL("CREATE INDEX ON {} ({})").format(table.staged, key))
    connection.execute(sql.SQL("ANALYZE {}").format(table.staged))  # so that the comparison is planned for its size
    return rows


def copy_in(
    connection: psycopg.Connection,
    target: sql.Identifier,
    columns: Sequence[str],
    blocks: Iterable[bytes],
    report: Callable[[int], None] = lambda rows: None,
) -> int:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    rows = 0
    with connection.cursor().copy(sql.SQL("COPY {} ({}) FROM STDIN (ENCODING 'UTF8')").format(target, names)) as copy:
        for block in blocks:
            copy.write(block)
            rows += block.count(b"\n")
            report(rows)
    return rows


def copy_out(connection: psycopg.Connection, table: Table) -> Iterable[bytes]:
    """Return the rows of a table in the text format of COPY."""
    names = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    statement = sql.SQL("COPY {} ({}) TO STDOUT (ENCODING 'UTF8')").format(table.identifier, names)
    with connection.cursor().copy(statement) as copy:
        for row in copy:
            yield bytes(row)


def digest(
    connection: psycopg.Connection, table: Table, rows: sql.Composable, *, values: bool = True
) -> tuple[int, int]:
    """Return the number of rows, and a number that differs if any value differs; 0 without `values`."""
    names = sql.SQL(", ").join(map(sql.Identifier, table.columns))
    total = sql.SQL("coalesce(sum(hashtextextended(ROW({})::text, 0)::numeric), 0)").format(names)
    statement = sql.SQL("SELECT count(*), {} FROM {}").format(total if values else sql.SQL("0"), rows)
    [(count, number)] = connection.execute(statement).fetchall()
    return int(count), int(number)
