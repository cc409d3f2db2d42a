"""Write all rows: a snapshot into a file, or part after part to a client."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from psycopg import sql

from velikiy.bulk.atomic_file import open_output
from velikiy.bulk.importer import CHUNK_ROWS
from velikiy.bulk.input_file import BOM
from velikiy.bulk.insert import CHUNK_TIMEOUT_S
from velikiy.bulk.progress import progress_bar
from velikiy.bulk.readers import FORMULA_BEGINNINGS
from velikiy.coherence import Gate
from velikiy.postgres import Connection
from velikiy.resources import pagination
from velikiy.resources.base import Resource
from velikiy.resources.pagination import Page
from velikiy.resources.repository import ALL_ROWS, Repository

PART_ROWS = 5000
"""Rows of one part of `parts`: half a megabyte, which PostgreSQL reads in some 20 ms."""

EVERYWHERE = sql.SQL("")


def export_to(resource: Resource, gate: Gate, file: str, file_format: str, *, for_excel: bool = False) -> int:
    """Write all rows into the file and return their number.

    Args:
        for_excel: Begin CSV with a byte order mark, and put an apostrophe before a text that Excel would take for a
            formula.

    Raises:
        DatabaseUnavailable, OSError
    """
    statement = _copy(_rows(resource), file_format, _without_formulas(resource, gate) if for_excel else None)
    written = 0
    with open_output(file) as output, gate.database.transaction() as connection:
        connection.execute("SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0")
        # PostgreSQL may have sent all rows, and be idle, long before the reader of a pipe has read them.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        [(estimate,)] = connection.execute(
            "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", (resource.name,)
        ).fetchall()
        with (
            progress_bar(f"exporting {resource.name}", estimate if estimate > 0 else None, output=output) as report,
            connection.cursor().copy(statement) as copy,
        ):
            if for_excel:
                output.write(BOM)
            for written, row in enumerate(copy, start=0 if file_format == "csv" else 1):
                output.write(row)
                connection.deadline = time.monotonic() + CHUNK_TIMEOUT_S
                if not written % CHUNK_ROWS:
                    report(written, written)
    return written


def parts(
    resource: Resource, gate: Gate, file_format: str, page: Page = ALL_ROWS, *, for_excel: bool = False
) -> Iterator[bytes]:
    """Yield the rows in parts of PART_ROWS, each read at one moment, with a connection that is borrowed for this part.

    A snapshot would need one transaction that lasts as long as the slowest client. In the order of ids, which do not
    change, a row that exists throughout is in exactly one part; other rows that are written meanwhile may be in it or
    not. In another order, a row whose sort value changes meanwhile may be missing, or appear as before and as after the
    change.

    Args:
        page: The search and the order.

    Raises:
        DatabaseUnavailable
    """
    texts = _without_formulas(resource, gate) if for_excel else None
    following, position, is_first = _following(resource, gate, page), None, True
    while is_first or position:
        with gate.database.autocommit() as connection:
            rows, position = following(connection, position)
            with connection.cursor().copy(_copy(rows, file_format, texts, has_header=is_first)) as copy:
                content = b"".join(copy)
        if is_first or content:
            yield (BOM if for_excel and is_first else b"") + content
        is_first = False


def _following(resource: Resource, gate: Gate, page: Page) -> Callable[[Connection, Any], tuple[sql.Composed, Any]]:
    """Return a function of a connection and a position, which returns the SELECT of the next part, and the position
    behind it. The first call gets None as its position, and the last one returns None or nothing."""
    if page == ALL_ROWS:
        return partial(_next_by_id, resource)
    return partial(_next_of_search, Repository(resource, gate), replace(page, limit=PART_ROWS))


def _next_by_id(resource: Resource, connection: Connection, last: int | None) -> tuple[sql.Composed, int | None]:
    """Return the SELECT of the rows behind this id, and the last id among them."""
    table = sql.Identifier(resource.name)
    behind = sql.SQL("SELECT max(id) FROM (SELECT id FROM {} WHERE id > %s ORDER BY id LIMIT %s) part").format(table)
    after = last or 0
    [(end,)] = connection.execute(behind, (after, PART_ROWS)).fetchall()
    return _rows(resource, sql.SQL("WHERE id > {} AND id <= {}").format(after, end or after)), end


def _next_of_search(
    repository: Repository, page: Page, connection: Connection, cursor: str | None
) -> tuple[sql.Composed, str]:
    """Return the SELECT of the rows behind this cursor, and the next cursor."""
    ids, following = repository.ids_behind(connection, replace(page, cursor=cursor or ""))
    rows = sql.SQL(
        "SELECT {columns} FROM {table} JOIN unnest({ids}::bigint[]) WITH ORDINALITY AS found(id) USING (id)"
        " ORDER BY found.ordinality"
    ).format(columns=pagination.columns(repository.resource), table=sql.Identifier(repository.resource.name), ids=ids)
    return rows, following


def _rows(resource: Resource, where: sql.Composable = EVERYWHERE) -> sql.Composed:
    return sql.SQL("SELECT {columns} FROM {table} {where} ORDER BY id").format(
        columns=pagination.columns(resource), table=sql.Identifier(resource.name), where=where
    )


def _copy(
    rows: sql.Composed, file_format: str, safe_columns: sql.Composable | None, *, has_header: bool = True
) -> sql.Composed:
    """Return the statement that sends the rows."""
    if safe_columns:
        rows = sql.SQL("SELECT {} FROM ({}) r").format(safe_columns, rows)
    if file_format == "csv":
        header = sql.SQL(", HEADER" if has_header else "")
        return sql.SQL("COPY ({}) TO STDOUT (FORMAT csv{}, ENCODING 'UTF8')").format(rows, header)
    # JSON contains no control characters. With two of them as quote and delimiter, PostgreSQL quotes nothing and sends
    # each object as the API has it.
    return sql.SQL(
        "COPY (SELECT row_to_json(r)::text FROM ({}) r)"
        r" TO STDOUT (FORMAT csv, QUOTE e'\x01', DELIMITER e'\x02', ENCODING 'UTF8')"
    ).format(rows)


def _without_formulas(resource: Resource, gate: Gate) -> sql.Composable:
    """Return the columns of a row, with an apostrophe before texts that begin like a formula."""
    with gate.database.autocommit() as connection:
        texts = connection.execute(
            "SELECT attname FROM pg_attribute JOIN pg_type ON atttypid = pg_type.oid"
            " WHERE attrelid = %s::regclass AND typcategory = 'S' AND attnum > 0 AND NOT attisdropped",
            (resource.name,),
        ).fetchall()
    safe = sql.SQL("CASE WHEN {column} ~ {pattern} THEN '''' || {column} ELSE {column} END AS {column}")
    return sql.SQL(", ").join(
        safe.format(column=sql.Identifier(name), pattern=f"^'*[{FORMULA_BEGINNINGS}]")
        if (name,) in texts
        else sql.Identifier(name)
        for name in resource.columns
    )
