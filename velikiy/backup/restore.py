"""Put the rows of a backup back, as one write of every path.

Rows are first copied into temporary tables, while the service reads and writes as before. Then writers are kept out of
the tables, the rows that differ are exchanged, both tiers are invalidated, and the transaction commits. Readers see the
rows before it or the rows after it, and a cache holds neither any longer than after any other write.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import psycopg
from psycopg import sql

from velikiy.backup import CannotRestore, scratch
from velikiy.backup.archive import Archive
from velikiy.backup.tables import Table, copy_out, linked_tables, service_tables, stage
from velikiy.bulk.insert import vacuum
from velikiy.coherence import Change, Gate
from velikiy.postgres import Connection, migrate
from velikiy.resources.base import registry

LOCK_TIMEOUT_MS = 500
"""Milliseconds of one wait for the writers in progress. Later writers queue behind it, and have DATABASE_TIMEOUT."""

LOCK_WAIT_S = 60.0
"""Seconds after which the restore gives up, because a transaction in progress does not end."""

IDLE_MS = 60_000
"""Milliseconds after which PostgreSQL ends the transaction of a process that was stopped: it keeps writers out."""

VACUUM_AFTER_ROWS = 10_000
"""Exchanged rows after which a table is vacuumed at once."""

KEYS = "api_keys"

KEEP_REVOCATIONS = """
UPDATE {staged} restored SET revoked_at = present.revoked_at
FROM api_keys present WHERE present.digest = restored.digest
    AND present.revoked_at IS NOT NULL AND restored.revoked_at IS NULL
RETURNING restored.name
"""

LOST_KEYS = """
SELECT name FROM api_keys
WHERE revoked_at IS NULL AND NOT EXISTS (SELECT FROM {staged} r WHERE r.digest = api_keys.digest)
"""

ADVANCE = """
SELECT setval(%(sequence)s::regclass, latest) FROM (
    SELECT greatest((SELECT max(id) FROM {table}), %(last)s::bigint) AS latest
) ids WHERE latest > coalesce(pg_sequence_last_value(%(sequence)s::regclass), 0)
"""
"""Ids are never given twice: the sequence stays where it is, unless the backup is ahead."""


class Exchanged(NamedTuple):
    rows: int
    """The number of rows in the backup."""

    removed: int
    """The number of rows that the backup does not have, or has with other values."""

    added: int


class Restored(NamedTuple):
    tables: dict[str, Exchanged]
    kept: list[str]
    """The tables that the backup does not have. They are left as they are."""

    still_revoked: list[str]
    """The names of API keys that were revoked after the backup."""

    lost_keys: list[str]
    """The names of valid API keys that were created after the backup."""


def check(gate: Gate, archive: Archive) -> None:
    """Refuse an archive that this code or this database cannot take, before anything is done.

    Raises:
        CannotRestore
    """
    age = migrate.age(archive.revision)
    if age == "unknown":
        raise CannotRestore(
            f"{archive.shown} was made by a newer version of this service (revision {archive.revision}), or by a"
            " development version. Use the version that made it"
        )
    with gate.database.autocommit() as connection:
        [(present,)] = connection.execute("SELECT version_num FROM velikiy_version").fetchall()
        tables = service_tables(connection)
        if migrate.age(present) != "newest":
            raise CannotRestore(
                f"the database has the revision {present}, and not the revision of this version. Run velikiy migrate"
                " with the version of the code that runs"
            )
        if linked := linked_tables(connection, tables):
            raise CannotRestore(
                f"tables of other programs belong to the rows: {', '.join(linked)}. Their rows would be lost, or point"
                " to rows that are gone. Stop the service and use pg_restore (docs/backup.md)"
            )


def restore(
    gate: Gate,
    archive: Archive,
    owner: str,
    *,
    keep_keys: bool = False,
    scratch_database: str | None = None,
    report: Callable[[str, int], None] = lambda table, rows: None,
) -> Restored:
    """Replace the rows of the service by those of the archive.

    Args:
        owner: The address of the database with the role that owns the tables, for a scratch database.
        keep_keys: Leave the API keys as they are.
        scratch_database: The name of an empty database, in which rows of an older version are migrated.
        report: Called with a table and the number of rows that were read so far.

    Raises:
        CannotRestore, BadArchive
        DatabaseUnavailable: The outcome is unknown.
    """
    check(gate, archive)
    with ExitStack() as open_until_the_end:
        older: tuple[psycopg.Connection, list[str]] | None = None
        if migrate.age(archive.revision) == "older":
            older = open_until_the_end.enter_context(scratch.migrated(owner, archive, scratch_database))

        def change(connection: Connection) -> Change[Restored]:
            connection.deadline = math.inf
            # The history is that of the backup, as the rows are.
            connection.execute("SELECT set_config('velikiy.history', 'off', true)")
            _set(connection, statement_timeout=0, idle_in_transaction_session_timeout=0, lock_timeout=0)
            tables = [table for table in service_tables(connection) if not (keep_keys and table.name == KEYS)]
            staged = dict(_stage(connection, archive, older, tables, report))
            present = [table for table in tables if table.name in staged]
            still_revoked, lost = _compare_keys(connection, present)
            _set(connection, idle_in_transaction_session_timeout=IDLE_MS)
            _keep_writers_out(connection, present)
            exchanged = _exchange(connection, present, staged, archive.sequences)
            kept = [table.name for table in tables if table.name not in staged]
            return Change(Restored(exchanged, kept, still_revoked, lost), None)

        restored = gate.write(change)
    for name, resource in registry().items():
        if name in restored.tables and restored.tables[name].added > VACUUM_AFTER_ROWS:
            vacuum(resource, gate)
    return restored


def _set(connection: Connection, **milliseconds: int) -> None:
    for name, value in milliseconds.items():
        connection.execute("SELECT set_config(%s, %s, true)", (name, str(value)))


def _stage(
    connection: Connection,
    archive: Archive,
    older: tuple[psycopg.Connection, list[str]] | None,
    tables: Sequence[Table],
    report: Callable[[str, int], None],
) -> Iterator[tuple[str, tuple[int, tuple[str, ...]]]]:
    """Fill the temporary tables. Yield the name of each, the number of its rows and its columns."""
    by_name = {table.name: table for table in tables}
    if older is None:
        sequences = [table.sequence_name for table in tables if table.sequence_name]
        for section in archive.sections([*by_name, *sequences]):
            table = by_name[section.table]
            _check_columns(archive, table, section.columns)
            rows = stage(connection, table, section.columns, section.rows, partial(report, table.name))
            yield table.name, (rows, section.columns)
        return
    source, names = older
    for migrated in service_tables(source):
        if migrated.name in names and migrated.name in by_name:
            table = by_name[migrated.name]
            _check_columns(archive, table, migrated.columns)
            blocks = copy_out(source, migrated)
            rows = stage(connection, table, migrated.columns, blocks, partial(report, table.name))
            yield table.name, (rows, migrated.columns)


def _check_columns(archive: Archive, table: Table, columns: Sequence[str]) -> None:
    """Raises: CannotRestore"""
    if unknown := [column for column in columns if column not in table.columns]:
        raise CannotRestore(
            f"{archive.shown} has columns that the table {table.name} lacks: {', '.join(unknown)}. Add them first"
            f" (ALTER TABLE {table.name} ADD ...)"
        )


def _compare_keys(connection: Connection, tables: Sequence[Table]) -> tuple[list[str], list[str]]:
    """Keep keys revoked that are revoked now. Return their names, and the names of valid keys that will be gone."""
    keys = next((table for table in tables if table.name == KEYS), None)
    if keys is None:
        return [], []
    revoked = connection.execute(sql.SQL(KEEP_REVOCATIONS).format(staged=keys.staged)).fetchall()
    lost = connection.execute(sql.SQL(LOST_KEYS).format(staged=keys.staged)).fetchall()
    return sorted(name for (name,) in revoked), sorted(name for (name,) in lost)


def _keep_writers_out(connection: Connection, tables: Sequence[Table]) -> None:
    """Lock the tables against every write until the transaction ends. Readers go on.

    Raises:
        CannotRestore
    """
    names = sql.SQL(", ").join(table.identifier for table in tables)
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            with connection.transaction():
                _set(connection, lock_timeout=LOCK_TIMEOUT_MS)
                connection.execute(sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(names))
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if time.monotonic() > deadline:
                raise CannotRestore(
                    "a transaction that writes does not end, such as an import or a psql session. Wait for it, or end"
                    " it, and run the command again"
                ) from None
            time.sleep(LOCK_TIMEOUT_MS / 1000)  # in which writers may go on
        else:
            _set(connection, lock_timeout=0)
            return


def _exchange(
    connection: Connection,
    tables: Sequence[Table],
    staged: Mapping[str, tuple[int, tuple[str, ...]]],
    last_values: Mapping[str, int],
) -> dict[str, Exchanged]:
    """Remove the rows that differ from the backup, and add the missing rows.

    Rows are deleted and inserted, and not updated: a trigger would give an updated row another version. Rows that refer
    to other tables are all exchanged, because the rows that they refer to may be.
    """
    removed: dict[str, int] = {}
    for table in reversed(tables):
        _, columns = staged[table.name]
        same = sql.SQL("SELECT FROM {} r WHERE {} AND ROW({})::text = ROW({})::text").format(
            table.staged, _equal_keys(table), _listed("r", columns), _listed("present", columns)
        )
        statement = sql.SQL("DELETE FROM {} present WHERE {}").format(
            table.identifier, sql.SQL("true") if table.parents else sql.SQL("NOT EXISTS ({})").format(same)
        )
        removed[table.name] = _run(connection, table, statement)
    exchanged = {}
    for table in tables:
        rows, columns = staged[table.name]
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        added = _run(
            connection,
            table,
            sql.SQL(
                "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {} r"
                " WHERE NOT EXISTS (SELECT FROM {} present WHERE {})"
            ).format(table.identifier, names, names, table.staged, table.identifier, _equal_keys(table)),
        )
        exchanged[table.name] = Exchanged(rows, removed[table.name], added)
        if table.sequence:
            last = last_values.get(table.sequence_name or "", 0)
            advance = sql.SQL(ADVANCE).format(table=table.identifier)
            connection.execute(advance, {"sequence": table.sequence, "last": last})
    return exchanged


def _run(connection: Connection, table: Table, statement: sql.Composed) -> int:
    """Return the number of rows.

    Raises:
        CannotRestore: PostgreSQL refuses a row.
    """
    try:
        return connection.execute(statement).rowcount
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        raise CannotRestore(
            f"the rows of {table.name} do not fit the database (SQLSTATE {error.sqlstate}): a constraint or an index of"
            " today refuses them"
        ) from None


def _equal_keys(table: Table) -> sql.Composed:
    return sql.SQL(" AND ").join(sql.SQL("present.{0} = r.{0}").format(sql.Identifier(column)) for column in table.key)


def _listed(alias: str, columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(alias, column) for column in columns)
