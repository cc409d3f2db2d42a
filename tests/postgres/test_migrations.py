"""The first migration: of a new database, and of an existing table, which it adopts with its rows or refuses."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from testkit.databases import create_database, drop_database, execute, fetch_rows
from testkit.stack import Stack
from velikiy.postgres.migrate import CannotMigrate, upgrade

REVISIONS = [
    "0001_baseline",
    "0002_folded",
    "0003_replicated",
    "0004_import_counts",
    "0005_keys",
    "0006_statistics",
    "0007_idempotency_owner",
    "0008_oldest_code",
    "0009_row_history",
    "0010_lock_numbers",
    "0011_live_edges",
]


@pytest.fixture
def empty_dsn(stack: Stack) -> Iterator[str]:
    """The DSN of an empty database that belongs to the app's role."""
    name, dsn = create_database(stack)
    yield dsn
    drop_database(stack, name)


def test_new_database_contains_alice_bob_and_charlie_and_continues_with_id_4(empty_dsn: str) -> None:
    assert upgrade(empty_dsn, wait=5) == REVISIONS
    assert fetch_rows(empty_dsn, "SELECT id, name FROM users ORDER BY id") == [(1, "Alice"), (2, "Bob"), (3, "Charlie")]
    assert fetch_rows(empty_dsn, "INSERT INTO users (name, email) VALUES ('D', 'd@example.com') RETURNING id") == [(4,)]


def test_triggers_that_were_dropped_or_disabled_come_back_by_one_call(empty_dsn: str) -> None:
    triggers = (
        "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger"
        " WHERE tgrelid IN ('users'::regclass, 'row_history'::regclass, 'api_keys'::regclass) ORDER BY tgname"
    )
    upgrade(empty_dsn, wait=5)
    before = fetch_rows(empty_dsn, triggers)
    for table, dropped in (
        ("users", "row_continues"),
        ("users", "history_of_updated"),
        ("row_history", "history_changed"),
        ("api_keys", "keys_changed"),
    ):
        execute(empty_dsn, f"DROP TRIGGER {dropped} ON {table}; ALTER TABLE {table} DISABLE TRIGGER USER")
        execute(empty_dsn, f"CALL add_triggers('{table}')")
        assert fetch_rows(empty_dsn, triggers) == before


def test_second_migration_run_applies_nothing(empty_dsn: str) -> None:
    upgrade(empty_dsn, wait=5)
    assert upgrade(empty_dsn, wait=5) == []


def test_concurrent_migration_runs_apply_each_migration_once(empty_dsn: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(lambda _: upgrade(empty_dsn, wait=5), range(4)))
    assert sorted(applied) == [[], [], [], REVISIONS]


def test_migration_that_does_not_suit_older_apps_waits_for_their_end(empty_dsn: str) -> None:
    upgrade(empty_dsn, wait=5, to="0009_row_history")
    with psycopg.connect(empty_dsn, application_name="velikiy reads"):
        with pytest.raises(
            CannotMigrate, match=r"0010_lock_numbers and .* do not suit apps .* connected from this machine"
        ):
            upgrade(empty_dsn, wait=5, lock_wait=0.3)
        assert fetch_rows(empty_dsn, "SELECT version_num FROM velikiy_version") == [("0009_row_history",)]
    assert upgrade(empty_dsn, wait=5)[0] == "0010_lock_numbers"


@pytest.mark.parametrize(
    "table",
    [
        "id serial PRIMARY KEY, name varchar(100) NOT NULL, email varchar(120) UNIQUE NOT NULL,"
        " created_at timestamp DEFAULT CURRENT_TIMESTAMP",
        "id integer, name text, email text, created_at timestamptz",
        "id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text, email varchar, created_at timestamp(0)",
        "id smallserial, name char varying, email text, created_at date",
        "id int UNIQUE, name text, email text PRIMARY KEY, created_at timestamptz,"
        " updated_at timestamp, version int, note text, flag bool NOT NULL DEFAULT true",
        "id int DEFAULT nextval('elsewhere'), name varchar(120), email text, created_at timestamp",
    ],
)
def test_existing_table_is_adopted_with_its_rows(empty_dsn: str, table: str) -> None:
    execute(
        empty_dsn,
        f"""
        CREATE SEQUENCE elsewhere;
        CREATE TABLE alembic_version (version_num varchar(32));
        INSERT INTO alembic_version VALUES ('of another program');
        CREATE TABLE users ({table});
        INSERT INTO users (id, name, email, created_at) OVERRIDING SYSTEM VALUE
        VALUES (7, 'Глеб', 'Gleb@Example.com', '2020-02-02'), (30, ' Old ', 'old@example.com', NULL);
        """,
    )
    upgrade(empty_dsn, wait=5)
    adopted = fetch_rows(empty_dsn, "SELECT id, name, email, version FROM users ORDER BY id")
    assert adopted == [(7, "Глеб", "Gleb@Example.com", 1), (30, " Old ", "old@example.com", 1)]
    assert fetch_rows(empty_dsn, "SELECT created_at::date::text FROM users WHERE id = 7") == [("2020-02-02",)]
    assert fetch_rows(empty_dsn, "SELECT count(*) FROM users WHERE created_at IS NULL OR updated_at IS NULL") == [(0,)]
    # The next id is larger than every existing id, and an update increments the version.
    assert fetch_rows(
        empty_dsn, "INSERT INTO users (name, email) VALUES ('N', 'n@example.com') RETURNING id, version"
    ) == [(31, 1)]
    assert fetch_rows(empty_dsn, "UPDATE users SET name = 'M' WHERE id = 7 RETURNING version") == [(2,)]
    assert fetch_rows(
        empty_dsn,
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute"
        " WHERE attrelid = 'users'::regclass AND attname IN ('id', 'created_at') ORDER BY attname",
    ) == [("timestamp with time zone",), ("bigint",)]


def test_adopted_empty_table_starts_with_id_1(empty_dsn: str) -> None:
    execute(empty_dsn, "CREATE TABLE users (id serial PRIMARY KEY, name text, email text, created_at timestamp)")
    upgrade(empty_dsn, wait=5)
    assert fetch_rows(empty_dsn, "INSERT INTO users (name, email) VALUES ('N', 'n@example.com') RETURNING id") == [(1,)]


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("TABLE users (id uuid, name text, email text, created_at timestamp)", "column id has type uuid"),
        ("TABLE users (id int, name text, email text)", "it lacks the column created_at"),
        (
            "TABLE users (id int, name text, email text, created_at date, password text NOT NULL)",
            "password is unknown to this service",
        ),
        ("TABLE users (id int, name text, email text, created_at date, version text)", "version has type text"),
        (
            "TABLE users (id int, name text, email text, created_at date); CREATE TABLE more () INHERITS (users)",
            "the table more inherits from it",
        ),
        ("VIEW users AS SELECT 1 AS id, 'a' AS name, 'b' AS email, now() AS created_at", "not a plain table"),
    ],
)
def test_table_that_cannot_be_adopted_is_refused_with_the_reason(empty_dsn: str, table: str, reason: str) -> None:
    execute(empty_dsn, f"CREATE {table}")
    with pytest.raises(CannotMigrate, match=reason):
        upgrade(empty_dsn, wait=5)
    assert fetch_rows(empty_dsn, "SELECT to_regclass('velikiy_version')") == [(None,)]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ("(3, 'A', 'same@example.com'), (5, 'B', 'SAME@example.com')", "3, 5"),
        ("(3, NULL, 'a@example.com')", "3"),
        ("(3, '', 'a@example.com')", "3"),
        ("(3, repeat('x', 101), 'a@example.com')", "3"),
        ("(3, 'A', NULL)", "3"),
        ("(0, 'A', 'a@example.com')", "0"),
    ],
)
def test_rows_that_cannot_be_adopted_are_listed_and_nothing_changes(empty_dsn: str, values: str, ids: str) -> None:
    execute(
        empty_dsn,
        f"CREATE TABLE users (id int, name text, email text, created_at timestamp);"
        f"INSERT INTO users (id, name, email) VALUES {values}",
    )
    before = fetch_rows(empty_dsn, "SELECT * FROM users ORDER BY id")
    with pytest.raises(CannotMigrate, match=rf"ids {ids}\."):
        upgrade(empty_dsn, wait=5)
    assert fetch_rows(empty_dsn, "SELECT * FROM users ORDER BY id") == before
    assert fetch_rows(empty_dsn, "SELECT to_regclass('velikiy_version')") == [(None,)]


def test_emails_are_unique_regardless_of_case_for_sql_from_outside(empty_dsn: str) -> None:
    upgrade(empty_dsn, wait=5)
    with pytest.raises(psycopg.errors.UniqueViolation):
        execute(empty_dsn, "INSERT INTO users (name, email) VALUES ('A', 'ALICE@Example.COM')")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0", "encoding SQL_ASCII"),
        ("ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0", "knows only ASCII letters"),
    ],
)
def test_database_with_an_unsuitable_encoding_or_locale_is_refused(stack: Stack, options: str, reason: str) -> None:
    name, dsn = create_database(stack, options)
    try:
        with pytest.raises(CannotMigrate, match=reason):
            upgrade(dsn, wait=5)
        assert fetch_rows(dsn, "SELECT to_regclass('users')") == [(None,)]
    finally:
        drop_database(stack, name)


def test_error_for_an_unreachable_server_names_database_url() -> None:
    with pytest.raises(CannotMigrate, match="DATABASE_URL"):
        upgrade("postgresql://nobody@127.0.0.1:1/nothing", wait=0.2)


def test_database_of_the_stack_compares_non_ascii_letters_regardless_of_case(stack: Stack) -> None:
    assert stack.sql("SHOW server_encoding") == [("UTF8",)]
    assert stack.sql("SELECT lower('ГЛЕБ') = 'глеб', 'ГЛЕБ' ILIKE 'глеб'") == [(True, True)]


def test_role_of_the_app_is_not_a_superuser(stack: Stack) -> None:
    assert stack.sql("SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles WHERE rolname = current_user") == [
        (False, False, False)
    ]
