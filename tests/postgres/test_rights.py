"""The app's role owns no table and changes no schema. The role of the migrations owns the tables and grants the rights."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import cast

import psycopg
import pytest
import requests
from psycopg.conninfo import make_conninfo

from testkit.databases import create_database, drop_database, execute, fetch_rows, superuser_dsn
from testkit.outages import readiness
from testkit.stack import Stack, wait_until
from velikiy.bulk.insert import vacuum
from velikiy.coherence import Gate
from velikiy.findings.postgres import hazards
from velikiy.postgres import Connection
from velikiy.postgres.migrate import CannotMigrate, upgrade
from velikiy.postgres.rights import SERVICE_TABLES, missing_rights
from velikiy.resources.base import registry
from velikiy.stack import cluster

TABLES = "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"


@pytest.fixture
def owner(stack: Stack) -> Iterator[str]:
    """The address of an empty database, as its owner. The app's role has no right there."""
    name, dsn = create_database(stack)
    yield dsn
    drop_database(stack, name)


def as_app(stack: Stack, dsn: str) -> str:
    """Return the address of the database with the app's role."""
    return make_conninfo(dsn, user="velikiy", password=stack.secret("app_password"))


def as_superuser(stack: Stack, dsn: str) -> psycopg.Connection:
    name = psycopg.conninfo.conninfo_to_dict(dsn)["dbname"]
    connection = psycopg.connect(make_conninfo(superuser_dsn(stack), dbname=name), autocommit=True)
    connection.execute("SELECT set_config('velikiy.secrets', %s, false)", (str(stack.data / "secrets"),))
    connection.execute("SET velikiy.app_role = 'velikiy'")
    connection.execute("SET lock_timeout = '100ms'")
    return connection


def test_services_of_a_stack_connect_as_a_role_that_owns_nothing(own_stack: Stack) -> None:
    stack = own_stack  # no import has left a temporary table in a session
    connected = "SELECT DISTINCT usename FROM pg_stat_activity WHERE application_name ~ '^velikiy (reads|writes|relay)'"
    with as_superuser(stack, stack.postgres) as connection:
        assert ("velikiy",) in connection.execute(connected).fetchall()
    owned = "SELECT count(*) FROM pg_shdepend WHERE refobjid = 'velikiy'::regrole AND deptype = 'o'"
    assert stack.sql(owned) == [(0,)]
    owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert stack.sql(owners) == [("velikiy_owner",)]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE t (id int)",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA s",
        "DROP TABLE users",
        "ALTER TABLE users ADD COLUMN c int",
        "ALTER TABLE users DISABLE TRIGGER ALL",
        "CREATE INDEX ON users (id)",
        "TRUNCATE users",
        "CALL add_triggers('users')",
        "UPDATE velikiy_version SET version_num = ''",
        "SET ROLE velikiy_owner",
        "ALTER ROLE velikiy CREATEDB",
    ],
)
def test_role_of_the_apps_changes_no_schema(stack: Stack, statement: str) -> None:
    with (
        psycopg.connect(stack.secret("database_url")) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(statement.encode())


def test_migration_grants_another_role_the_rights_on_every_table(stack: Stack, owner: str) -> None:
    upgrade(owner, wait=5, app_role="velikiy")
    with psycopg.connect(as_app(stack, owner)) as connection:
        tables = {name for (name,) in connection.execute(TABLES).fetchall()} - {"velikiy_version"}
        # A table of a later migration belongs here, or to migrations/sql/grants.sql as well if it has no triggers.
        assert tables == {*registry(), *SERVICE_TABLES}
        assert missing_rights(connection, list(registry())) == []
        connection.execute("INSERT INTO users (name, email) VALUES ('D', 'd@example.com')")
        connection.execute("SELECT setval(pg_get_serial_sequence('users', 'id'), 9), words('x'), folded('x')")
        connection.execute("CREATE TEMPORARY TABLE t (LIKE users INCLUDING ALL)")


def test_migration_without_a_second_role_grants_nothing(stack: Stack, owner: str) -> None:
    upgrade(owner, wait=5)
    with psycopg.connect(as_app(stack, owner)) as connection:
        assert "SELECT on users" in missing_rights(connection, list(registry()))


def test_grants_that_exist_leave_the_catalog_as_it_is(owner: str) -> None:
    identity = "SELECT oid, xmin::text FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY oid"
    upgrade(owner, wait=5, app_role="velikiy")
    before = fetch_rows(owner, identity)
    upgrade(owner, wait=5, app_role="velikiy")
    assert fetch_rows(owner, identity) == before


def test_migration_names_a_role_that_does_not_exist(owner: str) -> None:
    with pytest.raises(CannotMigrate, match="no role nobody"):
        upgrade(owner, wait=5, app_role="nobody")
    assert fetch_rows(owner, "SELECT to_regclass('users')") == [(None,)]


def test_role_of_the_apps_cannot_migrate_and_the_message_names_the_setting(stack: Stack, owner: str) -> None:
    execute(owner, "GRANT USAGE ON SCHEMA public TO velikiy")
    with pytest.raises(CannotMigrate, match="Set MIGRATION_DATABASE_URL"):
        upgrade(as_app(stack, owner), wait=5)


def test_role_of_the_apps_finds_that_a_migrated_database_is_up_to_date(stack: Stack) -> None:
    assert upgrade(stack.secret("database_url"), wait=5) == []


def test_database_of_an_earlier_version_gets_its_owner_and_keeps_its_rows(stack: Stack, owner: str) -> None:
    with as_superuser(stack, owner) as connection:
        connection.execute("SELECT pg_catalog.set_config('search_path', 'public', false)")
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} OWNER TO velikiy".encode())
        upgrade(as_app(stack, owner), wait=5)  # as the only role, as earlier versions did
        assert cluster._update_roles(connection)
        owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        assert connection.execute(owners).fetchall() == [("velikiy_owner",)]
        owns = "SELECT datdba::regrole::text FROM pg_database WHERE datname = current_database()"
        assert connection.execute(owns).fetchall() == [("velikiy_owner",)]
    assert fetch_rows(as_app(stack, owner), "SELECT count(*) FROM users, velikiy_version") == [(3,)]
    with psycopg.connect(as_app(stack, owner)) as connection:
        assert missing_rights(connection, list(registry())) == []
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DROP TABLE users")
    # A table that the owner creates later.
    execute(owner, "CREATE TABLE later (id bigint GENERATED BY DEFAULT AS IDENTITY)")
    execute(as_app(stack, owner), "INSERT INTO later SELECT nextval('later_id_seq')")


def test_tables_in_use_are_not_waited_for_in_front_of_requests(stack: Stack, owner: str) -> None:
    upgrade(owner, wait=5)
    with as_superuser(stack, owner) as connection, psycopg.connect(owner) as other:
        connection.execute("REASSIGN OWNED BY velikiy_owner TO velikiy")
        try:
            other.execute("SELECT FROM users")  # such as an export, which holds its lock until it ends
            assert not cluster._update_roles(connection)
        finally:
            other.rollback()
            assert cluster._update_roles(connection)


def test_import_collects_the_statistics_of_a_table_that_its_role_does_not_own(stack: Stack, owner: str) -> None:
    upgrade(owner, wait=5, app_role="velikiy")
    with psycopg.connect(as_app(stack, owner), autocommit=True) as connection:
        connection.execute("INSERT INTO users (name, email) SELECT n, n || '@example.com' FROM generate_series(1, 7) n")
        gate = SimpleNamespace(database=SimpleNamespace(autocommit=lambda: nullcontext(connection)))
        vacuum(registry()["users"], cast(Gate, gate))
        counted = connection.execute("SELECT reltuples FROM pg_class WHERE oid = 'users'::regclass").fetchone()
        assert counted == (10,)


def test_readiness_names_a_right_that_is_missing(stack: Stack) -> None:
    stack.sql("REVOKE UPDATE ON users FROM velikiy")
    try:
        wait_until(lambda: "lacks rights on tables: UPDATE on users" in str(readiness(stack)))
    finally:
        upgrade(stack.postgres, wait=5, app_role="velikiy")
    wait_until(lambda: "lacks rights" not in str(readiness(stack)))


def test_missing_tables_of_the_service_are_named_and_the_table_of_the_caches_is_created_again(
    stack: Stack, owner: str
) -> None:
    upgrade(owner, wait=5, app_role="velikiy")
    with Connection.connect(as_app(stack, owner), autocommit=True) as connection:
        execute(owner, "DROP TABLE caches, idempotency_keys")
        [found] = [it for it in hazards(connection, ["users"]) if it.name == "postgres.tables"]
        assert "caches, idempotency_keys" in found.what
        assert upgrade(owner, wait=5, app_role="velikiy") == []
        assert connection.execute("SELECT name FROM caches").fetchall() == [("redis",)]
        [found] = [it for it in hazards(connection, ["users"]) if it.name == "postgres.tables"]
        assert "caches" not in found.what
        assert not [it for it in hazards(connection, ["users"]) if it.name == "postgres.rights"]


@pytest.mark.long
def test_readiness_names_a_server_that_accepts_no_writes(stack: Stack) -> None:
    server = partial(psycopg.connect, superuser_dsn(stack), autocommit=True)
    with server() as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
    try:
        wait_until(lambda: "postgres.read_only" in str(readiness(stack)), within=5)
        response = requests.put(f"{stack.edge}/users/1", json={"name": "A"}, timeout=5)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "read-only" in response.json()["detail"]
        assert "not carried out" in response.json()["detail"]
    finally:
        with server() as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
            connection.execute("SELECT pg_reload_conf()")
    wait_until(lambda: requests.put(f"{stack.edge}/users/1", json={"name": "A"}, timeout=5).status_code == 200)
