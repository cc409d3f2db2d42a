"""Alembic, driven by the app's own settings and under a lock of the database's."""

import time
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import create_engine, exc, pool

from velikiy.postgres import OURS

SCRIPTS = Path(__file__).parent.parent.parent / "migrations"

LOCK = 0x76656C696B6979  # "velikiy": whoever migrates holds it, the others wait and find nothing left to do

IDLE_S = 10
"""Seconds between two statements, which takes milliseconds. Then PostgreSQL ends the transaction: a process that is
stopped would keep its tables locked for as long."""

VERSION_TABLE = "velikiy_version"
"""Not Alembic's own name for it: an adopted database may have one of another program's."""


class CannotMigrate(Exception):
    """Why not, in a sentence; nothing was changed."""


def upgrade(dsn: str, *, wait: float) -> list[str]:
    """Apply what is missing, all of it or nothing; the revisions applied.

    Raises:
        CannotMigrate
    """
    connection = _connect(dsn, wait)
    _suits(connection)
    engine = create_engine("postgresql+psycopg://", creator=lambda: connection, poolclass=pool.StaticPool)
    try:
        with engine.begin() as transaction:
            transaction.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_S}s'")
            transaction.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            config = Config(attributes={"connection": transaction})
            config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
            options = {"version_table": VERSION_TABLE}
            before = MigrationContext.configure(transaction, opts=options).get_current_revision()
            script = ScriptDirectory.from_config(config)
            if before == script.get_current_head():
                return []
            command.upgrade(config, "head")
            return [r.revision for r in script.iterate_revisions("head", before or "base")][::-1]
    except CommandError as error:
        raise CannotMigrate(
            f"{error}. A newer version of this code may have migrated the database: run that version"
        ) from None
    except exc.DBAPIError as error:
        raise CannotMigrate(f"PostgreSQL refused: {str(error.orig).splitlines()[0]}") from error
    finally:
        engine.dispose()
        connection.close()


def _connect(dsn: str, wait: float) -> psycopg.Connection:
    until = time.monotonic() + wait
    while True:
        try:
            return psycopg.connect(dsn, **OURS, application_name="velikiy migrate")
        except psycopg.OperationalError as error:
            if time.monotonic() >= until:
                raise CannotMigrate(
                    f"PostgreSQL accepted no connection within {wait:g} s. The last error: {_first_line(error)}. "
                    "Check DATABASE_URL and that the server runs."
                ) from None
            time.sleep(0.05)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__


def _suits(connection: psycopg.Connection) -> None:
    """A database in which texts cannot be compared as promised is refused before anything is made in it."""
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
