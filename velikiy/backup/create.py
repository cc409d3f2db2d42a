"""Make a backup: pg_dump of one snapshot into a new file, which gets its name after it was verified."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

import psycopg

from velikiy.backup import CannotBackUp
from velikiy.backup.archive import Archive, BadArchive
from velikiy.backup.tables import LEFT_OUT, Table, digest, service_tables, stage
from velikiy.bulk.atomic_file import open_output, standard_stream
from velikiy.bulk.progress import activity
from velikiy.postgres import CONNECT_OPTIONS, client_programs

Verify = Literal["rows", "values"]
"""Read the file, and compare the number of rows with the database, or also each value."""

LOCK_TIMEOUT_S = 30
"""Seconds that pg_dump waits for a statement that changes a table, such as a migration."""

UNREADABLE_TABLES = """
SELECT format('%I.%I', nspname, relname)
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p', 'S', 'm') AND nspname <> 'information_schema' AND nspname !~ '^pg_'
    AND NOT (has_schema_privilege(pg_namespace.oid, 'USAGE') AND (
        CASE relkind WHEN 'S' THEN has_sequence_privilege(pg_class.oid, 'SELECT')
        ELSE has_table_privilege(pg_class.oid, 'SELECT') END))
ORDER BY 1
"""
"""Tables of other programs that share the database. pg_dump would fail because of them."""

NEXT_STEPS = {
    "server version mismatch": "Install the postgresql-client of the server's version, or a newer one",
    "permission denied": "Use the role that owns the tables (MIGRATION_DATABASE_URL)",
    "LOCK TABLE": "A session changes a table, such as a migration. Wait for its end, and run the command again",
    "connection to server": "Check with ./run status that the stack runs",
}
"""The next step of the operator, by a part of the message of pg_dump."""


class Made(NamedTuple):
    file: str
    size: int
    rows: dict[str, int]
    """The number of rows in each table of the service."""

    verified: Verify | None
    sha256: str
    left_out: list[str]
    """Tables of other programs that the role may not read."""


def make(address: str, file: str, verify: Verify) -> Made:
    """Write a backup of the database into a file.

    Args:
        address: The address of the database, with the role that owns the tables.
        file: The path. It is replaced as a whole, when the backup is complete. - is stdout, which cannot be verified.

    Raises:
        CannotBackUp
        OSError
    """
    is_stream = standard_stream(file) is not None or (Path(file).exists() and not Path(file).is_file())
    if file == "-" and sys.stdout.isatty():
        raise CannotBackUp("a backup is no text for a terminal. Give FILE a name, or redirect stdout")
    with _snapshot(address) as (connection, snapshot):
        tables = service_tables(connection)
        left_out = [name for (name,) in connection.execute(UNREADABLE_TABLES).fetchall()]
        expected = {
            table.name: digest(connection, table, table.identifier, values=verify == "values") for table in tables
        }
        with open_output(file) as output:
            _dump(address, snapshot, left_out, output)
            if is_stream:
                return Made(file, 0, _counts(expected), None, "", left_out)
            with activity(lambda: "verifying"):
                archive = _open(Path(file), output.fileno())
                _compare(archive, connection, tables, expected, values=verify == "values")
            sha256 = _sha256(output.fileno())
            size = os.fstat(output.fileno()).st_size
    _sync_folder(Path(file))
    return Made(file, size, _counts(expected), verify, sha256, left_out)


@contextmanager
def _snapshot(address: str) -> Iterator[tuple[psycopg.Connection, str]]:
    """Yield a connection, and the name of its snapshot for pg_dump.

    Raises:
        CannotBackUp
    """
    try:
        with psycopg.connect(address, **CONNECT_OPTIONS, application_name="velikiy backup") as connection:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                connection.execute(f"SET LOCAL {name} = 0")
            connection.execute("SET LOCAL timezone = 'UTC'")
            [(snapshot,)] = connection.execute("SELECT pg_export_snapshot()").fetchall()
            yield connection, snapshot
            connection.rollback()
    except psycopg.errors.UndefinedTable:
        raise CannotBackUp("the database is not migrated: its tables are missing. Run velikiy migrate") from None
    except psycopg.OperationalError as error:
        raise CannotBackUp(
            f"PostgreSQL does not answer: {_first_line(str(error))}. Check with ./run status that the stack runs"
        ) from None
    except psycopg.Error as error:
        raise CannotBackUp(f"PostgreSQL refused: {_first_line(str(error))}") from None


def _dump(address: str, snapshot: str, left_out: list[str], output: IO[bytes]) -> None:
    """
    Raises:
        CannotBackUp
        OSError
    """
    try:
        program = client_programs.find("pg_dump")
    except client_programs.NotInstalled as error:
        raise CannotBackUp(str(error)) from None
    command = [
        *[program, "--format=custom", "--compress=6", "--encoding=UTF8", f"--snapshot={snapshot}", "--no-password"],
        *[f"--lock-wait-timeout={LOCK_TIMEOUT_S}s", f"--exclude-table-data={LEFT_OUT}"],
        *(f"--exclude-table={name}" for name in left_out),
    ]
    # The snapshot is one of the primary.
    primary = {"PGTARGETSESSIONATTRS": str(CONNECT_OPTIONS["target_session_attrs"])}
    environment = {**client_programs.environment(address), **primary, "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, env=environment
    )
    assert process.stderr is not None
    with process:
        try:
            with activity(lambda: f"writing, {_written(output) / 1e6:,.0f} MB so far"):
                complaint = process.stderr.read().decode(errors="replace")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        reason = complaint.strip().rpartition("error: ")[2] or f"exit code {process.returncode}"
        step = next((step for part, step in NEXT_STEPS.items() if part in complaint), "Nothing was written")
        raise CannotBackUp(f"pg_dump failed: {_first_line(reason)}. {step}")


def _written(output: IO[bytes]) -> int:
    with suppress(OSError):
        return os.fstat(output.fileno()).st_size
    return 0


def _open(file: Path, descriptor: int) -> Archive:
    """Raises: CannotBackUp, OSError"""
    try:
        return Archive(file, descriptor=descriptor)
    except BadArchive as error:
        raise CannotBackUp(f"the new file cannot be read back: {error}") from None


def _compare(
    archive: Archive,
    connection: psycopg.Connection,
    tables: list[Table],
    expected: dict[str, tuple[int, int]],
    *,
    values: bool,
) -> None:
    """Read the whole file and compare it with the snapshot.

    Raises:
        CannotBackUp
    """
    by_name = {table.name: table for table in tables}
    found: dict[str, tuple[int, int]] = {}
    try:
        for section in archive.sections([]):
            table = by_name.get(section.table)
            if table is None:
                for _ in section.rows:
                    pass
            elif values:
                stage(connection, table, section.columns, section.rows)
                found[table.name] = digest(connection, table, table.staged)
            else:
                found[table.name] = sum(block.count(b"\n") for block in section.rows), 0
    except BadArchive as error:
        raise CannotBackUp(f"the new file cannot be read back: {error}") from None
    for name in expected:
        if found.get(name) != expected[name]:
            raise CannotBackUp(
                f"the new file differs from the database in the table {name}, so it was not kept. Check the disk, and"
                " the memory of this machine"
            )


def _counts(expected: dict[str, tuple[int, int]]) -> dict[str, int]:
    return {name: count for name, (count, _) in expected.items()}


def _sha256(descriptor: int) -> str:
    with Path(f"/dev/fd/{descriptor}").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(file: Path) -> None:
    """Make sure that the new name of the file survives a crash."""
    with suppress(OSError):  # a file system without it
        folder = os.open(file.resolve().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip() if text.strip() else "no reason was given"
