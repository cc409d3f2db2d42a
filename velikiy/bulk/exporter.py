"""All rows of one moment into a file."""

import time

from psycopg import sql

from velikiy.bulk.importer import CHUNK
from velikiy.bulk.insert import PATIENCE
from velikiy.bulk.output_files import target
from velikiy.bulk.progress import shown
from velikiy.coherence import Gate
from velikiy.resources import pagination
from velikiy.resources.base import Resource


def export_to(resource: Resource, gate: Gate, file: str, form: str) -> int:
    """How many rows there were.

    Raises:
        DatabaseUnavailable, OSError
    """
    names = {"columns": pagination.columns(resource), "table": sql.Identifier(resource.name)}
    rows = sql.SQL("SELECT {columns} FROM {table} ORDER BY id").format(**names)
    if form == "csv":
        statement = sql.SQL("COPY ({}) TO STDOUT (FORMAT csv, HEADER, ENCODING 'UTF8')").format(rows)
    else:
        # JSON has no control characters, so nothing is quoted, and it comes as the API has it.
        statement = sql.SQL(
            "COPY (SELECT row_to_json(r)::text FROM ({}) r)"
            r" TO STDOUT (FORMAT csv, QUOTE e'\x01', DELIMITER e'\x02', ENCODING 'UTF8')"
        ).format(rows)
    written = 0
    with target(file) as out, gate.database.transaction() as connection:
        connection.execute("SET LOCAL statement_timeout = 0")
        # PostgreSQL may have sent all rows, and be idle, long before the reader of a pipe has taken them.
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        [(about,)] = connection.execute(
            "SELECT reltuples::bigint FROM pg_class WHERE oid = %s::regclass", (resource.name,)
        ).fetchall()
        with (
            shown(f"exporting {resource.name}", about if about > 0 else None, beside=out) as report,
            connection.cursor().copy(statement) as copy,
        ):
            for written, row in enumerate(copy, start=0 if form == "csv" else 1):
                out.write(row)
                connection.deadline = time.monotonic() + PATIENCE
                if not written % CHUNK:
                    report(written, written)
    return written
