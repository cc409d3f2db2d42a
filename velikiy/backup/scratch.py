"""A scratch database: rows of an older schema are put into tables of that schema, and migrated there.

The migrations of this version of the code make both the older tables and the newer ones, so nothing in the file decides
about a table.
"""

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from velikiy.backup import CannotRestore
from velikiy.backup.archive import Archive, Section
from velikiy.backup.tables import LEFT_OUT, copy_in, service_tables
from velikiy.postgres import CONNECT_OPTIONS, migrate
from velikiy.postgres.rights import HISTORY_TABLE

PREFIX = "velikiy_scratch_"

OWN_COLUMNS = """
SELECT attname FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
"""

TABLES = """
SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relname <> %s
"""

EMPTY = "SELECT NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = current_schema()::regnamespace)"

UNUSED = """
SELECT datname FROM pg_database
WHERE datname LIKE %s || '%%' AND datdba = (SELECT oid FROM pg_roles WHERE rolname = %s)
    AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE pg_stat_activity.datname = pg_database.datname)
"""
"""Scratch databases that a killed command has left. A command in progress has a session in its own."""


@contextmanager
def migrated(owner: str, archive: Archive, given: str | None) -> Iterator[tuple[psycopg.Connection, list[str]]]:
    """Yield a connection to a database with the rows of this archive in the newest schema, and the names of the tables
    that the archive has.

    Args:
        owner: The address of the service's database, with the role that owns the tables.
        given: The name of an empty database for the purpose, or None to create one.

    Raises:
        CannotRestore, BadArchive
    """
    with _database(owner, given) as address:
        try:
            migrate.upgrade(address, wait=10, to=archive.revision)
            with psycopg.connect(address, **CONNECT_OPTIONS, application_name="velikiy restore") as connection:
                names = [name for (name,) in connection.execute(TABLES, (migrate.VERSION_TABLE,)).fetchall()]
                loaded = _load(connection, archive, [name for name in names if name != LEFT_OUT])
                connection.commit()
                migrate.upgrade(address, wait=10)
                if HISTORY_TABLE not in names:  # the present history belongs to later versions of the rows
                    loaded.append(HISTORY_TABLE)
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                yield connection, loaded
        except migrate.CannotMigrate as error:
            raise CannotRestore(f"the rows of {archive.shown} could not be migrated: {error}") from None


def _load(connection: psycopg.Connection, archive: Archive, names: Sequence[str]) -> list[str]:
    """Fill the tables. Return the names of the tables that the archive has."""
    connection.execute("SET LOCAL velikiy.history = off")  # the archive brings its own
    for name in names:
        # The baseline creates three users. Foreign keys are checked when the rows reach the database of the service.
        connection.execute(sql.SQL("TRUNCATE {} CASCADE").format(sql.Identifier(name)))
    loaded = []
    sequences = [table.sequence_name for table in service_tables(connection) if table.sequence_name]
    for section in archive.sections([*names, *sequences]):
        _add_foreign_columns(connection, section)
        try:
            copy_in(connection, sql.Identifier(section.table), section.columns, section.rows)
        except psycopg.Error as error:
            raise CannotRestore(
                f"the rows of {section.table} in {archive.shown} do not fit its table: {type(error).__name__}"
                f" {error.sqlstate or ''}".rstrip()
            ) from None
        loaded.append(section.table)
    return loaded


def _add_foreign_columns(connection: psycopg.Connection, section: Section) -> None:
    """Add the columns that an operator has added to a table, as text: rows are read and written as text anyway."""
    own = {name for (name,) in connection.execute(OWN_COLUMNS, (section.table,)).fetchall()}
    for column in section.columns:
        if column not in own:
            connection.execute(
                sql.SQL("ALTER TABLE {} ADD {} text").format(sql.Identifier(section.table), sql.Identifier(column))
            )


@contextmanager
def _database(owner: str, given: str | None) -> Iterator[str]:
    """Yield the address of an empty database. It is dropped at the end, or emptied if it was given.

    Raises:
        CannotRestore
    """
    if given:
        address = make_conninfo(owner, dbname=given)
        try:
            with psycopg.connect(address, **CONNECT_OPTIONS, autocommit=True) as connection:
                [(is_empty,)] = connection.execute(EMPTY).fetchall()
        except psycopg.Error as error:
            raise CannotRestore(f"the scratch database {given} cannot be used: {_first_line(error)}") from None
        if not is_empty:
            raise CannotRestore(f"the scratch database {given} is not empty. Name an empty database")
        try:
            yield address
        finally:
            with psycopg.connect(address, **CONNECT_OPTIONS, autocommit=True) as connection:
                [(schema,)] = connection.execute("SELECT current_schema()").fetchall()
                names = {"schema": sql.Identifier(schema)}
                connection.execute(sql.SQL("DROP SCHEMA {schema} CASCADE; CREATE SCHEMA {schema}").format(**names))
        return
    role = str(conninfo_to_dict(owner).get("user") or "")
    with _administrator(owner, role) as connection:
        for (left,) in connection.execute(UNUSED, (PREFIX, role)).fetchall():
            with suppress(psycopg.Error):
                connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(left)))
        name = f"{PREFIX}{secrets.token_hex(6)}"
        connection.execute(_create(connection, owner, name, role))
    address = make_conninfo(owner, dbname=name)
    try:
        with psycopg.connect(address, **CONNECT_OPTIONS, autocommit=True):  # shows others that it is in use
            yield address
    finally:
        with _administrator(owner, role) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _create(connection: psycopg.Connection, owner: str, name: str, role: str) -> sql.Composed:
    """Return the statement for a database whose texts compare as those of the service's database."""
    [(found,)] = connection.execute(
        "SELECT to_jsonb(d) FROM pg_database d WHERE datname = %s", (conninfo_to_dict(owner).get("dbname") or role,)
    ).fetchall()
    options: dict[str, object] = {"LC_COLLATE": found["datcollate"], "LC_CTYPE": found["datctype"]}
    locale = found.get("datlocale") or found.get("daticulocale")  # since PostgreSQL 17, and before
    if found["datlocprovider"] == "i":
        options |= {"LOCALE_PROVIDER": "icu", "ICU_LOCALE": locale}
    elif found["datlocprovider"] == "b":
        options |= {"LOCALE_PROVIDER": "builtin", "BUILTIN_LOCALE": locale}
    return sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING 'UTF8' {}").format(
        sql.Identifier(name),
        sql.Identifier(role),
        sql.SQL(" ").join(sql.SQL(f"{option} {{}}").format(sql.Literal(value)) for option, value in options.items()),
    )


@contextmanager
def _administrator(owner: str, role: str) -> Iterator[psycopg.Connection]:
    """Yield a connection that may create databases: with the owner's role, or the superuser of the stack's own server.

    Raises:
        CannotRestore
    """
    try:
        with psycopg.connect(owner, **CONNECT_OPTIONS, autocommit=True) as connection:
            [(may_create,)] = connection.execute(
                "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
            ).fetchall()
            if may_create:
                yield connection
                return
        superuser = _superuser(owner)
        if superuser is None:
            raise CannotRestore(
                f"the backup has the tables of an older version, and the role {role} may not create the scratch"
                f" database in which they are migrated. Create it (CREATE DATABASE scratch OWNER {role} TEMPLATE"
                " template0), add --scratch scratch, and drop it afterwards"
            )
        with psycopg.connect(superuser, **CONNECT_OPTIONS, autocommit=True) as connection:
            yield connection
    except psycopg.Error as error:
        raise CannotRestore(f"PostgreSQL refuses a scratch database: {_first_line(error)}") from None


def _superuser(owner: str) -> str | None:
    """Return the address with the superuser, if the server is the stack's own and its secret can be read."""
    folder = Path(os.environ.get("SECRETS_DIR") or "")
    sockets = folder.parent / "run"
    if not folder.is_absolute() or conninfo_to_dict(owner).get("host") != str(sockets):
        return None
    try:
        password = (folder / "postgres_password").read_text().strip()
    except OSError:
        return None
    return make_conninfo(owner, user="postgres", password=password)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
