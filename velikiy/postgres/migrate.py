"""Migrate the schema: Alembic, with the app's own settings and under an advisory lock."""

import time
from pathlib import Path
from typing import Literal

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection as SqlConnection
from sqlalchemy import create_engine, exc, pool, text

from velikiy.postgres import CONNECT_OPTIONS

MIGRATIONS = Path(__file__).parent.parent.parent / "migrations"

LOCK = 0x76656C696B6979
"""The advisory lock of a migration ("velikiy" in ASCII). Other processes wait for it and find nothing left to do."""

IDLE_S = 10
"""Seconds that the migration may pause between two statements; it needs milliseconds. Then PostgreSQL ends the
transaction, because a process that is stopped would keep tables locked."""

VERSION_TABLE = "velikiy_version"
"""Not Alembic's default name: in an adopted database it may belong to another program."""

BASELINE = "0001_baseline"

BEFORE_THE_BASELINE = "0003_resources"
"""The last revision of the development versions, which had three migrations."""

OLDER = ("0001_users", "0002_caches")


class CannotMigrate(Exception):
    """The reason, as a sentence for the operator. Nothing was changed."""


def upgrade(dsn: str, *, wait: float, app_role: str | None = None, to: str = "head") -> list[str]:
    """Apply every missing migration, or none. Return their revisions.

    Args:
        dsn: The address of the database, with the role that owns the tables.
        wait: Seconds to wait for PostgreSQL.
        app_role: The role of the apps, which gets the rights on the tables that it lacks. None if it is the same role.
        to: The revision to stop at.

    Raises:
        CannotMigrate
    """
    connection = _connect(dsn, wait)
    _check_database(connection)
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=pool.StaticPool)
    try:
        with engine.begin() as transaction:
            transaction.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_S}s'")
            transaction.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            config = Config(attributes={"connection": transaction})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            options = {"version_table": VERSION_TABLE}
            before = MigrationContext.configure(transaction, opts=options).get_current_revision()
            carried_over = before in (*OLDER, BEFORE_THE_BASELINE)
            if carried_over:
                before = _carry_over(transaction, str(before))
            script = ScriptDirectory.from_config(config)
            applied = [BASELINE] if carried_over else []
            if before != script.get_current_head():
                command.upgrade(config, to)
                applied += [r.revision for r in script.iterate_revisions(to, before or "base")][::-1]
            if app_role and app_role != connection.info.user:
                _grant(transaction, app_role)
            return applied
    except CommandError as error:
        raise CannotMigrate(
            f"{error}. A newer version of this code may have migrated the database: run that version"
        ) from None
    except exc.DBAPIError as error:
        raise CannotMigrate(f"PostgreSQL refused: {str(error.orig).splitlines()[0]}{_next_step(error)}") from error
    finally:
        engine.dispose()
        connection.close()


def check(dsn: str) -> None:
    """Check that this code knows the schema of the database, if the database can be reached.

    Raises:
        CannotMigrate: A newer version of the code has migrated the database.
    """
    try:
        revision = _revision(dsn)
    except psycopg.Error:  # no migration was applied yet, or the server is away
        return
    if revision and revision not in {*_revisions(), *OLDER, BEFORE_THE_BASELINE}:
        raise CannotMigrate(
            f"this code is older than the database, which has the revision {revision}: use the version of the code"
            " that migrated it, or a newer version"
        )


def age(revision: str) -> Literal["newest", "older", "unknown"]:
    """Return how this revision compares with the revisions of this code. A newer version has unknown revisions."""
    newest, *older = _revisions()
    return "newest" if revision == newest else "older" if revision in older else "unknown"


def await_migration(dsn: str, *, wait: float) -> None:
    """Wait until another process has applied every migration of this code. A newer database is fine.

    Raises:
        CannotMigrate: The time is over.
    """
    newest, *older = _revisions()
    deadline = time.monotonic() + wait
    while True:
        try:
            revision = _revision(dsn)
            if revision and revision not in {*older, *OLDER, BEFORE_THE_BASELINE}:
                return
            state = f"the database has the revision {revision}, and {newest} is awaited"
        except psycopg.Error as error:
            state = f"PostgreSQL refused: {(str(error) or type(error).__name__).splitlines()[0]}"
        if time.monotonic() > deadline:
            raise CannotMigrate(f"no migration within {wait:g} s: {state}")
        time.sleep(0.5)


def _revision(dsn: str) -> str | None:
    """Raises: psycopg.Error"""
    query = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608
    with psycopg.connect(dsn, **CONNECT_OPTIONS, application_name="velikiy migrate") as connection:
        row = connection.execute(query).fetchone()
    return str(row[0]) if row else None


def _revisions() -> list[str]:
    """Return the revisions of this code, the newest first."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return [revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()]


def role_of(dsn: str | None) -> str | None:
    """Return the role that an address names."""
    role = conninfo_to_dict(dsn).get("user") if dsn else None
    return str(role) if role else None


def _grant(transaction: SqlConnection, app_role: str) -> None:
    """Grant the rights that the apps' role lacks.

    Raises:
        CannotMigrate: The role does not exist.
    """
    if not transaction.execute(text("SELECT to_regrole(quote_ident(:role)) IS NOT NULL"), {"role": app_role}).scalar():
        raise CannotMigrate(
            f"PostgreSQL has no role {app_role}. Create it: CREATE ROLE {app_role} LOGIN PASSWORD '...'"
        )
    transaction.execute(text("SELECT set_config('velikiy.app_role', :role, true)"), {"role": app_role})
    transaction.execute(text(statements("grants")))


def _next_step(error: exc.DBAPIError) -> str:
    """Return the next step if the role lacks a right, else an empty string."""
    if not isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
        return ""
    return ". Set MIGRATION_DATABASE_URL to the address with the role that owns the tables"


def statements(name: str) -> str:
    """Return the SQL of a file in migrations/sql."""
    return (MIGRATIONS / "sql" / f"{name}.sql").read_text()


def _carry_over(transaction: SqlConnection, revision: str) -> str:
    """Turn the schema of the development versions into the baseline. Return the new revision.

    Raises:
        CannotMigrate
    """
    if revision in OLDER:
        raise CannotMigrate(
            f"the database has the revision {revision} of an early development version, which this version cannot "
            "migrate. Save the rows with psql (COPY users TO STDOUT CSV HEADER), start with a new database, and import "
            "the file with velikiy users import; nothing was changed."
        )
    for name in ("carry_over", "resources", "add_triggers", "carry_over_triggers"):
        transaction.execute(text(statements(name)))
    transaction.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = :new"), {"new": BASELINE})  # noqa: S608
    return BASELINE


def _connect(dsn: str, wait: float) -> psycopg.Connection:
    until = time.monotonic() + wait
    while True:
        try:
            return psycopg.connect(dsn, **CONNECT_OPTIONS, application_name="velikiy migrate")
        except psycopg.OperationalError as error:
            if time.monotonic() >= until:
                raise CannotMigrate(
                    f"PostgreSQL accepted no connection within {wait:g} s. The last error: {_first_line(error)}. "
                    "Check DATABASE_URL and that the server runs."
                ) from None
            time.sleep(0.05)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__


def _check_database(connection: psycopg.Connection) -> None:
    """Refuse a database that cannot compare texts as the API promises, before anything is created in it.

    Raises:
        CannotMigrate
    """
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise CannotMigrate(
            f"the database has the encoding {encoding}; create it with ENCODING 'UTF8' TEMPLATE template0."
        )
    row = connection.execute("SELECT lower('ГЛЕБ') = 'глеб'").fetchone()
    if not (row and row[0]):
        raise CannotMigrate(
            "the database has a locale that knows only ASCII letters, so 'ГЛЕБ' and 'глеб' would be different names; "
            "create it with LC_CTYPE 'C.UTF-8' TEMPLATE template0."
        )
