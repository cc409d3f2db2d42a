"""Write a snapshot of all rows into a file."""

import time

from psycopg import sql

from velikiy.bulk.atomic_file import open_output
from velikiy.bulk.importer import CHUNK_ROWS
from velikiy.bulk.input_file import BOM
from velikiy.bulk.insert import CHUNK_TIMEOUT_S
from velikiy.bulk.progress import progress_bar
from velikiy.bulk.readers import FORMULA_BEGINNINGS
from velikiy.coherence import Gate
from velikiy.resources import pagination
from velikiy.resources.base import Resource


def export_to(resource: Resource, gate: Gate, file: str, file_format: str, *, for_excel: bool = False) -> int:
    """Write all rows into the file and return their number.

    Args:
        for_excel: Begin CSV with a byte order mark, and put an apostrophe before a text that Excel would take for a
            formula.

    Raises:
        DatabaseUnavailable, OSError
    """
    names = {"columns": pagination.columns(resource), "table": sql.Identifier(resource.name)}
    rows = sql.SQL("SELECT {columns} FROM {table} ORDER BY id").format(**names)
    if for_excel:
        rows = sql.SQL("SELECT {} FROM ({}) r").format(_without_formulas(resource, gate), rows)
    if file_format == "csv":
        statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv, HEADER, ENCODING 'UTF8')").format(rows)
    else:
        # JSON contains no control characters. With two of them as quote and delimiter, PostgreSQL quotes nothing and
        # sends each object as the API has it.
        statement = sql.SQL(
            "COPY (SELECT row_to_json(r)::text FROM ({}) r)"
            r" TO STDOUT (FORMAT csv, QUOTE e'\x01', DELIMITER e'\x02', ENCODING 'UTF8')"
        ).format(rows)
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
