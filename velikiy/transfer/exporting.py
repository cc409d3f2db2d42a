"""All rows of one moment into a file."""

import gzip
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from psycopg import sql

from velikiy import pages
from velikiy.coherence import Fence
from velikiy.resource import Resource
from velikiy.transfer.importing import CHUNK
from velikiy.transfer.inserting import PATIENCE
from velikiy.transfer.progress import shown


def export_to(resource: Resource, fence: Fence, file: str, form: str) -> int:
    """How many rows there were.

    Raises:
        DatabaseUnavailable, OSError
    """
    names = {"columns": pages.columns(resource), "table": sql.Identifier(resource.name)}
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
    with target(file) as out, fence.database.transaction() as connection:
        connection.execute("SET LOCAL statement_timeout = 0")
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


@contextmanager
def target(file: str) -> Iterator[IO[bytes]]:
    """A new file that takes its place when the block ends well; stdout, and what is no file, as it is."""
    if file == "-":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends us, as it does cat
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file).resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.part") if path.is_file() or not path.exists() else path
    try:
        with beside.open("wb") as out:
            if file.endswith(".gz"):
                with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=6) as compressed:
                    yield compressed  # type: ignore[misc]
            else:
                yield out
            if beside != path:
                out.flush()
                os.fsync(out.fileno())
        if beside != path:
            if path.exists():
                shutil.copymode(path, beside)
            beside.replace(path)
    finally:
        if beside != path:
            beside.unlink(missing_ok=True)
